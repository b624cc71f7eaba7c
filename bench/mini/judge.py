"""The judge: a small network that reads every attribute and defect off any image of the drawn world.

What a drawing shows is known exactly; what a generated image shows is read, and readings err. So there are two judges,
of other architecture, seed and drawings: one that rates samples, and a second that is never used in training anything
and says how far the first can be trusted (bench.mini.warrant). How well each reads held-out drawings and their round
trips through the autoencoder is stored beside its weights, in accuracy.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise as pairwise_of
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu

from bench.data import world
from bench.errors import BenchError, first_line
from bench.metrics.base import Images, Metric, check_lengths, find_weights, to_rgb, weights_digest
from bench.metrics.columns import LAST, Column
from bench.runtime.progress import track
from bench.storage.stages import atomic_write

MAX_THINGS = 3
OPTIONS: dict[str, tuple[str, ...]] = {
    "count": tuple(str(count + 1) for count in range(MAX_THINGS)),
    "arrangement": world.ARRANGEMENTS,
    "background": tuple(world.BACKGROUNDS),
    **{
        f"{kind}{slot}": tuple(options)
        for slot in range(MAX_THINGS)
        for kind, options in (("size", world.SIZES), ("colour", world.COLOURS), ("shape", world.SHAPES))
    },
}
"""What the judge tells apart, by attribute (named as in `world.attributes`)."""
SCORES = ("utility", "alignment", "aesthetics", *world.DEFECTS)
PLACE = LAST + 1
"""In the order of columns: what is read of the world stands after what is learned of people's taste."""


# --- networks: what sees, by name; the heads that read are the same for all ---


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def _residual_trunk(hidden: int, widths: Sequence[int] = (32, 48, 96, 128), squeezed: int = 24) -> nn.Sequential:
    """Overlapping 3x3 convolutions with batch norm and ReLU, halved to an 8x8 map; 0.97 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for narrow, wide in pairwise_of(widths):
        layers += [
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            _Residual(wide),
        ]
    # The places of the 8x8 map are kept apart: which object is first, and by how much it is displaced.
    return nn.Sequential(
        *layers, nn.Conv2d(widths[-1], squeezed, 1), nn.Flatten(), nn.Linear(squeezed * 64, hidden), nn.ReLU()
    )


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNext(nn.Module):
    """x + W2 gelu(W1 norm(depthwise 7x7(x))) (Liu et al. 2022)."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(gelu(self.widen(inner))).permute(0, 3, 1, 2)


def _convnext_trunk(
    hidden: int, widths: tuple[int, int] = (48, 96), depths: tuple[int, int] = (2, 4), squeezed: int = 24
) -> nn.Sequential:
    """ConvNeXt on patches of 4x4 pixels, halved once to an 8x8 map; 0.63 million parameters."""
    fine, coarse = widths
    return nn.Sequential(
        nn.Conv2d(3, fine, 4, stride=4),
        _ChannelNorm(fine),
        *(_ConvNext(fine) for _ in range(depths[0])),
        _ChannelNorm(fine),
        nn.Conv2d(fine, coarse, 2, stride=2),
        *(_ConvNext(coarse) for _ in range(depths[1])),
        _ChannelNorm(coarse),
        nn.Conv2d(coarse, squeezed, 1),
        nn.Flatten(),
        nn.Linear(squeezed * 64, hidden),
        nn.GELU(),
    )


TRUNKS = {"residual": (_residual_trunk, 192), "convnext": (_convnext_trunk, 160)}
"""Architectures with the number of their features."""


