"""Images in, one long table out: every score of every image on a row of its own.

Images are scored in blocks of prompts, each by one process. Metrics embed every distinct prompt of a call once, in
batches of their own; a block holds a whole number of all these batches, so its scores are those of a single call.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from bench import registry
from bench.errors import BenchError, UsageError, first_line
from bench.metrics.base import Images, Metric, check_lengths
from bench.metrics.columns import Column
from bench.metrics.sharing import shared
from bench.storage.integrity import expecting
from bench.storage.runs import Result
from bench.storage.stages import atomic_write

BLOCK = 256  # prompts scored in one call: a multiple of what any metric takes at once
CHUNK = 256  # images whose pixels are kept for all metrics: 0.6 MB each and size of image that a metric reads
THREADS = 8  # that decode images
SATURATED = 0.99  # share of an image's values at 0 or 255 above which it shows nothing; the most in 168 samples of the
# miniature is 0.09, at guidance 3
COLUMNS = ("run", "method", "iteration", "step", "prompt_set", "prompt_id", "seed", "guidance", "metric", "value")


@dataclass(frozen=True)
class Scorers:
    """All that scores an image, loaded once: the metrics by name."""

    metrics: Mapping[str, Metric]

    @classmethod
    def load(
        cls, names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None, device: str = "cpu"
    ) -> Scorers:
        """Load the metrics a suite names; `options` holds keyword arguments of `Metric.load` by metric."""
        _expect_device(device)
        chosen = {name: {"device": device, **(options or {}).get(name, {})} for name in names}
        load = {name: registry.metric(name).load for name in names}
        for name in names:  # all of them before the first reads its weights
            _expect_options(name, load[name], chosen[name])
        return cls({name: load[name](**chosen[name]) for name in names})

    @property
    def columns(self) -> list[Column]:
        """What all metrics together give, in their order, by the names in tables."""
        return [column for metric in self.metrics.values() for column in metric.table_columns()]

    def score(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Score image i against prompt i: float32 [N] by column.

        Raises BenchError when a score is not finite: a mean would hide it, or lose the prompt in one model alone.
        """
        check_lengths(images, prompts)
        parts: dict[str, list[np.ndarray]] = {column.name: [np.empty(0, np.float32)] for column in self.columns}
        for start in range(0, len(prompts), CHUNK):
            chunk, asked = images[start : start + CHUNK], prompts[start : start + CHUNK]
            with shared():
                for metric in self.metrics.values():
                    for name, values in metric.table_scores(chunk, asked).items():
                        parts[name].append(values)
        scores = {name: np.concatenate(values) for name, values in parts.items()}
        for name, values in scores.items():
            _expect_finite(name, values, prompts)
        return scores

    def info(self) -> dict[str, dict[str, Any]]:
        """What each metric's numbers depend on, by its name: a hash of it tells two scores apart."""
        return {name: metric.info() for name, metric in self.metrics.items()}

    def protocol(self) -> dict[str, dict[str, Any]]:
        """`info`, and how the numbers are called and read."""
        return {name: {**metric.description(), **metric.info()} for name, metric in self.metrics.items()}


def _expect_options(name: str, load: Callable[..., Metric], chosen: Mapping[str, Any]) -> None:
    """Refuse options that a metric's `load` does not take, or that would fail in the middle of the scoring."""
    try:
        signature(load).bind(**chosen)
    except TypeError as error:
        raise UsageError(f"metric_options.{name}: {error}") from error
    size = chosen.get("batch_size", 1)
    if type(size) is not int or size < 1:
        raise UsageError(f"metric_options.{name}.batch_size: expected an integer of at least 1, got {size!r}")


def _expect_device(device: str) -> None:
    """Refuse a device that is not there before any weights are read."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(f"device {device} cannot be used here: {first_line(error)}") from error


def _expect_finite(name: str, values: np.ndarray, prompts: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise BenchError(
            f"{name}: {len(bad)} of {len(values)} scores are not finite, first {values[bad[0]]} for "
            f"{shorten(prompts[bad[0]], 80)!r}; check the scorer's weights, or leave it out"
        )


def table_rows(
    scores: Mapping[str, np.ndarray], prompt_ids: Sequence[str], seeds: Sequence[int], identity: Mapping[str, Any]
) -> pd.DataFrame:
    """Long rows of scores [P * S] in the sampler's order; `identity` holds the columns equal in all."""
    images = {
        **identity,
        "prompt_id": np.repeat(np.asarray(prompt_ids, dtype=object), len(seeds)),
        "seed": np.tile(np.asarray(seeds, dtype=np.int64), len(prompt_ids)),
    }
    parts = [pd.DataFrame({**images, "metric": name, "value": values}) for name, values in scores.items()]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS))
    return table[list(COLUMNS)]


def blank(images: np.ndarray) -> np.ndarray:
    """Which of uint8 [N, H, W, 3] show nothing, bool [N]: one colour all over, or nearly every value at 0 or 255."""
    return np.array(
        [((image == 0) | (image == 255)).mean() > SATURATED or bool((image == image[0, 0]).all()) for image in images],
        dtype=bool,
    )


def blank_warning(result: str, chosen: Sequence[str], total: int) -> str:
    """One line about the prompts `chosen` whose images show nothing, of so many images in all."""
    return (
        f"{result}: {len(chosen)} of {total} images show nothing (one colour, or over {SATURATED:.0%} of their "
        f"values at 0 or 255), the first for {shorten(chosen[0], 80)!r}"
    )


def image_folder(run_folder: Path, prompt_set: str, guidance: float, result: Result) -> Path:
    """Where a run keeps the samples of one model: images/<prompt_set>/g<guidance>/iter<iteration>, or its like."""
    return Path(run_folder) / "images" / prompt_set / f"g{guidance:g}" / result.name


def image_paths(folder: Path, prompt_ids: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """`<prompt_id>-<seed>.png` for every image, in the sampler's order."""
    return [Path(folder) / f"{prompt_id}-{seed}.png" for prompt_id in prompt_ids for seed in seeds]


def write_images(paths: Sequence[Path], images: np.ndarray) -> None:
    """Write uint8 [N, H, W, 3] as PNG files."""
    for path, image in zip(paths, images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="png", compress_level=1)
        atomic_write(path, buffer.getvalue())


def read_images(paths: Sequence[Path]) -> np.ndarray:
    """Read back what `write_images` wrote: uint8 [N, H, W, 3]."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise BenchError(f"{len(missing)} of {len(paths)} images are missing, first {missing[0]}")
    with ThreadPoolExecutor(THREADS) as pool:
        return np.stack(list(pool.map(_read_png, paths)))


def _read_png(path: Path) -> np.ndarray:
    with expecting(path), Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
