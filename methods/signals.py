"""What is logged of a training: each signal says itself what it means and when it is alarming.

Nothing here imports torch: protocol.json keeps the declarations of a run's signals, and reports read them from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """One end of what a signal should be when a training ends. Limits are conventions and prove nothing."""

    amber: float
    red: float | str  # a number, or the name of the signal that it must not pass
    amber_reading: str
    red_reading: str


@dataclass(frozen=True)
class Signal:
    """A value of every sample that is logged as its mean over the interval, in the column `name` of history.parquet.

    With `by_timestep` also in ranges of timesteps (`<name>_t0_249` and so on), with `spread` also as the standard
    deviation over the samples (`<name>_std`).
    """

    name: str
    title: str
    meaning: str
    by_timestep: bool = False
    spread: bool = False
    start: float | None = None  # what a policy equal to its reference shows; a line in plots
    ceiling: float | None = None  # shown when every sample is won: with a loss near 0 nothing more is learned
    below: Limit | None = None
    above: Limit | None = None
    verdict: str = ""  # what the limits are about; without a name of its own the verdict has the signal's title
    fine: str = "within its limits"  # the reading when no limit is passed

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Signal:
        """The signal of a record that `dataclasses.asdict` made."""
        limits = {end: Limit(**record[end]) for end in ("below", "above") if record.get(end)}
        return cls(**{**record, **limits})


LOSS = Signal("loss", "loss", "the method's own loss; losses of different methods are different things")
WINNER_ERROR = Signal(
    "winner_error", "winner error", "the policy's denoising error on preferred images: 1 for a model that answers 0"
)
GRAD_NORM = Signal("grad_norm", "gradient norm", "length of the gradient over all trained weights, before clipping")
EVERY_TRAINING = (LOSS, WINNER_ERROR, GRAD_NORM)
# columns of history.parquet that no method's signal may be called
TAKEN = (
    "method",
    "iteration",
    "step",
    "lr",
    "pairs_per_s",
    "images_per_s",
    "mfu",
    "peak_memory_gib",
    *(signal.name for signal in EVERY_TRAINING),
)

WINNER_DRIFT = Signal(
    "winner_drift",
    "winner error drift",
    "the policy's error on the winner minus the reference's: below 0 is better",
    by_timestep=True,
    start=0.0,
    verdict="Error drift",
    fine="the winners are denoised better than by the reference",
    above=Limit(
        0.0,
        "loser_drift",
        "both errors rise, the loser's more: the gap grows by getting worse at both",
        "the winners are denoised worse than by the reference",
    ),
)
LOSER_DRIFT = Signal(
    "loser_drift",
    "loser error drift",
    "the policy's error on the loser minus the reference's",
    by_timestep=True,
    start=0.0,
)
IMPLICIT_ACCURACY = Signal(
    "implicit_accuracy",
    "implicit accuracy",
    "share of pairs whose winner the policy prefers, ties half",
    start=0.5,
    ceiling=1.0,
    verdict="Competition too easy or too hard",
    fine="winners and losers are told apart, and not yet always",
    below=Limit(0.55, 0.5, *["too hard: the policy can hardly tell winners from losers"] * 2),
    above=Limit(0.9, 0.97, *["too easy: the losers no longer teach anything"] * 2),
)
LOGIT = Signal(
    "logit",
    "logit",
    "what the logistic function turns into the probability that the winner wins",
    spread=True,
    start=0.0,
)

# what runs logged before their protocols said so
UNDECLARED = (IMPLICIT_ACCURACY, LOGIT, WINNER_DRIFT, LOSER_DRIFT, *EVERY_TRAINING)
