"""An example of a method in a package of its own."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bench.methods.base import Errors, Facts, Method, Pairing, Weights
from bench.methods.signals import Signal


class Hinge(Method):
    """Loss = max(0, margin - logit), or its square, with the logit of Diffusion-DPO."""

    name = "hinge"
    title = "Hinge"
    pairing = Pairing.HUMAN
    needs_reference = True
    signals = (Signal("within", "within the margin", "share of pairs that still teach something"),)

    def __init__(self, beta: float, margin: float = 1.0, power: Literal[1, 2] = 1):
        """beta: how closely the policy is held to the reference, as in Diffusion-DPO.

        margin: the logit from which on a pair counts as won.
        power: of the loss; 2 makes the pull grow with the distance to the margin.
        """
        self.beta, self.margin, self.power = beta, margin, power

    def loss(self, policy: Errors, reference: Errors | None, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        assert reference and policy.loser is not None and reference.loser is not None
        logit = -0.5 * self.beta * ((policy.winner - reference.winner) - (policy.loser - reference.loser))
        missing = (self.margin - logit).clamp(min=0)
        return missing**self.power, {"within": missing.gt(0).float()}

    def next_reference(self, base: Weights, previous: Weights) -> Weights:
        return base
