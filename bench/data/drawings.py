"""Three uses of the drawn world: a flawed pretraining corpus, preference pairs, and broad renders with labels.

Item i of each is a pure function of (seed, i).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bench.data import world

CORPUS, PAIRS, LABELLED = 1, 2, 3  # streams of randomness, so that equal seeds do not mean equal drawings
LABEL_TEMPERATURE = 0.04  # of the Bradley-Terry choice, in units of utility
CORPUS_ERROR_RATE = 0.03


@dataclass(frozen=True)
class Drawing:
    """What was asked, what is shown, how badly, and the seed of the remaining freedom."""

    caption: str
    asked: world.Scene
    drawn: world.Scene
    defects: tuple[float, ...]
    seed: int

    @property
    def alignment(self) -> float:
        return world.alignment(self.asked, self.drawn)

    @property
    def aesthetics(self) -> float:
        return float(world.aesthetics(np.array(self.defects)))

    @property
    def utility(self) -> float:
        return float(world.utility(self.alignment, self.aesthetics))


def render(drawings: Iterable[Drawing]) -> np.ndarray:
    """Render drawings to uint8 [N, 64, 64, 3]."""
    drawings = list(drawings)
    return world.render(
        [d.drawn for d in drawings], np.array([d.defects for d in drawings]), [d.seed for d in drawings]
    )


def severities(rng: np.random.Generator, spread: dict[str, tuple[float, float, float]]) -> tuple[float, ...]:
    """Draw one severity a defect: scale * Beta(a, b) with (a, b, scale) from `spread`; 0 for a defect not in it.

    Fade and oversaturation are the two ends of one axis: of the two only the stronger stays.
    """
    drawn = {name: scale * rng.beta(a, b) for name, (a, b, scale) in spread.items()}
    if drawn.get("fade", 0) and drawn.get("oversaturation", 0):
        drawn[min("fade", "oversaturation", key=drawn.get)] = 0.0
    return tuple(float(drawn.get(name, 0.0)) for name in world.DEFECTS)


def corpus(seed: int, index: int) -> Drawing:
    """A drawing of the broad, flawed pretraining corpus: every defect at every severity, some wrong attributes."""
    rng = np.random.default_rng([seed, CORPUS, index])
    asked = world.random_scene(rng, split="train")
    drawn = world.with_errors(asked, rng, CORPUS_ERROR_RATE)
    broad = dict.fromkeys(world.DEFECTS, (1.0, 1.5, 1.0))
    return Drawing(
        world.caption(asked, int(rng.integers(world.CAPTION_VARIANTS))),
        asked,
        drawn,
        severities(rng, broad),
        int(rng.integers(2**62)),
    )


# Two imperfect generators, better than the corpus in different ways.
VIVID = {"oversaturation": (1.3, 4.0, 1.0), "displacement": (1.2, 5.0, 1.0), "blotches": (1.0, 8.0, 1.0)}
SOFT = {"fade": (1.3, 4.0, 1.0), "blotches": (1.3, 4.0, 1.0), "shadow": (1.3, 4.0, 1.0)}
GENERATORS = ((0.04, VIVID), (0.08, SOFT))
"""Of each: the rate of wrong attributes, and its defects."""


@dataclass(frozen=True)
class Pair:
    winner: Drawing
    loser: Drawing


def pair(seed: int, index: int, split: str = "train") -> Pair:
    """Two drawings of one caption, the winner chosen with probability sigmoid((u - u') / LABEL_TEMPERATURE)."""
    rng = np.random.default_rng([seed, PAIRS, index])
    asked = world.random_scene(rng, split=split)
    text = world.caption(asked, int(rng.integers(world.CAPTION_VARIANTS)))
    vivid, soft = (
        Drawing(text, asked, world.with_errors(asked, rng, rate), severities(rng, spread), int(rng.integers(2**62)))
        for rate, spread in GENERATORS
    )
    vivid_wins = rng.random() < 1 / (1 + np.exp((soft.utility - vivid.utility) / LABEL_TEMPERATURE))
    return Pair(vivid, soft) if vivid_wins else Pair(soft, vivid)


def labelled(seed: int, index: int) -> Drawing:
    """A drawing for teaching readers (the judge, the scorers): one to three objects, every defect, any combination.

    A third is nearly clean, so that good images are read as well as bad ones.
    """
    rng = np.random.default_rng([seed, LABELLED, index])
    scene = world.random_scene(rng, counts=(1, 1, 2, 2, 2, 2, 2, 3))
    spread = {name: (1.0, 6.0, 1.0) if rng.random() < 0.33 else (1.0, 1.3, 1.0) for name in world.DEFECTS}
    return Drawing(
        world.caption(scene, int(rng.integers(world.CAPTION_VARIANTS))),
        scene,
        scene,
        severities(rng, spread),
        int(rng.integers(2**62)),
    )
