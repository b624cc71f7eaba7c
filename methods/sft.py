"""Supervised fine-tuning: go on with the pretraining loss, on the preferred images only."""

from __future__ import annotations

from torch import Tensor

from methods.base import Errors, Method, Pairing, Weights


class SFT(Method):
    """Loss = the winner's denoising error (Ho et al. 2020, eq. 14, as a mean over the latent)."""

    name = "sft"
    title = "SFT"
    pairing = Pairing.WINNER
    needs_reference = False

    def loss(self, policy: Errors, reference: Errors | None) -> tuple[Tensor, dict[str, Tensor]]:
        if reference is None:
            return policy.winner, {}
        return policy.winner, {"winner_drift": (policy.winner - reference.winner).detach()}

    def next_reference(self, base: Weights, previous: Weights) -> None:
        return None
