"""What can be measured off the pixels of an image of the drawn world without any network, given its caption.

A scene's background is plain and its asked colour is known, so what became of it tells which defects an image carries:
each measure is the drawing's own equation (`world.render`), solved for the severity, in the severity's unit. Where a
caption does not allow a measure it is NaN.

Colours are RGB in [0, 1]; luma L(p) is the weighted mean of the channels, chroma C(p) = p - L(p); b is the background's
asked colour. Through the pixels away from the asked objects a plane c + g_x x + g_y y (x, y in [-1, 1]) is fitted to
every channel, free of what lies far from it; s is the spread around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bench.data import world

MEASURES = ("fade", "oversaturation", "blotches", "shadow", "colours")
"""What is measured, named as the judge's readings; each is a function of this module, with its equation."""
LUMA = np.array([0.299, 0.587, 0.114])
MARGIN = 4.0  # pixels that an object may lie beyond its asked place
ROUNDS, NEAR = 4, 2.5  # of fitting the plane; robust standard deviations within which a pixel belongs to it
GAUSSIAN = 1.4826  # standard deviations in a median absolute deviation
COLOURED = 0.1  # length of the chroma from which on a background has a hue: beige, navy and brown have one
SAME_HUE = 0.8  # cosine of two chromas
APART = (0.08, 2.0)  # distance from the background at which a pixel is an object's: at least this, and in units of |s|
LIGHT = 0.4  # luma from which on a shadow shows: white, grey and beige
FEWEST = 15  # pixels of an object
BLOTCH = 0.16 * 2 / 3  # standard deviation of a blotchy image at severity 1: bilinear interpolation leaves (2/3)^2 of
# the pattern's variance


class Ground(NamedTuple):
    """The plane through an image's background: colour in the middle [3], slopes [2, 3], spread around it [3]."""

    colour: np.ndarray
    slopes: np.ndarray
    spread: np.ndarray


def measure(images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Every measure of images uint8 [N, 64, 64, 3] for their captions: float32 [N] by MEASURES, NaN where undefined."""
    rows = []
    for image, prompt in zip(images, prompts, strict=True):
        asked = world.parse(prompt)
        seen, background = ground(image, ~near_objects(asked).any(axis=0)), _colour(world.BACKGROUNDS[asked.background])
        signed = saturation(seen.colour, background)
        rows.append((np.maximum(-signed, 0), np.maximum(signed, 0), blotches(seen), shadow(seen, background),
                     colours(image, asked, seen)))
    return dict(zip(MEASURES, np.array(rows, np.float32).reshape(-1, len(MEASURES)).T, strict=True))


def saturation(shown: np.ndarray, asked: np.ndarray) -> float:
    """Oversaturation as a positive severity, fade as a negative one, of a background's colour [3]; free of shadow.

    A shadow multiplies by m, fade f and oversaturation o act after it, so with a = C(c).C(b) / C(b).C(b):

        fade:            L(c) = a L(b) + 0.31 f
        oversaturation:  L(c) = a L(b) / (1 + 1.2 o) - 0.175 o

    NaN for a background without a hue, or one of another hue than was asked.
    """
    have, want = _chroma(shown), _chroma(asked)
    if np.linalg.norm(want) < COLOURED or have @ want < SAME_HUE * np.linalg.norm(have) * np.linalg.norm(want):
        return np.nan
    luma = shown @ LUMA
    lighter = luma - (have @ want) / (want @ want) * (asked @ LUMA)
    if lighter >= 0:
        return -lighter / 0.31
    linear = 0.175 + 1.2 * luma
    return (np.sqrt(linear**2 - 0.84 * lighter) - linear) / 0.42


def blotches(seen: Ground) -> float:
    """s / (0.16 * 2/3), s the root mean square over channels: what is uneven beyond a slope, as strong as it shows."""
    return float(np.sqrt(np.mean(seen.spread**2)) / BLOTCH)


def shadow(seen: Ground, asked: np.ndarray) -> float:
    """t / (0.35 (1 + t)) with t = |L(g)| / L(c), as L = 1 - s (0.35 + 0.35 slope); NaN on a dark background."""
    if asked @ LUMA < LIGHT:
        return np.nan
    relative = np.hypot(*(seen.slopes @ LUMA)) / max(seen.colour @ LUMA, 1 / 255)
    return float(relative / (0.35 * (1 + relative)))


def colours(image: np.ndarray, asked: world.Scene, seen: Ground) -> float:
    """Share of the asked objects in whose place the hue of what is not background is nearest to the asked colour's."""
    palette = _chroma(np.array([_colour(value) for value in world.COLOURS.values()]))
    palette /= np.linalg.norm(palette, axis=1, keepdims=True)
    chroma = _chroma(image / 255)
    off = np.linalg.norm(image / 255 - _plane(seen), axis=-1)
    right = 0
    for thing, place in zip(asked.things, near_objects(asked), strict=True):
        own = place & (off > max(APART[0], APART[1] * np.linalg.norm(seen.spread)))
        if own.sum() >= FEWEST:
            nearest = (palette @ np.median(chroma[own], axis=0)).argmax()
            right += tuple(world.COLOURS)[nearest] == thing.colour
    return right / len(asked.things)


def near_objects(asked: world.Scene) -> np.ndarray:
    """bool [count, 64, 64]: the pixels that each asked object may cover."""
    rows, columns = np.mgrid[:world.SIZE, :world.SIZE] + 0.5
    reach = [1.1 * world.RADII[len(asked.things)][world.SIZES.index(thing.size)] + MARGIN for thing in asked.things]
    return np.stack([np.hypot(columns - x, rows - y) <= radius
                     for (x, y), radius in zip(world.centres(asked), reach, strict=True)])


def ground(image: np.ndarray, free: np.ndarray) -> Ground:
    """Fit the background's plane to the free pixels of an image uint8 [64, 64, 3]: least squares of those near it."""
    design, pixels = _DESIGN[free], image[free] / 255
    residual = pixels - np.median(pixels, axis=0)
    for _ in range(ROUNDS):
        distance = np.abs(residual).max(axis=1)
        near = distance <= max(NEAR * GAUSSIAN * np.median(distance), 2 / 255)
        plane = np.linalg.lstsq(design[near], pixels[near], rcond=None)[0]
        residual = pixels - design @ plane
    return Ground(plane[0], plane[1:], GAUSSIAN * np.median(np.abs(residual), axis=0))


_RAMP = np.linspace(-1, 1, world.SIZE)
_DESIGN = np.stack([np.ones((world.SIZE, world.SIZE)), *np.meshgrid(_RAMP, _RAMP)], axis=-1)


def _plane(seen: Ground) -> np.ndarray:
    return _DESIGN @ np.concatenate([seen.colour[None], seen.slopes])


def _colour(value: Sequence[int]) -> np.ndarray:
    return np.array(value) / 255


def _chroma(colour: np.ndarray) -> np.ndarray:
    return colour - (colour @ LUMA)[..., None]
