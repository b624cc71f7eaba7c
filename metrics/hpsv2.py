"""HPS v2: CLIP ViT-H/14 tuned on human rankings of generated images (Wu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from metrics.base import Images, Metric, Published, check_lengths
from metrics.clip_family import H14_REPOSITORY, ClipBackbone, Reading


class HPSv2(Metric):
    """The cosine of image and prompt by the checkpoint of the paper, v2.0: about 0.27 (papers often print x100).

    The published package picks v2.0 unless told otherwise; numbers of v2.1 are on another level.
    """

    name = "hpsv2"
    title = "HPS v2"
    version: ClassVar[str] = "HPS v2.0"
    published = Published("xswu/HPSv2", "HPS_v2_compressed.pt", "3.9 GB")
    bundled: ClassVar[str] = "hpsv2/hpsv2.pt"

    def __init__(self, backbone: ClipBackbone, batch_size: int = 32):
        self.backbone = backbone
        self.batch_size = batch_size

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32,
             antialias: bool = True) -> HPSv2:
        """Load a checkpoint in open_clip's format (ViT-H-14, or what `open_clip_config.json` beside it says).

        antialias: whether the resize antialiases, as torchvision's does since 0.17; see metrics.pixels.
        """
        backbone = ClipBackbone.load(weights, cls.bundled, device, H14_REPOSITORY, Reading("hpsv2", antialias),
                                     cls.published)
        return cls(backbone, batch_size)

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        check_lengths(images, prompts)
        return self.backbone.cosine(images, prompts, self.batch_size).numpy()

    def info(self) -> dict[str, str]:
        return {
            "version": self.version,
            "checkpoint": self.backbone.checkpoint,
            "scale": "cosine, -1 to 1",
            "preprocessing": self.backbone.describe_preprocessing(),
            "truncates": self.backbone.describe_truncation(),
            "precision": self.backbone.describe_precision(),
        }

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return self.backbone.count_truncated(prompts)


class HPSv21(HPSv2):
    """The later checkpoint, trained on more data of higher quality."""

    name = "hpsv21"
    title = "HPS v2.1"
    version = "HPS v2.1"
    published = Published("xswu/HPSv2", "HPS_v2.1_compressed.pt", "3.9 GB")
    bundled = "hpsv21/hpsv21.pt"
