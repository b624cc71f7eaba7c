"""Diffusion-DPO (Wallace et al., arXiv 2311.12908): human pairs, the untuned model stays the reference."""

from __future__ import annotations

from torch import Tensor

from bench.methods import preference
from bench.methods.base import Errors, Facts, Method, Pairing, Weights
from bench.methods.weightings import WEIGHTINGS, Weighting


class DiffusionDPO(Method):
    """The preference loss on labelled pairs."""

    name = "diffusion_dpo"
    title = "Diffusion-DPO"
    pairing = Pairing.HUMAN
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
        return base
