"""CLIP score: how well an image matches its prompt in a CLIP's joint embedding (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metrics.base import Images, Metric, check_lengths
from metrics.clip_family import ClipBackbone


class CLIPScore(Metric):
    """The plain cosine of image and prompt: neither clipped at 0 nor multiplied by 2.5 or 100.

    Published tables mostly use `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, some `openai/clip-vit-large-patch14`;
    their numbers are not comparable, so the checkpoint is part of the protocol.
    """

    name = "clip"
    title = "CLIP"

    def __init__(self, backbone: ClipBackbone, batch_size: int = 32):
        self.backbone = backbone
        self.batch_size = batch_size

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32) -> CLIPScore:
        return cls(ClipBackbone.load(weights, "clip", device), batch_size)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        check_lengths(images, prompts)
        return self.backbone.cosine(images, prompts, self.batch_size).numpy()

    def info(self) -> dict[str, str]:
        return {
            "version": "CLIP cosine",
            "checkpoint": self.backbone.checkpoint,
            "scale": "cosine, -1 to 1",
            "preprocessing": self.backbone.describe_preprocessing(),
            "truncates": self.backbone.describe_truncation(),
        }
