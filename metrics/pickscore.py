"""PickScore: CLIP ViT-H/14 fine-tuned on human choices between two images (Kirstain et al. 2023)."""

from __future__ import annotations

from bench.metrics.base import Published
from bench.metrics.clip_family import H14_REPOSITORY, ClipBackbone, CosineMetric
from bench.metrics.columns import Column


class PickScore(CosineMetric):
    """exp(logit scale) * cosine(image, prompt), as the authors' example computes it (about 21 for SD-1.5)."""

    name = "pickscore"
    title = "PickScore"
    columns = (Column(name, title, order=1, averaged=True),)
    version = "PickScore v1"
    published = Published("yuvalkirstain/PickScore_v1", None, "3.9 GB")

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 64) -> PickScore:
        backbone = ClipBackbone.load(weights, "pickscore", device, H14_REPOSITORY, published=cls.published)
        return cls(backbone, batch_size)

    @property
    def factor(self) -> float:
        """By what the cosine is multiplied."""
        return self.backbone.logit_scale

    @property
    def scale(self) -> str:
        return f"cosine times {self.factor:.6g}"


class PickScoreCosine(PickScore):
    """The cosine alone (about 0.21), as the evaluation code of Diffusion-DPO and its descendants reports it."""

    name = "pickscore_cosine"
    title = "PickScore cosine"
    factor = 1.0
