"""Diffusion-DPO (Wallace et al., arXiv 2311.12908): human pairs, the untuned model stays the reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from methods.base import Errors, Method, Pairing, Weights

# The loss above this logit, 1e-20, is a constant: its gradient would change no fp32 weight, but goes back through the
# UNet as denormal numbers, on which a processor takes ten times as long.
WON = 46.0


def preference_loss(policy: Errors, reference: Errors, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Logistic loss on how much more the policy improved on the winner than on the loser.

    With w, l the policy's errors and w_ref, l_ref the reference's, each a mean over the latent:

        logit = -0.5 * beta * ((w - w_ref) - (l - l_ref)),    loss = -log sigmoid(min(logit, 46)).

    This is the convention of the Diffusion-DPO authors' code, in which SD-1.5 uses beta 2000 to 5000. The
    same loss elsewhere: with errors summed over the latent and no 0.5 (the paper's pseudocode, and eq. C.6 of
    SPIN-Diffusion with a constant weight), beta_sum = 0.5 * beta / (C * H * W), so 2000 on a 4x64x64 latent
    is 0.061; with mean errors and no 0.5 (the diffusers example), beta_diffusers = 0.5 * beta.

    Returns the loss `[B]` and the signals `[B]`: `implicit_accuracy` (1 where the logit is above 0, 0.5 for a
    tie, so that an untrained policy shows 0.5), `logit`, and the drift of either error from the reference.
    """
    winner_drift = policy.winner - reference.winner
    loser_drift = policy.loser - reference.loser
    logit = -0.5 * beta * (winner_drift - loser_drift)
    signals = {
        "implicit_accuracy": 0.5 * (logit.sign() + 1),
        "logit": logit,
        "winner_drift": winner_drift,
        "loser_drift": loser_drift,
    }
    return -F.logsigmoid(logit.clamp(max=WON)), {name: signal.detach() for name, signal in signals.items()}


class DiffusionDPO(Method):
    """The preference loss on labelled pairs."""

    name = "diffusion_dpo"
    title = "Diffusion-DPO"
    pairing = Pairing.HUMAN
    needs_reference = True

    def __init__(self, beta: float):
        if not beta > 0:
            raise ValueError(f"beta must be above 0, not {beta}")
        self.beta = beta

    def loss(self, policy: Errors, reference: Errors | None) -> tuple[Tensor, dict[str, Tensor]]:
        return preference_loss(policy, reference, self.beta)

    def next_reference(self, base: Weights, previous: Weights) -> Weights:
        return base
