"""PickScore: CLIP ViT-H/14 fine-tuned on human choices between two images (Kirstain et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metrics.base import Images, Metric, Published, check_lengths
from metrics.clip_family import H14_REPOSITORY, ClipBackbone


class PickScore(Metric):
    """exp(logit scale) * cosine(image, prompt), as the authors' example computes it (about 21 for SD-1.5)."""

    name = "pickscore"
    title = "PickScore"
    published = Published("yuvalkirstain/PickScore_v1", None, "3.9 GB")

    def __init__(self, backbone: ClipBackbone, batch_size: int = 32):
        self.backbone = backbone
        self.batch_size = batch_size

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32) -> PickScore:
        backbone = ClipBackbone.load(weights, "pickscore", device, H14_REPOSITORY, published=cls.published)
        return cls(backbone, batch_size)

    @property
    def factor(self) -> float:
        """By what the cosine is multiplied."""
        return self.backbone.logit_scale

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        check_lengths(images, prompts)
        cosine = self.backbone.cosine(images, prompts, self.batch_size)
        return (self.factor * cosine).numpy()

    def info(self) -> dict[str, str]:
        return {
            "version": "PickScore v1",
            "checkpoint": self.backbone.checkpoint,
            "scale": f"cosine times {self.factor:.6g}",
            "preprocessing": self.backbone.describe_preprocessing(),
            "truncates": self.backbone.describe_truncation(),
            "precision": self.backbone.describe_precision(),
        }

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return self.backbone.count_truncated(prompts)


class PickScoreCosine(PickScore):
    """The cosine alone (about 0.21), as the evaluation code of Diffusion-DPO and its descendants reports it."""

    name = "pickscore_cosine"
    title = "PickScore cosine"
    factor = 1.0
