"""The drawn world: captioned scenes whose every attribute, defect and therefore utility is known exactly.

A scene is one to three objects (size, colour, shape) in a row or a column on a plain background. A caption says what
was asked for; a drawing shows a scene that may differ from it in some attributes and that carries defects of known
severity. All defects were chosen because an 8x autoencoder keeps them visible.

    alignment  = share of the asked attributes that the drawing shows           in [0, 1]
    aesthetics = 1 - sum_d weight_d * severity_d                               in [0.2, 1]
    utility    = (alignment + aesthetics) / 2

Everything is a pure function of its arguments; no image files are needed anywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SIZE = 64  # pixels, width and height
SIZES = ("small", "large")
COLOURS = {
    "red": (200, 66, 60),
    "green": (84, 152, 80),
    "blue": (76, 108, 196),
    "yellow": (222, 196, 88),
    "orange": (220, 138, 66),
    "purple": (132, 84, 168),
    "pink": (228, 152, 184),
    "cyan": (96, 186, 196),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
BACKGROUNDS = {
    "white": (236, 236, 236),
    "black": (28, 28, 28),
    "grey": (128, 128, 128),
    "beige": (218, 202, 172),
    "navy": (36, 46, 92),
    "brown": (104, 76, 56),
}
ARRANGEMENTS = ("single", "row", "column")
RADII = {1: (11.0, 17.0), 2: (9.5, 14.5), 3: (6.5, 9.8)}  # (small, large) in pixels, by number of objects

DEFECT_WEIGHTS = {"fade": 0.20, "oversaturation": 0.25, "blotches": 0.25, "displacement": 0.15, "shadow": 0.15}
DEFECTS = tuple(DEFECT_WEIGHTS)


@dataclass(frozen=True)
class Thing:
    """One object: values from SIZES, COLOURS and SHAPES."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in canonical order (left to right, or top to bottom), their arrangement and the background."""

    things: tuple[Thing, ...]
    arrangement: str
    background: str

    @property
    def combination(self) -> tuple[tuple[str, str], ...]:
        """The unordered (colour, shape) pairs: what the prompt splits keep apart."""
        return tuple(sorted((thing.colour, thing.shape) for thing in self.things))


# --- captions -------------------------------------------------------------------------------------------------------

RELATIONS = {"row": ("to the left of", "to the right of"), "column": ("above", "below")}
CAPTION_VARIANTS = 4


def caption(scene: Scene, variant: int = 0) -> str:
    """Say a scene in words. `variant` in 0..3: bit 0 reverses the relation, bit 1 adds an opening."""
    backwards = variant & 1
    things = scene.things[::-1] if backwards else scene.things
    joint = f" {RELATIONS[scene.arrangement][backwards]} " if len(things) > 1 else ""
    text = joint.join(map(str, things)) + f" on a {scene.background} background"
    return "a picture of " + text if variant & 2 else text


_THING = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_RELATION = re.compile(r"\b(left|right|above|below)\b")
_BACKGROUND = re.compile(rf"\bon a ({'|'.join(BACKGROUNDS)}) background\b")


def parse(text: str) -> Scene:
    """The inverse of `caption`; raises ValueError for a sentence that the grammar cannot have made."""
    things = tuple(Thing(*match) for match in _THING.findall(text))
    relations = set(_RELATION.findall(text))
    background = _BACKGROUND.search(text)
    if not things or len(things) > 3 or background is None or len(relations) != (len(things) > 1):
        raise ValueError(f"not a caption of the drawn world: {text!r}")
    relation = relations.pop() if relations else None
    arrangement = {None: "single", "left": "row", "right": "row", "above": "column", "below": "column"}[relation]
    if relation in ("right", "below"):
        things = things[::-1]
    return Scene(things, arrangement, background[1])


# --- what a scene is worth ------------------------------------------------------------------------------------------


def attributes(scene: Scene) -> dict[str, str]:
    """Every attribute of a scene by name: count, background, arrangement (two or more objects), size0, colour0, ..."""
    named = {"count": str(len(scene.things)), "background": scene.background}
    if len(scene.things) > 1:
        named["arrangement"] = scene.arrangement
    for slot, thing in enumerate(scene.things):
        named |= {f"size{slot}": thing.size, f"colour{slot}": thing.colour, f"shape{slot}": thing.shape}
    return named


