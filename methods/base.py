"""The contract of a method: what it is trained on, and how denoising errors become a loss.

A method never touches a model, a file or a device. The shared loop (bench/training/train.py) makes the errors, and the
shared experiment makes or loads what `pairing` asks for, so a new method is one small file; methods/README.md adds
one in ten minutes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar, NamedTuple, TypeVar

from torch import Tensor

from bench.methods.signals import Signal

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


class Products(NamedTuple):
    """Inner products with the policy's difference on the winner, fp32 `[B]`, each a mean over C, H, W.

    With p the policy's and r the reference's predicted noise, w on the winner and l on the loser: `losers` is
    <p_w - noise, p_l - noise>, None without losers; `reference` is <p_w - noise, r_w - noise>, None without a
    reference. Gradients go back through p.
    """

    losers: Tensor | None
    reference: Tensor | None


class Facts(NamedTuple):
    """What a loss is told of every sample besides its errors, `[B]`, fp32 where nothing else is said.

    They are of the forward process x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, whatever a model was made to predict.
    """

    timestep: Tensor  # int64, 0 to T - 1
    log_snr: Tensor  # log(a_t / (1 - a_t))
    alpha_bar: Tensor  # a_t
    alpha_bar_previous: Tensor  # a_{t-1}, and 1 before the first timestep
    products: Products | None = None  # only of a method with `needs_products`
    batch_mean: Tensor | None = None  # []: of the method's `statistic`; None where it has none, and while it is made


class Method(ABC):
    """One way to align a model. Its hyperparameters are the arguments of its constructor.

    Each has a type (numbers, text, booleans, `Literal`, lists), perhaps a default, and a line `name: what it is` in the
    constructor's docstring. Any of them may stand in a suite's iteration. A wrong value raises ValueError.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    pairing: ClassVar[Pairing]
    needs_reference: ClassVar[bool]
    needs_products: ClassVar[bool] = False
    signals: ClassVar[tuple[Signal, ...]] = ()
    start: ClassVar[float | None] = None  # the loss of every sample while policy and reference are equal, if it is one

    @abstractmethod
    def loss(self, policy: Errors, reference: Errors | None, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of every sample `[B]` and some or all of the declared `signals`, each `[B]`.

        `reference` is None when no reference was run; a method with `needs_reference` always gets one.
        """

    def statistic(self, policy: Errors, reference: Errors | None, facts: Facts) -> Tensor:
        """Return what `facts.batch_mean` is the mean of, `[B]`, where a loss needs to know the whole batch.

        The mean is over the global batch, all micro-batches and processes, and without gradient. A method that
        overrides this pays for a pass of policy and reference over the batch before the one that is learned from.
        """
        raise NotImplementedError

    @classmethod
    def has_statistic(cls) -> bool:
        """Whether the loss depends on a mean over the whole batch."""
        return cls.statistic is not Method.statistic

    @abstractmethod
    def next_reference(self, base: Weights, previous: Weights) -> Weights | None:
        """Choose the reference of the next iteration: the untuned `base`, the `previous` result, or None.

        For self-play these weights are the opponent too: they make the losers.
        """
