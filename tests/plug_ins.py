"""Methods as others would write them outside this repository: each needs another part of the contract."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.methods.base import Errors, Facts, Method, Pairing, Products, Weights
from bench.methods.preference import SIGNALS, START, preference_loss
from bench.methods.signals import Signal


class DiffusionKTO(Method):
    """Winners are desirable, losers are not, each judged against the batch (Li et al., arXiv 2404.04465).

    With g = reference's error - policy's error and kl the batch's mean of it, the loss of a pair is the mean of
    desirable_weight * (1 - sigmoid(beta (g_w - kl))) and 1 - sigmoid(-beta (g_l - kl)).
    """

    name = "diffusion_kto"
    title = "Diffusion-KTO"
    pairing = Pairing.HUMAN
    needs_reference = True
    signals = (Signal("kl", "mean gain", "how much lower the policy's error is than the reference's, over the batch"),)

    def __init__(self, beta: float, desirable_weight: float = 1.0):
        """beta: how fast a gain becomes certain.

        desirable_weight: of winners against losers. Two in three of the paper's images are losers.
        """
        self.beta, self.desirable_weight = beta, desirable_weight

    def statistic(self, policy: Errors, reference: Errors, facts: Facts) -> Tensor:
        assert facts.batch_mean is None
        return 0.5 * (reference.winner - policy.winner + reference.loser - policy.loser)

    def loss(self, policy: Errors, reference: Errors, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        won = (self.beta * (reference.winner - policy.winner - facts.batch_mean)).sigmoid()
        lost = (-self.beta * (reference.loser - policy.loser - facts.batch_mean)).sigmoid()
        return 0.5 * (self.desirable_weight * (1 - won) + 1 - lost), {"kl": facts.batch_mean.expand_as(won)}

    def next_reference(self, base: Weights, previous: Weights) -> Weights:
        return base


class MaPO(Method):
    """A margin without a reference (Hong et al., arXiv 2406.06424): w - beta logsigmoid(T (f(w) - f(l))),
    f(L) = s L / (exp(s L) - 1)."""

    name = "mapo"
    title = "MaPO"
    pairing = Pairing.HUMAN
    needs_reference = False

    def __init__(self, beta: float = 0.1, scale: float = 0.5, temperature: float = 1000.0):
        self.beta, self.scale, self.temperature = beta, scale, temperature

    def loss(self, policy: Errors, reference: Errors | None, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        winner, loser = (self.scale * error / (self.scale * error).expm1() for error in policy)
        return policy.winner - self.beta * F.logsigmoid(self.temperature * (winner - loser)), {}

    def next_reference(self, base: Weights, previous: Weights) -> None:
        return None


class DSPO(Method):
    """Score matching towards the preferred (Zhu et al. 2025): the mean of [(p_w - n) - c (p_w - r_w)]^2 over the latent
    with c = beta (1 - sigmoid(x)), x the logit of Diffusion-DPO.

    With <.,.> = <p_w - n, r_w - n> that is (1 - c)^2 w + 2 c (1 - c) <.,.> + c^2 w_ref.
    """

    name = "dspo"
    title = "DSPO"
    pairing = Pairing.HUMAN
    needs_reference = True
    needs_products = True

    def __init__(self, beta: float = 0.001):
        self.beta = beta

    def loss(self, policy: Errors, reference: Errors, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        logit = -0.5 * self.beta * ((policy.winner - reference.winner) - (policy.loser - reference.loser))
        c = self.beta * (1 - logit.sigmoid())
        cross = facts.products.reference
        return (1 - c) ** 2 * policy.winner + 2 * c * (1 - c) * cross + c**2 * reference.winner, {}

    def next_reference(self, base: Weights, previous: Weights) -> Weights:
        return base


def safeguarded(errors: Errors, products: Products, mu: float) -> Errors:
    """Errors of the same values, of which the loser's sends back only as much as the winner can bear: lambda =
    min(1, (1 - mu) |g_w|^2 / <g_l, g_w>), and 1 where the two agree (SDPO, AIDC-AI/Diffusion-SDPO), pair by pair."""
    share = ((1 - mu) * errors.winner / products.losers).clamp(0, 1)
    share = torch.where(products.losers > 0, share, 1.0).detach()
    return Errors(errors.winner, share * errors.loser + (1 - share) * errors.loser.detach())


class SDPO(Method):
    """Diffusion-DPO with a safeguard for the winner."""

    name = "sdpo"
    title = "SDPO"
    pairing = Pairing.HUMAN
    needs_reference = True
    needs_products = True
    signals = SIGNALS
    start = START

    def __init__(self, beta: float, mu: float = 0.9):
        self.beta, self.mu = beta, mu

    def loss(self, policy: Errors, reference: Errors, facts: Facts) -> tuple[Tensor, dict[str, Tensor]]:
        return preference_loss(safeguarded(policy, facts.products, self.mu), reference, self.beta)

    def next_reference(self, base: Weights, previous: Weights) -> Weights:
        return base
