"""CLIP score: how well an image matches its prompt in a CLIP's joint embedding (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from metrics.base import Images, Metric, Published, check_lengths
from metrics.clip_family import H14_REPOSITORY, OPEN_CLIP, ClipBackbone
from metrics.open_clip_format import VIT_H_14, VIT_L_14


class CLIPScore(Metric):
    """The plain cosine of image and prompt: neither clipped at 0 nor multiplied by 2.5 or 100.

    Published tables mostly use `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, some `openai/clip-vit-large-patch14`;
    their numbers are not comparable, so the checkpoint is part of the protocol.
    """

    name = "clip"
    title = "CLIP"
    published = Published(H14_REPOSITORY, None, "3.9 GB")
    architecture: ClassVar[dict] = VIT_H_14
    """Of a checkpoint in open_clip's own format that comes without its configuration."""

    def __init__(self, backbone: ClipBackbone, batch_size: int = 32):
        self.backbone = backbone
        self.batch_size = batch_size

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32) -> CLIPScore:
        backbone = ClipBackbone.load(weights, "clip", device, cls.published.repository, OPEN_CLIP, cls.published,
                                     cls.architecture)
        return cls(backbone, batch_size)

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
            "precision": self.backbone.describe_precision(),
        }

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return self.backbone.count_truncated(prompts)


class CLIPScoreL14(CLIPScore):
    """The same with OpenAI's ViT-L/14, on which Aesthetic builds: the image goes through it once for both."""

    name = "clip_l14"
    title = "CLIP ViT-L/14"
    published = Published("openai/clip-vit-large-patch14", None, "1.7 GB")
    architecture = VIT_L_14
