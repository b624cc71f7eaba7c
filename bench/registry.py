"""Methods and metrics by name, imported only when asked for.

Other packages add their own through the entry-point groups `bench.methods` and `bench.metrics`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError, UsageError, did_you_mean
from bench.methods.signals import TAKEN

if TYPE_CHECKING:
    from bench.methods.base import Method
    from bench.metrics.base import Metric

BUILT_IN: dict[str, dict[str, str]] = {
    "methods": {
        "sft": "bench.methods.sft:SFT",
        "diffusion_dpo": "bench.methods.diffusion_dpo:DiffusionDPO",
        "spin": "bench.methods.spin:SPIN",
    },
    "metrics": {
        "pickscore": "bench.metrics.pickscore:PickScore",
        "pickscore_cosine": "bench.metrics.pickscore:PickScoreCosine",
        "hpsv2": "bench.metrics.hpsv2:HPSv2",
        "hpsv21": "bench.metrics.hpsv2:HPSv21",
        "imagereward": "bench.metrics.imagereward:ImageReward",
        "aesthetic": "bench.metrics.aesthetic:Aesthetic",
        "aesthetic_v1": "bench.metrics.aesthetic:AestheticV1",
        "clip": "bench.metrics.clip:CLIPScore",
        "clip_l14": "bench.metrics.clip:CLIPScoreL14",
        "judge": "bench.mini.judge:Judge",
        "judge2": "bench.mini.judge:SecondJudge",
    },
}


CONTRACT = (
    "name",
    "title",
    "pairing",
    "needs_reference",
    "needs_products",
    "signals",
    "start",
    "loss",
    "has_statistic",
    "next_reference",
)


def targets(kind: str) -> dict[str, str]:
    """Every name of a kind ("methods" or "metrics") with the "module:Class" behind it, built-ins first."""
    found = dict(BUILT_IN[kind])
    for point in sorted(entry_points(group=f"bench.{kind}"), key=lambda point: point.name):
        found.setdefault(point.name, point.value)
    return found


def names(kind: str) -> list[str]:
    """The names of all "methods" or "metrics"."""
    return list(targets(kind))


def check(kind: str, name: str) -> str:
    """Return the name, or say in one line which names there are. Imports nothing."""
    known = names(kind)
    if name not in known:
        hint = did_you_mean(name, known)
        raise UsageError(f"unknown {kind[:-1]} {name!r}{hint}; {kind}: {', '.join(known)}")
    return name


def _load(kind: str, name: str) -> Any:
    target = targets(kind)[check(kind, name)]
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BenchError(f"{kind[:-1]} {name!r} cannot be loaded from {target}: {error}") from error


def method(name: str) -> type[Method]:
    """The method class behind a name; BenchError where it lacks what methods/base.py asks of every class."""
    found = _load("methods", name)
    lacks = [part for part in CONTRACT if not hasattr(found, part)]
    if lacks:
        raise BenchError(
            f"method {name!r}: {found.__module__}.{found.__qualname__} has no {', '.join(lacks)}; "
            "methods/base.py says what every method has"
        )
    taken = [signal.name for signal in found.signals if signal.name in TAKEN]
    if taken:
        raise BenchError(f"method {name!r}: a signal cannot be called {', '.join(taken)}: every training logs that")
    return found


def metric(name: str) -> type[Metric]:
    """The metric class behind a name; BenchError where it is none, or not as metrics/base.py asks."""
    from bench.metrics.base import Metric

    found = _load("metrics", name)
    if not (isinstance(found, type) and issubclass(found, Metric)):
        raise BenchError(
            f"metric {name!r}: {targets('metrics')[name]} is no subclass of bench.metrics.base.Metric; "
            "metrics/README.md tells how to write one"
        )
    if found.name != name:
        raise BenchError(
            f"metric {name!r}: {found.__module__}.{found.__qualname__} calls itself {found.name!r}; "
            "register it under that name"
        )
    columns = [column.name for column in found.columns]
    if not columns or len(set(columns)) < len(columns) or any("/" in column for column in columns):
        raise BenchError(f"metric {name!r}: columns need names of their own, without a slash; it has {columns}")
    return found
