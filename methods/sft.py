"""Supervised fine-tuning: go on with the pretraining loss, on the preferred images only."""

from __future__ import annotations

from torch import Tensor

from bench.methods.base import Errors, Facts, Method, Pairing, Weights
from bench.methods.signals import WINNER_DRIFT
from bench.methods.weightings import WEIGHTINGS, Weighting


class SFT(Method):
    """Loss = the winner's denoising error (Ho et al. 2020, eq. 14, as a mean over the latent), times its weight."""

    name = "sft"
    title = "SFT"
    pairing = Pairing.WINNER
    needs_reference = False
    signals = (WINNER_DRIFT,)

    def __init__(self, weighting: Weighting = "constant"):
        """weighting: of timesteps, multiplies the loss (methods/weightings.py)."""
        self.weighting = weighting

    def loss(self, policy: Errors, reference: Errors | None, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        loss = WEIGHTINGS[self.weighting](facts) * policy.winner
        if reference is None:
            return loss, {}
        return loss, {WINNER_DRIFT.name: (policy.winner - reference.winner).detach()}

    def next_reference(self, base: Weights, previous: Weights) -> None:
        return None
