"""PickScore: CLIP ViT-H/14 fine-tuned on human choices between two images (Kirstain et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metrics.base import Images, Metric, check_lengths
from metrics.clip_family import ClipBackbone

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Holds the tokenizer and image settings of `yuvalkirstain/PickScore_v1`, which was tuned from it."""


class PickScore(Metric):
    """exp(logit scale) * cosine(image, prompt), as the authors' example computes it (about 21 for SD-1.5)."""

    name = "pickscore"
    title = "PickScore"

    def __init__(self, backbone: ClipBackbone, batch_size: int = 32):
        self.backbone = backbone
        self.batch_size = batch_size

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32) -> PickScore:
        return cls(ClipBackbone.load(weights, "pickscore", device, PROCESSOR), batch_size)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        check_lengths(images, prompts)
        cosine = self.backbone.cosine(images, prompts, self.batch_size)
        return (self.backbone.logit_scale * cosine).numpy()

    def info(self) -> dict[str, str]:
        return {
            "version": "PickScore v1",
            "checkpoint": self.backbone.checkpoint,
            "scale": f"cosine times {self.backbone.logit_scale:.4g}",
            "preprocessing": self.backbone.describe_preprocessing(),
            "truncates": self.backbone.describe_truncation(),
        }
