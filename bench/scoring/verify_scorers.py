"""Whether our scorers, with the real weights, give the scores that their authors published for pictures of theirs.

The pictures are not ours to ship: they are looked for in a folder, and taken only when they are the published ones,
byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from bench import registry
from bench.errors import BenchError
from bench.metrics import official
from bench.metrics.base import Metric
from bench.scoring.named import named
from bench.storage.integrity import sha256

FILE = Path(__file__).with_name("examples.json")


@dataclass(frozen=True)
class Verdict:
    """What a scorer's published example shows of it. said: one line, with the checkpoint where it was loaded."""

    metric: str
    state: Literal["equal", "differs", "missing"]
    said: str
    source: str
    difference: float | None = None
    tolerance: float | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


@lru_cache
def examples() -> tuple[dict[str, Any], ...]:
    """metric, prompt, images (file, score, sha256), tolerance with its reason, source, and where the pictures are."""
    return tuple(json.loads(FILE.read_text(encoding="utf-8")))


def without_example() -> list[str]:
    """The published scorers for which no published score of a published picture is known."""
    known = {example["metric"] for example in examples()}
    return [name for name in official.FILES if name not in known]


def verify(folder: Path | None, device: str = "cpu") -> Iterator[Verdict]:
    """Score each published example with the published weights, as far as both are on this machine; loads nothing else.

    folder: where the examples' pictures are.
    """
    for example in examples():
        kind = registry.metric(example["metric"])
        lacking = [*_weights(kind), *_pictures(example, folder)]
        if lacking:
            yield Verdict(example["metric"], "missing", f"not verified: {'; '.join(lacking)}", example["source"])
            continue
        try:
            yield _compared(example, kind, folder, device)
        except BenchError as error:  # damaged weights of one scorer do not hide what the others give
            yield Verdict(example["metric"], "missing", f"not verified: {error}", example["source"])


def _weights(kind: type[Metric]) -> Iterator[str]:
    lost = [item for item in official.needed(kind, "official") if item.path is None]
    if lost:
        files = ", ".join(f"{item.name} ({item.published.size}, of {item.published.repository})" for item in lost)
        yield f"weights missing, looked for in BENCH_WEIGHTS and the hub's cache: {files}"


def _pictures(example: Mapping[str, Any], folder: Path | None) -> Iterator[str]:
    where = example["pictures"]
    if folder is None:
        yield f"pictures missing: name a folder of {where} with --examples"
        return
    lost = [image["file"] for image in example["images"] if not (folder / image["file"]).is_file()]
    if lost:
        yield f"pictures missing in {folder}: {', '.join(lost)} of {where}"
    for image in example["images"]:
        path = folder / image["file"]
        if path.is_file() and sha256(path) != image["sha256"]:
            yield f"{path} is another picture than the published one (its sha256 differs)"


def _compared(example: Mapping[str, Any], kind: type[Metric], folder: Path, device: str) -> Verdict:
    metric = kind.load(weights="official", device=device)
    pictures = [Image.open(folder / image["file"]) for image in example["images"]]
    scores = metric.table_scores(pictures, [example["prompt"]] * len(pictures))[example["metric"]]
    gaps = np.abs(scores.astype(np.float64) - [image["score"] for image in example["images"]])
    worst, tolerance = int(gaps.argmax()), example["tolerance"]
    equal = bool(gaps[worst] <= tolerance)  # a score that is not a number is no equal one
    found = f"{scores[worst]:.4f} where {example['images'][worst]['score']:.4f} was published"
    said = (
        f"equal: {len(pictures)} pictures, at most {gaps[worst]:.2g} apart (tolerance {tolerance:g})"
        if equal
        else f"differs by {gaps[worst]:.2g} (tolerance {tolerance:g}: {example['because']}): "
        f"{example['images'][worst]['file']} has {found}"
    )
    title = named(kind.title, metric.info())
    return Verdict(
        example["metric"],
        "equal" if equal else "differs",
        f"{title} {said}",
        example["source"],
        float(gaps[worst]),
        tolerance,
    )


def as_text(verdicts: list[Verdict]) -> str:
    """One line a scorer, with the source of what it was compared with."""
    lines = [f"{one.metric}: {one.said}; published: {one.source}" for one in verdicts]
    return "\n".join([*lines, f"{', '.join(without_example())}: no published score of a published picture is known"])
