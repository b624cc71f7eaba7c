"""Which checkpoint a score is of: it stands beside every name, so that no miniature passes for the published scorer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bench.data import world
from bench.errors import printable

MINI, NONE = "mini", "none"  # none: of a metric that has no weights
_DIGEST = re.compile(r" \([0-9a-f]{8,}\)")


def checkpoint(info: Mapping[str, Any]) -> str:
    """A scorer's checkpoint without its digests: "mini", "HPS_v2_compressed.pt", "head.pth on CLIP"; "" without one.

    info: what `Metric.info` says.
    """
    parts = _DIGEST.sub("", str(info.get("checkpoint", ""))).split(" on ")
    return " on ".join(part for part in dict.fromkeys(parts) if part != NONE)


def is_mini(info: Mapping[str, Any]) -> bool:
    """Whether any part of it is a bundled miniature."""
    return MINI in checkpoint(info).split(" on ")


def named(name: str, info: Mapping[str, Any]) -> str:
    """ "PickScore (mini)": a scorer's name or title with its checkpoint."""
    known = checkpoint(info)
    return f"{name} ({known})" if known else name


def columns_named(infos: Mapping[str, Mapping[str, Any]], by: str = "title") -> dict[str, str]:
    """ "PickScore (mini)" by column, of metrics' protocols (metric -> columns, checkpoint and the rest).

    by: what the columns are called by, "title" or "name".
    """
    return {column["name"]: named(column[by], info) for info in infos.values() for column in info.get("columns", ())}


def beyond_their_world(prompts: Iterable[str], infos: Mapping[str, Mapping[str, Any]]) -> str:
    """One line where miniatures (metric -> its info) scored other pictures than the drawn world's; "" where not.

    Pictures are the drawn world's where their prompts are captions of it.
    """
    minis = [named(info.get("title", name), info) for name, info in infos.items() if is_mini(info)]
    distinct = list(dict.fromkeys(prompts))
    others = [prompt for prompt in distinct if not _drawn(prompt)] if minis else []
    if not others:
        return ""
    return (
        f"warning: made for the drawn world alone: {', '.join(minis)}; {len(others)} of {len(distinct)} prompts are "
        f"not of it (such as '{printable(others[0], 40)}'): their numbers mean nothing there; --weights official reads "
        "the published scorers"
    )


def _drawn(prompt: str) -> bool:
    try:
        world.parse(prompt)
    except ValueError:
        return False
    return True
