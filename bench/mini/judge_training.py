"""Teaching a judge to read: drawings with known labels, and what the autoencoder makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.data import drawings, world
from bench.data.drawings import Drawing
from bench.mini.fit import fit
from bench.mini.judge import OPTIONS, Judge, JudgeNet, scenes, to_pixels
from bench.mini.pools import Pool, RoundTrip, pair_pool, pairwise, rendered, rounded

ABSENT = -100  # the label of an attribute that the drawing does not have; cross entropy skips it
DEFECT_LOSS_WEIGHT = 20.0  # brings the squared errors of the severities to the scale of the cross entropies


def train_judge(
    folder: Path,
    checkpoint: Path,
    *,
    seed: int = 0,
    steps: int = 6000,
    batch_size: int = 96,
    lr: float = 2e-3,
    pool: int = 30_000,
    held_out: int = 2000,
    trunk: str = "residual",
    half: bool = False,
    measured_on: int | None = None,
    roundtrip: RoundTrip | None = None,
    device: str = "cpu",
) -> Judge:
    """Train on the labelled drawings of `seed` and round trips of half of them; save to `folder` with the accuracy.

    trunk: of TRUNKS. half: round the trained weights to half precision, and store them so. measured_on: seed of the
    drawings that the accuracy is measured on (default: the next). A killed training goes on from `checkpoint`.
    """
    torch.manual_seed(seed)
    network = JudgeNet(trunk).to(device, memory_format=torch.channels_last)
    items = [drawings.labelled(seed, index) for index in range(pool)]
    images = rendered(items)
    if roundtrip is not None:
        items = items + items[: pool // 2]
        images = np.concatenate([images, roundtrip(images[: pool // 2])])
    attributes, defects = targets(items)

    def loss(step: int) -> Tensor:
        picks = np.random.default_rng([seed, step]).integers(len(images), size=batch_size)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits, severities = network(to_pixels(images[picks]).to(device))
        total = DEFECT_LOSS_WEIGHT * (severities - defects[picks].to(device)).square().mean()
        for name, values in logits.items():
            wanted = attributes[name][picks].to(device)
            # Not reduction="mean": it is undefined for a batch without a label (third objects are rare).
            labels = (wanted != ABSENT).sum().clamp(min=1)
            total = total + cross_entropy(values, wanted, reduction="sum") / labels
        return total

    network = fit(network, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="judge", ema=0.995)
    judge = Judge(network.half().float() if half else network, device)
    judge.accuracy = measure(judge, seed + 1 if measured_on is None else measured_on, held_out, roundtrip)
    judge.save(folder, torch.float16 if half else torch.float32)
    return judge


def targets(items: Sequence[Drawing]) -> tuple[dict[str, Tensor], Tensor]:
    """Labels of drawings: int64 [N] by attribute (ABSENT where there is none), and severities fp32 [N, 5]."""
    named = [world.attributes(item.drawn) | {"arrangement": item.drawn.arrangement} for item in items]
    attributes = {
        name: torch.tensor([options.index(row[name]) if name in row else ABSENT for row in named])
        for name, options in OPTIONS.items()
    }
    return attributes, torch.tensor([item.defects for item in items])


def measure(judge: Judge, seed: int, count: int, roundtrip: RoundTrip | None = None) -> dict[str, Any]:
    """How well the judge reads `count` held-out drawings, and their round trips through the autoencoder.

    By source: share of right readings by attribute, R^2 by defect, and how often the better of two held-out
    preference drawings gets the higher utility.
    """
    items = [drawings.labelled(seed, index) for index in range(count)]
    images, pairs = rendered(items), pair_pool(seed, count // 2, "validation")
    report = {"drawings": _accuracy(judge, items, images, pairs)}
    if roundtrip is not None:
        report["round_trips"] = _accuracy(judge, items, roundtrip(images), pairs.round_tripped(roundtrip))
    return report


def _accuracy(judge: Judge, items: Sequence[Drawing], images: np.ndarray, pairs: Pool) -> dict[str, Any]:
    reading = judge.read(images)
    attributes, defects = targets(items)
    right = {
        name: float((reading[name] == wanted)[wanted != ABSENT].mean())
        for name, wanted in ((name, value.numpy()) for name, value in attributes.items())
        if (wanted != ABSENT).any()
    }
    explained = {
        name: float(1 - np.mean((reading[name] - true) ** 2) / np.var(true))
        for name, true in zip(world.DEFECTS, defects.numpy().T, strict=True)
    }
    aligned = [world.alignment(item.drawn, seen) for item, seen in zip(items, scenes(reading), strict=True)]
    return {
        "attributes": rounded(right),
        "defects_r2": rounded(explained),
        "all_attributes": round(float(np.mean(aligned)), 4),
        "pairwise": pairwise(judge.score(pairs.images, pairs.captions)["utility"], pairs.utility),
    }
