"""`bench perf score`: images per second of every scorer in batches, beside one image at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from bench.data import PreferenceData
from bench.metrics.base import Metric
from bench.perf import compared, interleave, protocol
from bench.scoring.evaluate import Scorers

SEED = 1


@dataclass(frozen=True)
class Setting:
    metrics: tuple[str, ...]
    options: Mapping[str, Mapping[str, Any]]  # keyword arguments of each metric's load
    images: int = 200
    repeats: int = 5
    device: str = "cpu"


def measure(setting: Setting) -> dict[str, Any]:
    """A row for each scorer, and one for all of them together, where equal encoders run once an image."""
    device = torch.device(setting.device)
    scorers = Scorers.load(setting.metrics, options=setting.options, device=setting.device)
    drawn = PreferenceData(setting.images, SEED)
    images = [Image.fromarray(image) for image in drawn.winners(range(setting.images))]
    groups = {name: {name: metric} for name, metric in scorers.metrics.items()}
    if len(groups) > 1:
        groups[f"all {len(groups)}"] = dict(scorers.metrics)
    rows = [
        {"scorer": label, **_measure(group, images, drawn.prompts, setting, device, label)}
        for label, group in groups.items()
    ]
    return {
        "protocol": protocol(
            device,
            command="bench perf score",
            images=setting.images,
            image_size=list(images[0].size),
            distinct_prompts=len(set(drawn.prompts)),
            repeats=setting.repeats,
            metrics=scorers.info(),
            ours="all images at once: batches, equal encoders shared, each prompt embedded once",
            baseline="image after image with its prompt through each scorer, the models loaded once "
            "(the hpsv2 package loads its model for every call: that is not counted)",
            unit="decoded images per second",
            ratios="turn by turn, interleaved; median, smallest and largest",
        ),
        "rows": rows,
    }


def _measure(
    metrics: Mapping[str, Metric],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    setting: Setting,
    device: torch.device,
    label: str,
) -> dict[str, Any]:
    together = Scorers(metrics)

    def batched() -> float:
        together.score(images, prompts)
        return len(images)

    def one_at_a_time() -> float:
        for image, prompt in zip(images, prompts, strict=True):
            for metric in metrics.values():
                metric.score([image], [prompt])
        return len(images)

    rates = interleave({"ours": batched, "baseline": one_at_a_time}, setting.repeats, device, f"scoring, {label}")
    return compared(rates, "ours", "baseline", "images_per_s")
