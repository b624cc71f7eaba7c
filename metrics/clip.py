"""CLIP score: how well an image matches its prompt in a CLIP's joint embedding (Hessel et al. 2021)."""

from __future__ import annotations

from typing import ClassVar

from bench.metrics.base import Published
from bench.metrics.clip_family import H14_REPOSITORY, OPEN_CLIP, ClipBackbone, CosineMetric
from bench.metrics.columns import Column
from bench.metrics.open_clip_format import VIT_H_14, VIT_L_14


class CLIPScore(CosineMetric):
    """The plain cosine of image and prompt: neither clipped at 0 nor multiplied by 2.5 or 100.

    Published tables mostly use `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, some `openai/clip-vit-large-patch14`;
    their numbers are not comparable, so the checkpoint is part of the protocol.
    """

    name = "clip"
    title = "CLIP"
    columns = (Column(name, title, order=5),)
    version = "CLIP cosine"
    published = Published(H14_REPOSITORY, None, "3.9 GB")
    architecture: ClassVar[dict] = VIT_H_14
    """Of a checkpoint in open_clip's own format that comes without its configuration."""

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 64) -> CLIPScore:
        backbone = ClipBackbone.load(
            weights, "clip", device, cls.published.repository, OPEN_CLIP, cls.published, cls.architecture
        )
        return cls(backbone, batch_size)


class CLIPScoreL14(CLIPScore):
    """The same with OpenAI's ViT-L/14, on which Aesthetic builds: the image goes through it once for both."""

    name = "clip_l14"
    title = "CLIP ViT-L/14"
    published = Published("openai/clip-vit-large-patch14", None, "1.7 GB")
    architecture = VIT_L_14
