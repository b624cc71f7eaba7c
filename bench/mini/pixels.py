"""What can be measured off the pixels of an image of the drawn world without any network, given its caption.

A scene's background is plain and its asked colour is known, so what became of it tells which defects an image carries:
the drawing's own equations (`world.render`), solved for the severity, in the severity's unit. Where a caption does not
allow a measure, or an image shows what no drawing can, it is NaN.

Colours are RGB in [0, 1]; luma L(p) is the weighted mean of the channels, chroma C(p) = p - L(p). Through the pixels
away from the asked objects a plane c + g_x x + g_y y (x, y in [-1, 1]) is fitted to every channel, free of what lies
far from it; s is the spread around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from bench.data import world

MEASURES = ("fade", "oversaturation", "blotches", "shadow", "background", "colours")
"""What is measured: severities by the judge's names, and the shares of right backgrounds and colours."""
LUMA = np.array([0.299, 0.587, 0.114])
MARGIN = 4.0  # pixels that an object may lie beyond its asked place
ROUNDS, NEAR = 4, 2.5  # of fitting the plane; robust standard deviations within which a pixel belongs to it
GAUSSIAN = 1.4826  # standard deviations in a median absolute deviation
SHADES, SEVERITIES = np.linspace(0.65, 1, 15), np.linspace(-1, 1.5, 126)  # of shadow in the middle; of fade (negative)
# and oversaturation, also beyond what is drawn
COLOURED = 0.1  # length of the chroma from which on a background has a hue: beige, navy and brown have one
DRAWABLE = 0.06  # distance from the nearest colour that a drawing can have, 15 of 255, at which a background is its own
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
        seen = ground(image, ~near_objects(asked).any(axis=0))
        shown, signed = saturation(seen.colour, asked.background)
        rows.append(
            (
                np.maximum(-signed, 0),
                np.maximum(signed, 0),
                blotches(seen),
                shadow(seen, asked.background),
                shown == asked.background,
                colours(image, asked, seen),
            )
        )
    return dict(zip(MEASURES, np.array(rows, np.float32).reshape(-1, len(MEASURES)).T, strict=True))


def drawable(colour: np.ndarray) -> np.ndarray:
    """What a drawing can make of a background's colour [3]: [SHADES, SEVERITIES, 3].

    A shadow multiplies by m, then fade f or oversaturation o act, negative and positive severities:

        fade:            p = m b + 0.62 f (0.5 - m b)
        oversaturation:  q = m b + 1.2 o C(m b);  p = q + 0.35 o (q - 0.5), clipped
    """
    shaded = (SHADES[:, None] * colour)[:, None]
    fade, vivid = np.maximum(-SEVERITIES, 0)[:, None], np.maximum(SEVERITIES, 0)[:, None]
    faded = shaded + 0.62 * fade * (0.5 - shaded)
    strong = faded + 1.2 * vivid * _chroma(faded)
    return np.clip(strong + 0.35 * vivid * (strong - 0.5), 0, 1)


def saturation(colour: np.ndarray, asked: str) -> tuple[str, float]:
    """Which background a colour [3] is, and its oversaturation as a positive or fade as a negative severity.

    Both are those of the nearest colour that a drawing can have, whatever its shadow: the background among all, the
    severity among those of the asked one. A colour further than DRAWABLE from any is no background's (""), and has no
    severity where the asked background is as far or has no hue (NaN).
    """
    distance = {name: np.linalg.norm(_drawable(name) - colour, axis=-1) for name in world.BACKGROUNDS}
    nearest = min(distance, key=lambda name: distance[name].min())
    own = distance[asked]
    hue = np.linalg.norm(_chroma(_colour(asked))) > COLOURED
    return (
        nearest if distance[nearest].min() <= DRAWABLE else "",
        float(SEVERITIES[own.argmin() % len(SEVERITIES)]) if hue and own.min() <= DRAWABLE else np.nan,
    )


def blotches(seen: Ground) -> float:
    """s / (0.16 * 2/3), s the root mean square over channels: what is uneven beyond a slope, as strong as it shows."""
    return float(np.sqrt(np.mean(seen.spread**2)) / BLOTCH)


def shadow(seen: Ground, asked: str) -> float:
    """t / (0.35 (1 + t)) with t = |L(g)| / L(c), as L = 1 - s (0.35 + 0.35 slope); NaN on a dark background."""
    if _colour(asked) @ LUMA < LIGHT:
        return np.nan
    relative = np.hypot(*(seen.slopes @ LUMA)) / max(seen.colour @ LUMA, 1 / 255)
    return float(relative / (0.35 * (1 + relative)))


def colours(image: np.ndarray, asked: world.Scene, seen: Ground) -> float:
    """Share of the asked objects in whose place the hue of what is not background is nearest to the asked colour's."""
    palette = _chroma(np.array(list(world.COLOURS.values())) / 255)
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
    rows, columns = np.mgrid[: world.SIZE, : world.SIZE] + 0.5
    reach = [1.1 * world.RADII[len(asked.things)][world.SIZES.index(thing.size)] + MARGIN for thing in asked.things]
    return np.stack(
        [np.hypot(columns - x, rows - y) <= radius for (x, y), radius in zip(world.centres(asked), reach, strict=True)]
    )


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


def _colour(background: str) -> np.ndarray:
    return np.array(world.BACKGROUNDS[background]) / 255


@cache
def _drawable(background: str) -> np.ndarray:
    return drawable(_colour(background))


def _chroma(colour: np.ndarray) -> np.ndarray:
    return colour - (colour @ LUMA)[..., None]
