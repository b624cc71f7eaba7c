"""Image files to training images: decoded, upright, RGB, square, at the model's resolution."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bench.data.depth import eight_bits
from bench.errors import first_line
from bench.storage.shards import BrokenRows

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
READING = "shorter side resized (bilinear), centre crop"  # for the protocol, and part of every cache's name


def images_in(folder: Path) -> list[str]:
    """The images below a folder, named relative to it, in the order of their names."""
    found = []
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        found += [(inside / name).as_posix() for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    return sorted(found)


def read_image(content: bytes, resolution: int) -> np.ndarray:
    """Decode a file to uint8 [R, R, 3]; raises ValueError with a reason when it is no whole image.

    As the training code of Diffusion-DPO and of diffusers does it: the shorter side is resized to the
    resolution (bilinear, antialiased) and the centre is cut out. The centre, not a random place: most of
    Pick-a-Pic is square, so the crop moves nothing there, and one image has one latent.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image = eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Exception as error:  # Pillow raises errors of many kinds for broken files
        raise ValueError("undecodable image: " + first_line(error).split(" <_io")[0]) from error
    return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BILINEAR))


def read_images(groups: Mapping[int, Sequence[bytes | None]], resolution: int) -> np.ndarray:
    """Decode, in threads, the images of some rows and return the first of each, uint8 [n, R, R, 3].

    All of a row's images must be whole: a pair with one broken side is set aside for every method alike.
    Raises BrokenRows with the reasons.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        read = list(threads.map(lambda contents: _read_all(contents, resolution), groups.values()))
    problems = {row: found for row, found in zip(groups, read, strict=True) if isinstance(found, str)}
    if problems:
        raise BrokenRows(problems)
    return np.stack(read)


def _read_all(contents: Iterable[bytes | None], resolution: int) -> np.ndarray | str:
    """The first image, or what is wrong with any of them."""
    try:
        images = [read_image(_expect(content), resolution) for content in contents]
    except ValueError as error:
        return str(error)
    return images[0]


def _expect(content: bytes | None) -> bytes:
    if not content:
        raise ValueError("missing image")
    return content