def alignment(asked: Scene, drawn: Scene) -> float:
    """Share of the asked attributes that the drawn scene has; objects are compared place by place."""
    wanted, shown = attributes(asked), attributes(drawn)
    return sum(shown.get(name) == value for name, value in wanted.items()) / len(wanted)


def aesthetics(defects: np.ndarray) -> np.ndarray:
    """1 minus the weighted severities. defects: [..., len(DEFECTS)] in [0, 1]; returns [...]."""
    return 1.0 - np.asarray(defects, np.float64) @ np.array(list(DEFECT_WEIGHTS.values()))


def utility(alignment_value, aesthetics_value):
    """The exact utility of a drawing: the mean of its alignment and its aesthetics, in [0.1, 1]."""
    return (np.asarray(alignment_value) + np.asarray(aesthetics_value)) / 2


# --- splits and random scenes ---------------------------------------------------------------------------------------


def split_of(scene: Scene) -> str:
    """ "test" (10 % of the colour-shape combinations), "validation" (5 %) or "train": a pure function of the scene."""
    digest = hashlib.sha256(repr(scene.combination).encode()).digest()
    bucket = int.from_bytes(digest[:4], "big") % 20
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def random_scene(rng: np.random.Generator, counts: Sequence[int] = (1, 2, 2, 2), split: str | None = None) -> Scene:
    """Draw a scene; `counts` are equally likely numbers of objects, `split` restricts the combinations."""
    while True:
        count = counts[rng.integers(len(counts))]
        things = tuple(random_thing(rng) for _ in range(count))
        arrangement = "single" if count == 1 else ARRANGEMENTS[1 + rng.integers(2)]
        scene = Scene(things, arrangement, _pick(rng, BACKGROUNDS))
        if split is None or split_of(scene) == split:
            return scene


def random_thing(rng: np.random.Generator) -> Thing:
    return Thing(_pick(rng, SIZES), _pick(rng, COLOURS), _pick(rng, SHAPES))


def with_errors(scene: Scene, rng: np.random.Generator, rate: float) -> Scene:
    """Redraw each attribute with probability `rate`; with half that probability objects are dropped to one."""
    things = tuple(
        Thing(
            size=_maybe(rng, rate, thing.size, SIZES),
            colour=_maybe(rng, rate, thing.colour, COLOURS),
            shape=_maybe(rng, rate, thing.shape, SHAPES),
        )
        for thing in scene.things
    )
    arrangement = scene.arrangement
    if len(things) > 1:
        arrangement = _maybe(rng, rate, arrangement, ARRANGEMENTS[1:])
        if rng.random() < rate / 2:
            things, arrangement = things[:1], "single"
    return replace(
        scene, things=things, arrangement=arrangement, background=_maybe(rng, rate, scene.background, BACKGROUNDS)
    )


def _pick(rng: np.random.Generator, options) -> str:
    return tuple(options)[rng.integers(len(options))]


def _maybe(rng: np.random.Generator, rate: float, value: str, options) -> str:
    return _pick(rng, [option for option in options if option != value]) if rng.random() < rate else value


# --- drawing --------------------------------------------------------------------------------------------------------


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tenth = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)  # folded into one half of one of the five tips
    radius = np.hypot(u, v)
    tip, notch = np.array([1.1, 0.0]), 0.5 * np.array([np.cos(tenth), np.sin(tenth)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal /= np.hypot(*normal)
    return (radius * np.cos(angle) - tip[0]) * normal[0] + radius * np.sin(angle) * normal[1]


# Signed distance (negative inside) in units of the object's radius; u to the right, v down. Each array [..., H, W].
_DISTANCE = {
    "circle": lambda u, v: np.hypot(u, v) - 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) - 0.86,
    "triangle": lambda u, v: np.maximum((1.75 * abs(u) - 0.98 * (v + 1.05)) / 2.006, v - 0.75),
    "star": _star,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.74) - 0.27,
    "cross": lambda u, v: np.minimum(np.maximum(abs(u) - 1, abs(v) - 0.33), np.maximum(abs(u) - 0.33, abs(v) - 1)),
}


