"""Prompt sets: the drawn world's splits, or a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bench.data import world
from bench.errors import BenchError, UsageError, did_you_mean

# name -> (number of prompts, stream of randomness, numbers of objects, split)
WORLD_SETS = {"train": (2000, 11, (1, 2, 2, 2), "train"), "validation": (250, 12, (1, 2, 2, 2), "validation"),
              "test": (500, 13, (1, 2, 2, 2), "test"), "hard": (250, 14, (3,), None)}


@dataclass(frozen=True)
class PromptSet:
    """Prompts with ids that depend on the text alone, so that two files with the same prompts can be paired."""

    name: str
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """sha1 of the text, 12 digits; a repeated prompt gets "-2", "-3", ..."""
        seen: dict[str, int] = {}
        out = []
        for prompt in self.prompts:
            digest = hashlib.sha1(prompt.encode()).hexdigest()[:12]
            seen[digest] = seen.get(digest, 0) + 1
            out.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
        return tuple(out)


def load_prompts(spec: str, limit: int | None = None) -> PromptSet:
    """Load "world:train|validation|test|hard" or a txt/csv/jsonl/parquet file; `limit` keeps the first prompts."""
    prompts = _world_prompts(spec.removeprefix("world:")) if spec.startswith("world:") else _file_prompts(Path(spec))
    return PromptSet(spec, tuple(prompts[:limit]))


def _world_prompts(name: str) -> list[str]:
    if name not in WORLD_SETS:
        raise UsageError(f"the drawn world has no prompt set '{name}'{did_you_mean(name, WORLD_SETS)}; "
                         f"it has {', '.join(WORLD_SETS)}")
    count, stream, counts, split = WORLD_SETS[name]
    rng = np.random.default_rng([2024, stream])
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = world.random_scene(rng, counts, split)
        prompts[world.caption(scene, int(rng.integers(world.CAPTION_VARIANTS)))] = None
    return list(prompts)


def _file_prompts(path: Path) -> list[str]:
    import pandas as pd  # only here: listing commands start without it

    if not path.is_file():
        raise BenchError(f"prompts file not found: {path}")
    if path.suffix == ".txt":
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        readers = {".csv": pd.read_csv, ".jsonl": lambda p: pd.read_json(p, lines=True), ".parquet": pd.read_parquet}
        if path.suffix not in readers:
            raise UsageError(f"{path}: prompts are read from .txt, .csv, .jsonl or .parquet files")
        frame = readers[path.suffix](path)
        if "prompt" not in frame:
            raise BenchError(f"{path}: no column 'prompt'; found {', '.join(map(str, frame.columns))}")
        prompts = frame["prompt"].fillna("").astype(str).str.strip().tolist()
    empty = sum(not prompt for prompt in prompts)
    if empty == len(prompts):
        raise BenchError(f"{path}: no prompts in it")
    if empty:
        raise BenchError(f"{path}: {empty} empty prompt(s), first in row {prompts.index('') + 1}")
    return prompts
