"""Prompt sets: the drawn world's splits, published sets, or a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from bench.data import world
from bench.data.tables import read_column, read_table
from bench.errors import BenchError, UsageError, did_you_mean, first_line

# name -> (number of prompts, stream of randomness, numbers of objects, split)
WORLD_SETS = {
    "train": (2000, 11, (1, 2, 2, 2), "train"),
    "validation": (250, 12, (1, 2, 2, 2), "validation"),
    "test": (500, 13, (1, 2, 2, 2), "test"),
    "hard": (250, 14, (3,), None),
}


class Published(NamedTuple):
    """Files of a data set on the hub whose prompts, one file after the other, are a benchmark."""

    repository: str
    files: tuple[str, ...]
    remark: str


PUBLISHED = {
    "partiprompts": Published("nateraw/parti-prompts", ("PartiPrompts.tsv",), "1632 prompts of PartiPrompts"),
    "hpsv2": Published(
        "zhwang/HPDv2",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        "3200 prompts of the HPS v2 benchmark, 800 a style",
    ),
}


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
    """Load a prompt set; `limit` keeps the first prompts.

    spec: "world:test" and its like, "partiprompts", "hpsv2", "pickapic:SOURCE#SPLIT" (a folder of shards or a
    hub data set), or a txt, csv, tsv, jsonl, json or parquet file with a column prompt, Prompt, caption or text.
    """
    kind, _, rest = spec.partition(":")
    if kind == "world":
        prompts = _world_prompts(rest)
    elif kind == "pickapic":
        from bench.data.pickapic import captions

        prompts = _checked(captions(rest), spec)
    elif kind in PUBLISHED:
        prompts = [prompt for path in _published(kind, rest) for prompt in _file_prompts(path)]
    else:
        prompts = _file_prompts(Path(spec).expanduser())
    return PromptSet(spec, tuple(prompts[:limit]))


def _world_prompts(name: str) -> list[str]:
    if name not in WORLD_SETS:
        raise UsageError(
            f"the drawn world has no prompt set '{name}'{did_you_mean(name, WORLD_SETS)}; "
            f"it has {', '.join(WORLD_SETS)}"
        )
    count, stream, counts, split = WORLD_SETS[name]
    rng = np.random.default_rng([2024, stream])
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = world.random_scene(rng, counts, split)
        prompts[world.caption(scene, int(rng.integers(world.CAPTION_VARIANTS)))] = None
    return list(prompts)


def _published(name: str, folder: str) -> list[Path]:
    """The files of a published prompt set, in a folder if one is given, else from the hub (kept by its client)."""
    published = PUBLISHED[name]
    if folder:
        return [Path(folder).expanduser() / PurePosixPath(file).name for file in published.files]
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(published.repository, file, repo_type="dataset")) for file in published.files]
    except Exception as error:  # the client raises errors of several libraries
        cause = first_line(error)
        names = ", ".join(PurePosixPath(file).name for file in published.files)
        raise BenchError(
            f"{name}: {published.repository} cannot be read from the hub: {cause} (with {names} in a "
            f"folder: {name}:FOLDER)"
        ) from error


def _file_prompts(path: Path) -> list[str]:
    return _checked(read_column(path, read_table(path)), str(path))


def _checked(prompts: list[str], source: str) -> list[str]:
    empty = sum(not prompt for prompt in prompts)
    if empty == len(prompts):
        raise BenchError(f"{source}: no prompts in it")
    if empty:
        raise BenchError(f"{source}: {empty} empty prompt(s), first in row {prompts.index('') + 1}")
    return prompts
