"""SPIN-Diffusion (Yuan et al., arXiv 2402.10210): self-play, no human loser is ever read."""

from __future__ import annotations

from torch import Tensor

from bench.methods import preference
from bench.methods.base import Errors, Facts, Method, Pairing, Weights
from bench.methods.weightings import WEIGHTINGS, Weighting


class SPIN(Method):
    """The preference loss between preferred images and samples of the previous iteration.

    Eq. 4.9 of the paper in the form used for its experiments (C.6), whose weight h_t^2 is `weighting: h_squared`; the
    paper does not say whether its beta of 2000 includes it, and read as the constant weight of Diffusion-DPO it does.
    Reference, opponent and starting point of iteration k + 1 are all the result of iteration k.
    """

    name = "spin"
    title = "SPIN-Diffusion"
    pairing = Pairing.SELF_PLAY
    needs_reference = True
    signals = preference.SIGNALS
    start = preference.START

    def __init__(self, beta: float, weighting: Weighting = "constant"):
        """Raises ValueError for a beta that is not above 0.

        beta: how closely the policy is held to the reference; 2000 to 5000 for SD-1.5 (methods/preference.py).
        weighting: of timesteps, multiplies the logit (methods/weightings.py).
        """
        self.beta = preference.require_positive(beta)
        self.weighting = weighting

    def loss(self, policy: Errors, reference: Errors | None, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        assert reference is not None
        return preference.preference_loss(policy, reference, self.beta * WEIGHTINGS[self.weighting](facts))

    def next_reference(self, base: Weights, previous: Weights) -> Weights:
        return previous
