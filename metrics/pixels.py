"""Pixels as each published scorer's own preprocessing makes them, without torchvision.

The orders of resizing, cropping, conversion to RGB and scaling differ between the published codes, and scores
differ with them in the third digit; each is one class here, and says in words what it does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers import CLIPImageProcessorPil
from transformers.image_utils import PILImageResampling

from bench.metrics.base import to_pil, to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

AnyImages = Iterable[Image.Image | np.ndarray]


class Transformers:
    """What a checkpoint's own image processor does, on RGB; equal settings are equal pixels."""

    def __init__(self, processor: CLIPImageProcessorPil):
        self.processor, self.settings = processor, processor.to_json_string()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transformers) and self.settings == other.settings

    def __hash__(self) -> int:
        return hash(self.settings)

    def __call__(self, images: AnyImages) -> Tensor:
        """fp32 [N, 3, S, S]"""
        given = self.processor
        pixels = given(
            images=[to_rgb(image) for image in images], do_rescale=False, do_normalize=False, return_tensors="pt"
        )["pixel_values"].float()  # image by image these two take most of its time
        pixels = pixels * given.rescale_factor if given.do_rescale else pixels
        return normalised(pixels, given.image_mean, given.image_std) if given.do_normalize else pixels

    def describe(self) -> str:
        given = self.processor
        size = ", ".join(f"{name} {value}" for name, value in dict(given.size).items() if value is not None)
        crop = dict(given.crop_size)
        resample = PILImageResampling(given.resample).name.lower()
        return (
            f"RGB (alpha dropped), PIL {resample} resize to {size}, "
            f"centre crop {crop['height']}x{crop['width']}, {_statistics(given.image_mean, given.image_std)}"
        )


@dataclass(frozen=True)
class ShortestSide:
    """CLIP's own transform, also open_clip's and ImageReward's: the shorter side to `size`, then the centre.

    The resize acts on the PIL image in the mode it came in, and the result becomes RGB afterwards: an alpha
    channel thus weights the colours around an edge, and a palette image is resized without interpolation.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: AnyImages) -> Tensor:
        """fp32 [N, 3, size, size]"""
        return normalised(to_tensor([self._cropped(to_pil(image)) for image in images]), self.mean, self.std)

    def _cropped(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        short, long = min(width, height), max(width, height)
        length = int(self.size * long / short)
        shape = (self.size, length) if width <= height else (length, self.size)
        resized = image.resize(shape, Image.Resampling.BICUBIC) if shape != image.size else image
        if shape != (self.size, self.size):
            # torchvision rounds half to even where transformers rounds down, hence no integer division.
            left, top = (int(round((side - self.size) / 2)) for side in shape)
            resized = resized.crop((left, top, left + self.size, top + self.size))
        return resized.convert("RGB")

    def describe(self) -> str:
        return (
            f"PIL bicubic resize of the shorter side to {self.size}, centre crop, then RGB (alpha dropped), "
            f"{_statistics(self.mean, self.std)}"
        )


@dataclass(frozen=True)
class LongestSide:
    """HPS v2's transform: RGB, to a tensor, the longer side to `size`, black bars, normalised.

    The published code resizes a tensor without saying whether to antialias. torchvision did not before 0.17 and
    does since, so the same checkpoint gives two scores; `antialias` is part of the protocol.
    """

    size: int
    antialias: bool = True
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: AnyImages) -> Tensor:
        """fp32 [N, 3, size, size]"""
        fitted = [self._fitted(to_tensor([to_rgb(image)])) for image in images]  # together they would leave the cache
        return normalised(torch.cat(fitted), self.mean, self.std)

    def _fitted(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[2:]
        scale = self.size / max(height, width)
        # At least one row: the published code fails on images more than twice `size` times as long as wide.
        shape = max(1, round(height * scale)), max(1, round(width * scale))
        if shape != (height, width):
            pixels = interpolate(pixels, shape, mode="bicubic", align_corners=False, antialias=self.antialias)
        bars = [self.size - side for side in shape]
        left, top = bars[1] // 2, bars[0] // 2
        return pad(pixels, (left, bars[1] - left, top, bars[0] - top))

    def describe(self) -> str:
        return (
            f"RGB (alpha dropped), tensor bicubic resize of the longer side to {self.size} "
            f"{'with' if self.antialias else 'without'} antialiasing, padded with 0, "
            f"{_statistics(self.mean, self.std)}"
        )


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as fp32 [N, 3, H, W] in 0 to 1."""
    values = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return values.permute(0, 3, 1, 2).float().contiguous() / 255


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels - mean) / std, channel by channel of [N, 3, H, W]."""
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _statistics(mean: Sequence[float], std: Sequence[float]) -> str:
    rounded = [[round(value, 4) for value in row] for row in (mean, std)]
    return f"mean {rounded[0]}, std {rounded[1]}"
