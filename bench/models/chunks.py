"""How many images an autoencoder may take at once: kernels of a GPU index a tensor with 32 bits."""

from __future__ import annotations

import math

from diffusers import AutoencoderKL
from torch import Tensor

LIMIT = 2**31 - 1  # elements of one tensor


def widest(vae: AutoencoderKL, height: int, width: int) -> int:
    """Elements of the largest tensor that decoding latents of `height` x `width` makes of one image; encoding the image
    makes none larger.

    A decoder's block works at twice the resolution of the one before, on as many channels as that one left, and leaves
    its own: for Stable Diffusion 256 channels at full resolution, which 32 images of 512 pixels take past the limit.
    """
    left = vae.config.block_out_channels[::-1]
    given = (left[0], *left[:-1])
    return max(
        max(channels) * height * width * 4**doublings
        for doublings, channels in enumerate(zip(given, left, strict=True))
    )


def rows_at_once(vae: AutoencoderKL, height: int, width: int) -> int:
    """Images whose largest tensor is within the limit, 1 at least."""
    return max(1, LIMIT // widest(vae, height, width))


def chunks(vae: AutoencoderKL, rows: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """Latents or images [B, ...], of which latents are `height` x `width`, in as few parts of equal size as possible:
    one, where that is within the limit."""
    return rows.tensor_split(math.ceil(len(rows) / rows_at_once(vae, height, width)))
