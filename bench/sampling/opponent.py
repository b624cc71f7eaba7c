"""The losers of self-play: what the opponent makes of every prompt that an iteration will see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bench.runtime.seeding import derive
from bench.sampling.sample import Key
from bench.storage import pieces
from bench.storage.integrity import read_array

LATENTS, PAIRS = "latents.npy", "pairs.npy"
SMALLEST_BATCH = 16  # below it a GPU is mostly idle


class Drawn:
    """An opponent's latents `[N, C, h, w]` by the number of the pair, read from disk when asked for.

    Only the pairs that an iteration trains on have any.
    """

    def __init__(self, folder: Path, size: int):
        self.latents = read_array(folder / LATENTS, mmap_mode="r")
        pairs = read_array(folder / PAIRS)
        self.shape = (size, *self.latents.shape[1:])
        self.row = np.full(size, len(pairs))  # for a pair without latents a row that is not there
        self.row[pairs] = np.arange(len(pairs))

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        return self.latents[self.row[chosen]]


def opponent_keys(prompts: Sequence[str], seed: int, iteration: int) -> list[Key]:
    """Seed and prompt of every pair's loser.

    A sample is a function of (prompt, seed), so pairs that share a prompt are given different seeds: the
    pairs that are the first of their prompt one seed, those that are the second another, and so on.
    """
    texts = pd.Series(list(prompts), dtype=object)
    repeats = texts.groupby(texts).cumcount()
    seeds = {int(repeat): derive("opponent", seed, iteration, int(repeat)) for repeat in repeats.unique()}
    return [(seeds[repeat], prompt) for repeat, prompt in zip(repeats.tolist(), texts.tolist(), strict=True)]


def opponent_batches(rows: Sequence[Key], size: int) -> list[list[int]]:
    """Rows in whole batches, each of one seed.

    At the end of every seed is a smaller batch. Those of fewer than 16 are put together where that fills a batch
    at least: of many rows per prompt, as in Pick-a-Pic, most seeds have a few rows only.
    """
    by_seed: dict[int, list[int]] = {}
    for row, (seed, _) in enumerate(rows):
        by_seed.setdefault(seed, []).append(row)
    cut = [[group[row] for row in batch] for group in by_seed.values() for batch in pieces.batches(len(group), size)]
    enough = min(SMALLEST_BATCH, size)
    small = [row for batch in cut if len(batch) < enough for row in batch]
    if len(small) < size:
        return cut
    large = [batch for batch in cut if len(batch) >= enough]
    return large + [[small[row] for row in batch] for batch in pieces.batches(len(small), size)]
