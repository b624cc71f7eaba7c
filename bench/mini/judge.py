"""The exact judge: a small network that reads every attribute and defect off any image of the drawn world.

It is the miniature's ground truth for generated images, as a drawing's own labels are for drawn ones, and not
one metric among the others. How well it reads held-out drawings and their round trips through the autoencoder
is stored beside its weights, in accuracy.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise as pairwise_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.data import drawings, world
from bench.data.drawings import Drawing
from bench.errors import BenchError, first_line
from bench.mini import MINI_WEIGHTS
from bench.mini.fit import fit
from bench.mini.pools import Pool, RoundTrip, pair_pool, pairwise, rendered, rounded
from bench.progress import track
from bench.stages import atomic_write
from metrics.base import Images, check_lengths, to_rgb, weights_digest

MAX_THINGS = 3
OPTIONS: dict[str, tuple[str, ...]] = {
    "count": tuple(str(count + 1) for count in range(MAX_THINGS)),
    "arrangement": world.ARRANGEMENTS,
    "background": tuple(world.BACKGROUNDS),
    **{f"{kind}{slot}": tuple(options) for slot in range(MAX_THINGS)
       for kind, options in (("size", world.SIZES), ("colour", world.COLOURS), ("shape", world.SHAPES))},
}
"""What the judge tells apart, by attribute (named as in `world.attributes`)."""
ABSENT = -100  # the label of an attribute that the drawing does not have; cross entropy skips it
DEFECT_LOSS_WEIGHT = 20.0  # brings the squared errors of the severities to the scale of the cross entropies


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                                  nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
                                  nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class JudgeNet(nn.Module):
    """A residual CNN of about a million parameters: [N, 3, 64, 64] in [-1, 1] to logits and severities."""

    def __init__(self, widths: Sequence[int] = (32, 48, 96, 128), squeezed: int = 24, hidden: int = 192):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
                                   nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for narrow, wide in pairwise_of(widths):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide),
                       nn.ReLU(), _Residual(wide)]
        # The places of the 8x8 map are kept apart: which object is first, and by how much it is displaced.
        layers += [nn.Conv2d(widths[-1], squeezed, 1), nn.Flatten(),
                   nn.Linear(squeezed * 64, hidden), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.attributes = nn.ModuleDict({name: nn.Linear(hidden, len(options))
                                         for name, options in OPTIONS.items()})
        self.defects = nn.Linear(hidden, len(world.DEFECTS))

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Returns logits [N, options] by attribute, and severities [N, 5] in [0, 1], all fp32."""
        features = self.trunk(images.contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast(images.device.type, enabled=False):
            logits = {name: head(features) for name, head in self.attributes.items()}
            return logits, self.defects(features).sigmoid()


class Judge:
    """Reads images and compares what they show with what was asked."""

    def __init__(self, network: JudgeNet, device: str = "cpu", batch_size: int = 128,
                 accuracy: dict[str, Any] | None = None):
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device = device
        self.batch_size = batch_size
        self.accuracy = accuracy or {}

    @classmethod
    def load(cls, folder: str | Path = "mini", device: str = "cpu") -> Judge:
        """Load judge.safetensors from a folder; "mini" is the bundled one."""
        folder = MINI_WEIGHTS / "judge" if folder == "mini" else Path(folder)
        path = folder / "judge.safetensors"
        if not path.is_file():
            raise BenchError(f"no judge at {path}; build it with `python -m bench.mini`")
        network = JudgeNet()
        try:
            network.load_state_dict({name: value.float() if value.is_floating_point() else value
                                     for name, value in load_file(path).items()})
        except RuntimeError as error:
            raise BenchError(f"{path} does not hold a judge: {first_line(error)}") from error
        report = folder / "accuracy.json"
        return cls(network, device, accuracy=json.loads(report.read_text()) if report.exists() else None)

    def save(self, folder: Path) -> None:
        """Write judge.safetensors and accuracy.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.network.state_dict().items()},
                  folder / "judge.safetensors")
        atomic_write(folder / "accuracy.json", json.dumps(self.accuracy, indent=1) + "\n")

    def info(self) -> dict[str, Any]:
        """Which judge this is and how far to trust it; for the protocol."""
        return {"version": "exact judge of the drawn world", "checkpoint": weights_digest(self.network),
                "scale": "0 to 1", "accuracy": self.accuracy}

    @torch.inference_mode()
    def read(self, images: Images) -> dict[str, np.ndarray]:
        """What images show: int64 [N] by attribute (index into OPTIONS), float32 [N] by defect (severity)."""
        logits, severities = [], []
        with track(None, "judging", total=len(images), unit="image") as bar:
            for start in range(0, len(images), self.batch_size):
                batch = _pixels(images[start:start + self.batch_size]).to(self.device)
                read, defects = self.network(batch)
                logits.append({name: value.argmax(1).cpu() for name, value in read.items()})
                severities.append(defects.cpu())
                bar.update(len(batch))
        attributes = {name: torch.cat([part[name] for part in logits]).numpy() for name in OPTIONS}
        return attributes | dict(zip(world.DEFECTS, torch.cat(severities).numpy().T, strict=True))

    def score(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The exact quantities of `bench.data.world` as read off the images: float32 [N] each.

        "utility", "alignment" and "aesthetics" (higher is better); each defect's severity (lower is better).
        """
        check_lengths(images, prompts)
        asked = [_parse(prompt) for prompt in prompts]
        if not asked:
            return {name: np.empty(0, np.float32)
                    for name in ("utility", "alignment", "aesthetics", *world.DEFECTS)}
        reading = self.read(images)
        alignment = np.array([world.alignment(*pair) for pair in zip(asked, scenes(reading), strict=True)])
        defects = {name: reading[name] for name in world.DEFECTS}
        aesthetics = world.aesthetics(np.stack(list(defects.values()), axis=-1))
        values = {"utility": world.utility(alignment, aesthetics), "alignment": alignment,
                  "aesthetics": aesthetics, **defects}
        return {name: value.astype(np.float32) for name, value in values.items()}


def scenes(reading: dict[str, np.ndarray]) -> list[world.Scene]:
    """The scenes that a reading describes; objects beyond the counted ones are left out."""
    return [_scene({name: options[reading[name][row]] for name, options in OPTIONS.items()})
            for row in range(len(reading["count"]))]


def _scene(shown: dict[str, str]) -> world.Scene:
    count = int(shown["count"])
    things = tuple(world.Thing(shown[f"size{slot}"], shown[f"colour{slot}"], shown[f"shape{slot}"])
                   for slot in range(count))
    return world.Scene(things, "single" if count == 1 else shown["arrangement"], shown["background"])


def _parse(prompt: str) -> world.Scene:
    try:
        return world.parse(prompt)
    except ValueError as error:
        raise BenchError(f"the exact judge knows the drawn world's captions only: {error}") from error


def _pixels(images: Images) -> Tensor:
    """fp32 [N, 3, 64, 64] in [-1, 1]; images of another size are resized."""
    size = (world.SIZE, world.SIZE)
    if not isinstance(images, np.ndarray) or images.shape[1:3] != size:
        rgb = [to_rgb(image) for image in images]
        images = np.stack([np.asarray(image if image.size == size else image.resize(size)) for image in rgb])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# --- training ---

def train_judge(folder: Path, checkpoint: Path, *, seed: int = 0, steps: int = 6000, batch_size: int = 96,
                lr: float = 2e-3, pool: int = 30_000, held_out: int = 2000,
                roundtrip: RoundTrip | None = None, device: str = "cpu") -> Judge:
    """Train on labelled drawings and round trips of half of them; save to `folder` with the accuracy.

    A killed training goes on from `checkpoint`.
    """
    torch.manual_seed(seed)
    network = JudgeNet().to(device, memory_format=torch.channels_last)
    items = [drawings.labelled(seed, index) for index in range(pool)]
    images = rendered(items)
    if roundtrip is not None:
        items = items + items[:pool // 2]
        images = np.concatenate([images, roundtrip(images[:pool // 2])])
    attributes, defects = targets(items)

    def loss(step: int) -> Tensor:
        picks = np.random.default_rng([seed, step]).integers(len(images), size=batch_size)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits, severities = network(_pixels(images[picks]).to(device))
        total = DEFECT_LOSS_WEIGHT * (severities - defects[picks].to(device)).square().mean()
        for name, values in logits.items():
            wanted = attributes[name][picks].to(device)
            # Not reduction="mean": it is undefined for a batch without a label (third objects are rare).
            labels = (wanted != ABSENT).sum().clamp(min=1)
            total = total + cross_entropy(values, wanted, reduction="sum") / labels
        return total

    network = fit(network, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="judge", ema=0.995)
    judge = Judge(network, device)
    judge.accuracy = measure(judge, seed + 1, held_out, roundtrip)
    judge.save(folder)
    return judge


def targets(items: Sequence[Drawing]) -> tuple[dict[str, Tensor], Tensor]:
    """Labels of drawings: int64 [N] by attribute (ABSENT where there is none), and severities fp32 [N, 5]."""
    named = [world.attributes(item.drawn) | {"arrangement": item.drawn.arrangement} for item in items]
    attributes = {name: torch.tensor([options.index(row[name]) if name in row else ABSENT for row in named])
                  for name, options in OPTIONS.items()}
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
    right = {name: float((reading[name] == wanted)[wanted != ABSENT].mean())
             for name, wanted in ((name, value.numpy()) for name, value in attributes.items())
             if (wanted != ABSENT).any()}
    explained = {name: float(1 - np.mean((reading[name] - true) ** 2) / np.var(true))
                 for name, true in zip(world.DEFECTS, defects.numpy().T, strict=True)}
    aligned = [world.alignment(item.drawn, seen) for item, seen in zip(items, scenes(reading), strict=True)]
    return {"attributes": rounded(right), "defects_r2": rounded(explained),
            "all_attributes": round(float(np.mean(aligned)), 4),
            "pairwise": pairwise(judge.score(pairs.images, pairs.captions)["utility"], pairs.utility)}
