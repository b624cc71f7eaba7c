"""HPS v2: CLIP ViT-H/14 tuned on human rankings of generated images (Wu et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

from bench.metrics.base import Published
from bench.metrics.clip_family import H14_REPOSITORY, ClipBackbone, CosineMetric, Reading
from bench.metrics.columns import Column


class HPSv2(CosineMetric):
    """The cosine of image and prompt by the checkpoint of the paper, v2.0: about 0.27 (papers often print x100).

    The published package picks v2.0 unless told otherwise; numbers of v2.1 are on another level.
    """

    name = "hpsv2"
    title = "HPS v2"
    columns = (Column(name, title, order=2, averaged=True),)
    version = "HPS v2.0"
    published = Published("xswu/HPSv2", "HPS_v2_compressed.pt", "3.9 GB")
    bundled: ClassVar[str] = "hpsv2/hpsv2.pt"

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 64, antialias: bool = True) -> HPSv2:
        """Load a checkpoint in open_clip's format (ViT-H-14, or what `open_clip_config.json` beside it says).

        antialias: whether the resize antialiases, as torchvision's does since 0.17; see bench.metrics.pixels.
        """
        backbone = ClipBackbone.load(
            weights, cls.bundled, device, H14_REPOSITORY, Reading("hpsv2", antialias), cls.published
        )
        return cls(backbone, batch_size)


class HPSv21(HPSv2):
    """The later checkpoint, trained on more data of higher quality."""

    name = "hpsv21"
    title = "HPS v2.1"
    version = "HPS v2.1"
    published = Published("xswu/HPSv2", "HPS_v2.1_compressed.pt", "3.9 GB")
    bundled = "hpsv21/hpsv21.pt"
