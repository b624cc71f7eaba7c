"""Rated images for teaching the miniature's readers: rendered once, then drawn from in random order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from bench.data import drawings, world
from bench.data.drawings import Drawing
from bench.runtime.progress import track

RoundTrip = Callable[[np.ndarray], np.ndarray]
"""What the autoencoder makes of images: uint8 [N, 64, 64, 3] to the same."""

RATED_PAIRS = 4  # a stream of randomness, beside those of the drawings
CHUNK = 256


@dataclass(frozen=True)
class Pool:
    """N images with what was asked for and how good each is: known for drawings, judged for samples.

    images uint8 [N, 64, 64, 3]; utility and aesthetics float32 [N]; judged: how many rows are worth what the judge
    says. In a pool of pairs, rows 2k and 2k + 1 have the same caption.
    """

    images: np.ndarray
    captions: list[str]
    utility: np.ndarray
    aesthetics: np.ndarray
    judged: int = 0

    def __len__(self) -> int:
        return len(self.captions)

    def __add__(self, other: Pool) -> Pool:
        return Pool(
            np.concatenate([self.images, other.images]),
            self.captions + other.captions,
            np.concatenate([self.utility, other.utility]),
            np.concatenate([self.aesthetics, other.aesthetics]),
            self.judged + other.judged,
        )

    def round_tripped(self, roundtrip: RoundTrip, count: int | None = None) -> Pool:
        """The first `count` drawings (all by default) as the autoencoder shows them; their worth is unchanged."""
        if self.judged:
            raise ValueError("only drawings make the round trip: samples have been through the autoencoder")
        return Pool(
            roundtrip(self.images[:count]), self.captions[:count], self.utility[:count], self.aesthetics[:count]
        )


def rendered(items: Sequence[Drawing]) -> np.ndarray:
    """Render many drawings with progress: uint8 [N, 64, 64, 3]."""
    images = np.empty((len(items), world.SIZE, world.SIZE, 3), np.uint8)
    with track(None, "drawing", total=len(items), unit="image") as bar:
        for start in range(0, len(items), CHUNK):
            batch = items[start : start + CHUNK]
            images[start : start + len(batch)] = drawings.render(batch)
            bar.update(len(batch))
    return images


def pool_of(items: Sequence[Drawing]) -> Pool:
    """Drawings with their exact utility."""
    return Pool(
        rendered(items),
        [item.caption for item in items],
        np.array([item.utility for item in items], np.float32),
        np.array([item.aesthetics for item in items], np.float32),
    )


def pair_pool(seed: int, count: int, split: str, rough: bool = False) -> Pool:
    """`count` pairs as the methods are trained on; with `rough` every third is a `rough_pair` instead."""
    pairs = [
        rough_pair(seed, index, split) if rough and index % 3 == 2 else drawings.pair(seed, index, split)
        for index in range(count)
    ]
    return pool_of([drawing for pair in pairs for drawing in (pair.winner, pair.loser)])


def rough_pair(seed: int, index: int, split: str) -> drawings.Pair:
    """Two drawings of one caption as bad as an untrained generator's: any defect, many wrong attributes.

    The order says nothing about which is better.
    """
    rng = np.random.default_rng([seed, RATED_PAIRS, index])
    asked = world.random_scene(rng, counts=(1, 2, 2, 2, 3), split=split)
    text = world.caption(asked, int(rng.integers(world.CAPTION_VARIANTS)))
    broad = dict.fromkeys(world.DEFECTS, (1.0, 2.5, 1.0))
    first, second = (
        Drawing(
            text,
            asked,
            world.with_errors(asked, rng, rng.uniform(0, 0.3)),
            drawings.severities(rng, broad),
            int(rng.integers(2**62)),
        )
        for _ in range(2)
    )
    return drawings.Pair(first, second)


def pairwise(scores: np.ndarray, utility: np.ndarray) -> dict[str, Any]:
    """How often a score prefers the better of a pair (rows 2k and 2k + 1), with its 95 % interval (Wilson).

    Pairs of equal utility say nothing and are left out.
    """
    better = utility[0::2] - utility[1::2]
    told = np.sign(scores[0::2] - scores[1::2]) == np.sign(better)
    right, count = int(told[better != 0].sum()), int((better != 0).sum())
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return {
        "accuracy": round(right / count, 4),
        "pairs": count,
        "interval": [round(interval.low, 4), round(interval.high, 4)],
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Four digits, for reports."""
    return {name: round(value, 4) for name, value in values.items()}
