"""Prompts and training images. Nothing here knows of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.data import drawings, world
from bench.data.prompts import PromptSet, load_prompts
from bench.errors import BenchError, UsageError, did_you_mean
from bench.storage.stages import fingerprint

__all__ = ["PreferenceData", "PromptSet", "Source", "load_pairs", "load_prompts"]

EXAMPLES = 20  # rows left out that the protocol names


class Source(Protocol):
    """Training data: captioned winners, and where `paired` the losers of human choices.

    Images are uint8 [n, R, R, 3] for n rows; rows that cannot be read raise bench.storage.shards.BrokenRows, the same
    ones for winners and losers. `fingerprint` changes with the content of any row, `name` says where a row
    comes from, `record` what was read and left out (for the protocol).
    """

    paired: bool
    prompts: Sequence[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def name(self, row: int) -> str: ...

    def winners(self, rows: Sequence[int]) -> np.ndarray: ...

    def losers(self, rows: Sequence[int]) -> np.ndarray: ...

    def record(self) -> dict[str, Any]: ...


class PreferenceData:
    """N captioned pairs of the drawn world; item i is a pure function of (seed, i, split)."""

    paired = True

    def __init__(self, size: int, seed: int, split: str = "train"):
        self.size, self.seed, self.split = size, seed, split

    def __len__(self) -> int:
        return self.size

    @cached_property
    def pairs(self) -> list[drawings.Pair]:
        return [drawings.pair(self.seed, index, self.split) for index in range(self.size)]

    @cached_property
    def prompts(self) -> list[str]:
        return [pair.winner.caption for pair in self.pairs]

    def winners(self, indices: Sequence[int]) -> np.ndarray:
        """The preferred images, uint8 [n, H, W, 3]."""
        return drawings.render(self.pairs[i].winner for i in indices)

    def losers(self, indices: Sequence[int]) -> np.ndarray:
        """The rejected images, uint8 [n, H, W, 3]. Only methods trained on human pairs may ask for them."""
        return drawings.render(self.pairs[i].loser for i in indices)

    @property
    def fingerprint(self) -> str:
        """A hash of the first pairs as drawn, so that a changed world never reuses an old cache."""
        probe = np.concatenate([self.winners(range(min(4, self.size))), self.losers(range(min(4, self.size)))])
        return fingerprint(
            ["world", self.size, self.seed, self.split, probe.sum(axis=(1, 2, 3)).tolist(), self.prompts[-1]]
        )

    def record(self) -> dict[str, Any]:
        return {
            "source": "world",
            "pairs": self.size,
            "resolution": world.SIZE,
            "rows": self.size,
            "left_out": {},
            "examples": [],
        }

    def name(self, row: int) -> str:
        return f"drawing {row}"


class Kept:
    """What is left of a source without its broken rows (why, by row); pair i is row `rows[i]` of the source."""

    def __init__(self, source: Source, broken: Mapping[int, str]):
        self.source, self.broken = source, broken
        self.rows = np.array([row for row in range(len(source)) if row not in broken], dtype=np.int64)
        if not len(self.rows):
            raise BenchError(
                f"{source.record()['source']}: not one of {len(source)} rows can be read; the first: "
                f"{next(iter(broken.values()))}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def prompts(self) -> list[str]:
        return [self.source.prompts[row] for row in self.rows]

    def record(self) -> dict[str, Any]:
        """The source's record with the broken rows counted, the first of them named."""
        record = self.source.record()
        reasons = Counter(reason.partition(":")[0] for reason in self.broken.values())
        named = [f"{self.source.name(row)}: {reason}" for row, reason in sorted(self.broken.items())]
        return {
            **record,
            "pairs": len(self),
            "left_out": {**record["left_out"], **reasons},
            "examples": [*named, *record["examples"]][:EXAMPLES],
        }


SOURCES = {
    "world": "pairs of the drawn world",
    "pickapic:SOURCE[#SPLIT]": "parquet shards in Pick-a-Pic's schema, in a folder or on the hub (OWNER/NAME)",
    "folder:PATH": "images with captions, one a prompt",
}


def load_pairs(
    spec: str, *, size: int | None, seed: int, resolution: int, cache: Path, deduplicate: str | None = None
) -> Source:
    """Open the training data a suite names; what scanning it takes is done once and kept under `cache`."""
    kind, _, rest = spec.partition(":")
    if deduplicate and kind != "pickapic":
        raise UsageError(f"data.deduplicate is for pickapic; '{spec}' has no copies to leave out")
    if spec == "world":
        if size is None:
            raise UsageError("data.size: the drawn world has no end; give a number of pairs")
        if resolution != world.SIZE:
            raise UsageError(
                f"data.pairs: the world's drawings have {world.SIZE} pixels, the pipeline expects {resolution}"
            )
        return PreferenceData(size, seed)
    if kind == "pickapic" and rest:
        from bench.data.pickapic import PickAPic

        return PickAPic(rest, resolution=resolution, cache=cache, size=size, deduplicate=deduplicate)
    if kind == "folder" and rest:
        from bench.data.folder import Folder

        return Folder(rest, resolution=resolution, size=size)
    raise UsageError(f"data.pairs: unknown source '{spec}'{did_you_mean(spec, SOURCES)}; one of {', '.join(SOURCES)}")