class JudgeNet(nn.Module):
    """A trunk of TRUNKS and the heads that read its features: [N, 3, 64, 64] in [-1, 1] to logits and severities."""

    def __init__(self, trunk: str = "residual"):
        super().__init__()
        make, features = TRUNKS[trunk]
        self.kind = trunk
        self.trunk = make(features)
        self.attributes = nn.ModuleDict({name: nn.Linear(features, len(options)) for name, options in OPTIONS.items()})
        self.defects = nn.Linear(features, len(world.DEFECTS))

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Returns logits [N, options] by attribute, and severities [N, 5] in [0, 1], all fp32."""
        features = self.trunk(images.contiguous(memory_format=torch.channels_last)).float()
        with torch.autocast(images.device.type, enabled=False):
            logits = {name: head(features) for name, head in self.attributes.items()}
            return logits, self.defects(features).sigmoid()


class Judge(Metric):
    """Reads images and compares what they show with what was asked; of other captions than the world's, BenchError."""

    name = "judge"
    title = "judge"
    columns = (
        *(Column(part, part, order=PLACE + place, truth=True) for place, part in enumerate(SCORES[:3])),
        *(
            Column(part, part, higher_is_better=False, order=PLACE + 3, truth=True, detail=True)
            for part in world.DEFECTS
        ),
    )
    bundled: ClassVar[str] = "judge"

    def __init__(
        self, network: JudgeNet, device: str = "cpu", batch_size: int = 128, accuracy: dict[str, Any] | None = None
    ):
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.device = device
        self.batch_size = batch_size
        self.accuracy = accuracy or {}

    @classmethod
    def load(cls, weights: str | Path = "mini", device: str = "cpu", batch_size: int = 128) -> Judge:
        """Load judge.safetensors from a folder; "mini" is the one that comes with bench."""
        path = Path(find_weights(str(weights), cls.bundled)) / "judge.safetensors"
        if not path.is_file():
            raise BenchError(f"no judge at {path}; `python -m bench.mini` makes one")
        try:
            with safe_open(path, "pt") as file:
                network = JudgeNet((file.metadata() or {}).get("trunk", "residual"))
            network.load_state_dict(
                {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
            )
        except (RuntimeError, KeyError, SafetensorError) as error:
            raise BenchError(f"{path} does not hold a judge: {first_line(error)}") from error
        report = path.with_name("accuracy.json")
        return cls(network, device, batch_size, json.loads(report.read_text()) if report.exists() else None)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write judge.safetensors, its floating-point weights as `dtype`, and accuracy.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                name: (value.to(dtype) if value.is_floating_point() else value).contiguous()
                for name, value in self.network.state_dict().items()
            },
            folder / "judge.safetensors",
            {"trunk": self.network.kind},
        )
        atomic_write(folder / "accuracy.json", json.dumps(self.accuracy, indent=1) + "\n")

    def info(self) -> dict[str, Any]:
        """Which judge this is and how far to trust it; for the protocol."""
        return {
            "version": f"judge of the drawn world, {self.network.kind} network",
            "checkpoint": weights_digest(self.network),
            "scale": "0 to 1",
            "truncates": "nothing",
            "accuracy": self.accuracy,
        }

    @torch.inference_mode()
    def read(self, images: Images) -> dict[str, np.ndarray]:
        """What images show: int64 [N] by attribute (index into OPTIONS), float32 [N] by defect (severity)."""
        logits, severities = [], []
        with track(None, "judging", total=len(images), unit="image") as bar:
            for start in range(0, len(images), self.batch_size):
                batch = to_pixels(images[start : start + self.batch_size]).to(self.device)
                read, defects = self.network(batch)
                logits.append({name: value.argmax(1).cpu() for name, value in read.items()})
                severities.append(defects.cpu())
                bar.update(len(batch))
        attributes = {name: torch.cat([part[name] for part in logits]).numpy() for name in OPTIONS}
        return attributes | dict(zip(world.DEFECTS, torch.cat(severities).numpy().T, strict=True))

    def score(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The quantities of `bench.data.world` as read off the images, by SCORES: float32 [N] each.

        "utility", "alignment" and "aesthetics" (higher is better); each defect's severity (lower is better).
        """
        check_lengths(images, prompts)
        asked = [parse(prompt) for prompt in prompts]
        return rated(self.read(images), asked) if asked else {name: np.empty(0, np.float32) for name in SCORES}


class SecondJudge(Judge):
    """Another network, taught by other drawings, on which nothing was ever trained: whether the first was flattered."""

    name = "judge2"
    title = "second judge"
    columns = tuple(
        replace(column, title=f"{column.title}, second judge", order=column.order + len(SCORES))
        for column in Judge.columns
    )
    bundled = "judge2"


def rated(reading: dict[str, np.ndarray], asked: Sequence[world.Scene]) -> dict[str, np.ndarray]:
    """What a reading is worth where these scenes were asked for, by SCORES: float32 [N] each."""
    alignment = np.array([world.alignment(*pair) for pair in zip(asked, scenes(reading), strict=True)])
    defects = {name: reading[name] for name in world.DEFECTS}
    aesthetics = world.aesthetics(np.stack(list(defects.values()), axis=-1))
    values = {
        "utility": world.utility(alignment, aesthetics),
        "alignment": alignment,
        "aesthetics": aesthetics,
        **defects,
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def scenes(reading: dict[str, np.ndarray]) -> list[world.Scene]:
    """The scenes that a reading describes; objects beyond the counted ones are left out."""
    return [
        _scene({name: options[reading[name][row]] for name, options in OPTIONS.items()})
        for row in range(len(reading["count"]))
    ]


def _scene(shown: dict[str, str]) -> world.Scene:
    count = int(shown["count"])
    things = tuple(
        world.Thing(shown[f"size{slot}"], shown[f"colour{slot}"], shown[f"shape{slot}"]) for slot in range(count)
    )
    return world.Scene(things, "single" if count == 1 else shown["arrangement"], shown["background"])


def parse(prompt: str) -> world.Scene:
    """The scene that a caption asks for; BenchError for any other text."""
    try:
        return world.parse(prompt)
    except ValueError as error:
        raise BenchError(f"the judge knows the drawn world's captions only: {error}") from error


def to_pixels(images: Images) -> Tensor:
    """fp32 [N, 3, 64, 64] in [-1, 1]; images of another size are resized."""
    size = (world.SIZE, world.SIZE)
    if not isinstance(images, np.ndarray) or images.shape[1:3] != size:
        rgb = [to_rgb(image) for image in images]
        images = np.stack([np.asarray(image if image.size == size else image.resize(size)) for image in rgb])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