def centres(scene: Scene) -> np.ndarray:
    """Where the objects belong, in pixels: [count, 2] as (x, y)."""
    count = len(scene.things)
    along = SIZE * (np.arange(count) + 0.5) / count
    middle = np.full(count, SIZE / 2)
    return np.stack([middle, along] if scene.arrangement == "column" else [along, middle], axis=1)


def render(scenes: Sequence[Scene], defects: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Draw scenes, anti-aliased, as uint8 [N, 64, 64, 3]. defects: [N, 5] severities in [0, 1]; seeds: one a drawing.

    The seed decides what neither scene nor severity says: jitter of a pixel, directions, the pattern of the blotches.
    """
    defects = np.asarray(defects, np.float32).reshape(len(scenes), len(DEFECTS))
    rngs = [np.random.default_rng(seed) for seed in seeds]
    canvas = np.stack([np.array(BACKGROUNDS[scene.background], np.float32) for scene in scenes]) / 255
    canvas = np.repeat(canvas[:, None, None, :], SIZE, 1).repeat(SIZE, 2)
    _draw_things(canvas, scenes, defects[:, DEFECTS.index("displacement")], rngs)
    _apply_defects(canvas, defects, rngs)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _draw_things(canvas: np.ndarray, scenes, displacement: np.ndarray, rngs) -> None:
    """Paint the objects in place, all objects of one slot and shape at a time."""
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    placed: dict[tuple[int, str], list] = {}
    for index, (scene, rng) in enumerate(zip(scenes, rngs, strict=True)):
        for slot, (thing, centre) in enumerate(zip(scene.things, centres(scene), strict=True)):
            angle = rng.uniform(0, 2 * np.pi)
            shift = 8.0 * displacement[index] * np.array([np.cos(angle), np.sin(angle)]) + rng.uniform(-1, 1, 2)
            radius = RADII[len(scene.things)][SIZES.index(thing.size)] * rng.uniform(0.96, 1.04)
            placed.setdefault((slot, thing.shape), []).append((index, *(centre + shift), radius, thing.colour))
    for (_, shape), items in sorted(placed.items()):
        index, x, y, radius = (np.array([item[k] for item in items]) for k in range(4))
        x, y, radius = (value.astype(np.float32)[:, None, None] for value in (x, y, radius))
        distance = _DISTANCE[shape]((grid[None, None, :] - x) / radius, (grid[None, :, None] - y) / radius) * radius
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        colour = np.array([COLOURS[item[4]] for item in items], np.float32)[:, None, None, :] / 255
        canvas[index] += cover * (colour - canvas[index])


def _apply_defects(canvas: np.ndarray, defects: np.ndarray, rngs) -> None:
    """Shadow, blotches, then fade and oversaturation, in place. Strengths at severity 1 are the constants here."""
    fade, oversaturation, blotches, _, shadow = (column[:, None, None, None] for column in defects.T)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    direction = np.array([rng.uniform(0, 2 * np.pi) for rng in rngs], np.float32)[:, None, None]
    slope = np.cos(direction) * ramp[None, None, :] + np.sin(direction) * ramp[None, :, None]
    canvas *= 1 - shadow * np.clip(0.35 + 0.35 * slope[..., None], 0, 0.75)
    pattern = np.stack([rng.standard_normal((10, 10, 3)) for rng in rngs]).astype(np.float32)
    canvas += 0.16 * blotches * np.einsum("ya,nabc,xb->nyxc", _UPSAMPLE, pattern, _UPSAMPLE, optimize=True)
    canvas += 0.62 * fade * (0.5 - canvas)
    luma = canvas @ np.array([0.299, 0.587, 0.114], np.float32)
    canvas += oversaturation * 1.2 * (canvas - luma[..., None])
    canvas += oversaturation * 0.35 * (canvas - 0.5)


def _upsampling(source: int, target: int) -> np.ndarray:
    """Linear interpolation as a matrix [target, source]."""
    place = np.linspace(0, source - 1, target)
    return np.maximum(0, 1 - abs(place[:, None] - np.arange(source)[None, :])).astype(np.float32)


_UPSAMPLE = _upsampling(10, SIZE)
