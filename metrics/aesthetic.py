"""LAION's aesthetic predictor V2: an MLP on a normalised CLIP image embedding (Schuhmann 2022)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.errors import BenchError, first_line
from bench.metrics.base import Images, Metric, check_lengths, checkpoint_digest, find_weights
from bench.metrics.clip_family import OPEN_CLIP, ClipBackbone
from bench.metrics.columns import Column
from bench.metrics.open_clip_format import VIT_L_14

BACKBONE = "openai/clip-vit-large-patch14"
"""The encoder on whose embeddings the released heads were trained."""
SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
DROPOUT_AFTER = (0.2, 0.2, 0.1)
"""Dropout after the first three layers: it has no parameters, but it takes the places 1, 3 and 5."""


class Aesthetic(Metric):
    """Predicted rating of the picture alone, about 1 to 10; the prompt is not read."""

    name = "aesthetic"
    title = "Aesthetic"
    reads = "image"
    columns = (Column(name, title, order=4, averaged=True),)
    version: ClassVar[str] = "LAION aesthetic predictor V2 (MLP)"
    file: ClassVar[str] = "sac+logos+ava1-l14-linearMSE.pth"
    bundled: ClassVar[str] = "aesthetic/head.safetensors"
    source: ClassVar[str] = SOURCE

    def __init__(self, backbone: ClipBackbone, head: nn.Module, head_name: str, batch_size: int = 64):
        self.backbone = backbone
        self.head = head.eval().requires_grad_(False).to(backbone.device)
        self.checkpoint = f"{head_name} on {backbone.checkpoint}"
        self.batch_size = batch_size

    @classmethod
    def load(
        cls, weights: str = "mini", device: str = "cpu", batch_size: int = 64, backbone: str | None = None
    ) -> Aesthetic:
        """Load a head (`.pth` or `.safetensors` in LAION's layout) and the CLIP it belongs to.

        backbone: the CLIP checkpoint; by default the miniature's for "mini", else OpenAI's ViT-L/14.
        """
        try:
            source = Path(find_weights(cls.file if weights == "official" else weights, cls.bundled))
        except BenchError as error:
            raise BenchError(f"{error}; {cls.file} is at {cls.source}") from None
        head = cls.build(read_state(source))
        encoder = backbone or ("mini" if weights == "mini" else BACKBONE)
        clip = ClipBackbone.load(encoder, "clip", device, BACKBONE, OPEN_CLIP, architecture=VIT_L_14)
        expected, given = head[0].in_features, clip.model.config.projection_dim
        if expected != given:
            raise BenchError(
                f"the aesthetic head '{weights}' reads embeddings of {expected} numbers, "
                f"but the CLIP '{encoder}' makes {given}"
            )
        name = weights if weights == "mini" else source.name
        return cls(clip, head, f"{name} ({checkpoint_digest(source)})", batch_size)

    @torch.inference_mode()
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        check_lengths(images, prompts)
        embeddings = self.backbone.embed_images(images, self.batch_size)
        return self.head(embeddings.to(self.backbone.device)).squeeze(1).float().cpu().numpy()

    def info(self) -> dict[str, str]:
        return {
            "version": self.version,
            "checkpoint": self.checkpoint,
            "scale": "predicted rating, about 1 to 10",
            "preprocessing": self.backbone.pixels.describe(),
            "truncates": "nothing (the prompt is not read)",
            "precision": self.backbone.describe_precision(),
        }

    @staticmethod
    def build(state: dict[str, Tensor]) -> nn.Sequential:
        """The head that a state dict describes."""
        return build_head(state)


class AestheticV1(Aesthetic):
    """LAION's first predictor: one linear layer on the same embeddings. Papers confuse it with V2."""

    name = "aesthetic_v1"
    title = "Aesthetic V1"
    version = "LAION aesthetic predictor V1 (linear)"
    file = "sa_0_4_vit_l_14_linear.pth"
    bundled = "aesthetic_v1/head.safetensors"
    source = "https://github.com/LAION-AI/aesthetic-predictor"

    @staticmethod
    def build(state: dict[str, Tensor]) -> nn.Sequential:
        weight, bias = state.get("weight"), state.get("bias")
        if set(state) != {"weight", "bias"} or weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
            found = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:3])
            raise BenchError(f"not the linear aesthetic head: expected weight [1, D] and bias [1], found {found}")
        return build_head({"layers.0.weight": weight, "layers.0.bias": bias})


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running any code in the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The released file was saved from a GPU, so the place of its tensors has to be overridden.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = first_line(error)
        raise BenchError(f"cannot read the aesthetic head {path}: {cause}") from error


def head_layers(sizes: Sequence[int]) -> nn.Sequential:
    """LAION's MLP: linear layers and dropout, no activations. sizes: e.g. (768, 1024, 128, 64, 16, 1)."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        if index < len(DROPOUT_AFTER):
            layers.append(nn.Dropout(DROPOUT_AFTER[index]))
    return nn.Sequential(*layers)


def build_head(state: dict[str, Tensor]) -> nn.Sequential:
    """The filled MLP that a state dict with keys `layers.<i>.weight` and `layers.<i>.bias` describes."""
    sizes = head_sizes(state)
    head = head_layers(sizes)
    try:
        head.load_state_dict({key.removeprefix("layers."): value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise BenchError(_not_a_head(state)) from error
    if sizes[-1] != 1:
        raise BenchError(_not_a_head(state))
    return head


def head_sizes(state: dict[str, Tensor]) -> list[int]:
    """Width of the input and of every layer of such a state dict; [0] when it has no layers."""
    weights = {
        int(match[1]): value
        for key, value in state.items()
        if (match := re.fullmatch(r"layers\.(\d+)\.weight", key)) and value.ndim == 2
    }
    order = [weights[index] for index in sorted(weights)]
    return [order[0].shape[1], *(weight.shape[0] for weight in order)] if order else [0]


def _not_a_head(state: dict[str, Tensor]) -> str:
    found = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:3])
    return f"not an aesthetic head: expected layers.<i>.weight and .bias down to one output, found {found}"
