"""Images of more than 8 bits a channel, as 8-bit ones."""

from __future__ import annotations

import numpy as np
from PIL import Image

DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes for one channel of 16 bits (PNG, TIFF)
LEVELS = 65535 // 255


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits scaled to 8, any other one as it is; ValueError where values have more than 16 bits.

    Pillow's own conversion cuts instead of scaling: whatever is not nearly black becomes white. (16-bit colour it
    scales itself, when it opens the file.)
    """
    if image.mode not in DEEP:
        return image
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError(f"grey values from {values.min()} to {values.max()}, expected 0 to 65535")
    return Image.fromarray(((values + LEVELS // 2) // LEVELS).astype(np.uint8))
