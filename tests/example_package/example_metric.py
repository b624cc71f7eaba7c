"""Tones: how bright a picture is, and how much of it has lost its detail in pure black or white."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.metrics.base import Images, Metric, check_lengths, to_rgb
from bench.metrics.columns import Column


class Tones(Metric):
    """Mean brightness of the pixels, and the share of them in which a channel is 0 or 255."""

    name = "tones"
    title = "Tones"
    reads = "image"
    columns = (
        Column("brightness", "brightness", unit="of 255", decimals=1),
        Column("clipped", "clipped pixels", unit="%", higher_is_better=False, decimals=2),
    )

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 64) -> Tones:
        """There is nothing to load: every argument is taken and none is needed."""
        return cls()

    def score(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        check_lengths(images, prompts)
        pixels = [np.asarray(to_rgb(image)) for image in images]
        ends = [np.isin(picture, (0, 255)).any(axis=2) for picture in pixels]
        return {
            "brightness": np.array([picture.mean() for picture in pixels], np.float32),
            "clipped": np.array([100 * end.mean() for end in ends], np.float32),
        }

    def info(self) -> dict[str, str]:
        return {
            "version": "1",
            "checkpoint": "none",
            "scale": "0 to 255, and 0 to 100",
            "preprocessing": "RGB (alpha dropped)",
            "truncates": "nothing (the prompt is not read)",
            "precision": "fp64, kept as fp32",
        }
