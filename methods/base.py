"""The contract of a method: what it is trained on, and how denoising errors become a loss.

A method never touches a model, a file or a device. The shared loop (bench/train.py) makes the errors, and the
shared experiment makes or loads what `pairing` asks for, so a new method is one small file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor

Weights = TypeVar("Weights")


class Pairing(str, Enum):
    """What a method is trained on."""

    WINNER = "winner"  # the preferred image alone
    HUMAN = "human"  # the preferred and the rejected image of a labelled pair
    SELF_PLAY = "self_play"  # the preferred image against a sample of the reference for the same prompt


class Errors(NamedTuple):
    """Denoising errors of one model, fp32 `[B]`: the mean over C, H, W of (noise - predicted noise)^2.

    Winner and loser of a pair are noised to the same timestep with the same noise.
    """

    winner: Tensor
    loser: Tensor | None = None


class Method(ABC):
    """One way to align a model. Its hyperparameters are the arguments of its constructor."""

    name: ClassVar[str]
    title: ClassVar[str]
    pairing: ClassVar[Pairing]
    needs_reference: ClassVar[bool]

    @abstractmethod
    def loss(self, policy: Errors, reference: Errors | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of every sample `[B]` and the signals to log, each `[B]` without gradient.

        A signal is logged as its mean, one named `*_drift` in ranges of timesteps too, `logit` with its spread.
        A method that logs `implicit_accuracy` is one whose loss is log 2 while policy and reference are equal.
        `reference` is None when no reference was run; a method with `needs_reference` always gets one.
        """

    @abstractmethod
    def next_reference(self, base: Weights, previous: Weights) -> Weights | None:
        """Choose the reference of the next iteration: the untuned `base`, the `previous` result, or None.

        For self-play these weights are the opponent too: they make the losers.
        """
