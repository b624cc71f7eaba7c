"""Prompts and training images. Nothing here knows of models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from bench.data import drawings
from bench.data.prompts import PromptSet, load_prompts
from bench.errors import UsageError
from bench.stages import fingerprint

__all__ = ["PreferenceData", "PromptSet", "load_pairs", "load_prompts"]


class PreferenceData:
    """N captioned pairs of the drawn world; item i is a pure function of (seed, i, split)."""

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
        return fingerprint(["world", self.size, self.seed, self.split, probe.sum(axis=(1, 2, 3)).tolist(),
                            self.prompts[-1]])


def load_pairs(spec: str, size: int, seed: int) -> PreferenceData:
    """Open the training pairs a suite names. The drawn world ("world") is the only source so far."""
    if spec != "world":
        raise UsageError(f"data.pairs: unknown source '{spec}'; 'world' is the one there is")
    return PreferenceData(size, seed)
