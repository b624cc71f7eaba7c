"""What a run does, in order: `bench run` does it, `bench plan` counts it, and neither can leave out what is named here.

A stage says what is made and how much of it; how it is made is experiment.py's, what it takes is costs/plan.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bench.methods.base import Pairing
from bench.storage.runs import BASE, Result, results
from bench.suites import Iteration, Suite
from bench.training.batches import sample_order

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """An iteration of a method, and the samples it takes from the endless shuffled order: `first` and how many."""

    method: str
    iteration: int
    settings: Iteration
    first: int
    samples: int

    def pairs(self, seed: int, size: int) -> np.ndarray:
        """The pairs among `size` that it sees, ascending, int64 [P]."""
        return np.unique(sample_order(seed, self.first, self.samples, size))

    def count(self, seed: int, size: int) -> int:
        """How many they are, without laying out whole epochs."""
        to_epoch = -self.first % size
        if self.samples >= to_epoch + size:
            return size
        if self.samples <= to_epoch or to_epoch == 0:
            return self.samples
        return len(self.pairs(seed, size))


@dataclass(frozen=True)
class Opponent(Span):
    """Self-play only: the reference makes a loser for every pair that the iteration sees."""


@dataclass(frozen=True)
class Training(Span):
    """The iteration itself, with the results inside it and at its end."""


@dataclass(frozen=True)
class Given:
    """A model that is compared as it is: its UNet, from wherever it is found, is put where those trained here are."""

    result: Result
    spec: str


@dataclass(frozen=True)
class Evaluation:
    """Samples and scores of one result, on every prompt set and at every guidance scale."""

    result: Result


Stage = Opponent | Training | Given | Evaluation


def walk(suite: Suite, method: str, iterations: int) -> Iterator[Stage]:
    """The stages of one run; what all runs of a suite share, its encodings, is made before the first."""
    yield Evaluation(BASE)
    made, first = results(suite, method, iterations), 0
    if method in suite.models:
        yield Given(made[0], suite.models[method])
        yield Evaluation(made[0])
        return
    for number, settings in enumerate(suite.schedule(method, iterations), 1):
        samples = settings.steps * suite.training(method).batch_size
        if suite.method(method).pairing is Pairing.SELF_PLAY:
            yield Opponent(method, number, settings, first, samples)
        yield Training(method, number, settings, first, samples)
        first += samples
        for result in made:
            if result.iteration == number:
                yield Evaluation(result)


def dispatch(stage: Stage, to: dict[type, Callable[[Any], T]]) -> T:
    """What `to` does with a stage of this kind; a kind that it does not know is an error, not nothing."""
    return to[type(stage)](stage)
