"""The preference loss that Diffusion-DPO (arXiv 2311.12908) and SPIN-Diffusion (arXiv 2402.10210) share."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from bench.methods.base import Errors
from bench.methods.signals import IMPLICIT_ACCURACY, LOGIT, LOSER_DRIFT, WINNER_DRIFT

# The loss above this logit, 1e-20, is a constant: its gradient would change no fp32 weight, but goes back through the
# UNet as denormal numbers, on which a processor takes ten times as long.
WON = 46.0

SIGNALS = (IMPLICIT_ACCURACY, LOGIT, WINNER_DRIFT, LOSER_DRIFT)
START = math.log(2)  # the loss of a policy equal to its reference


def preference_loss(policy: Errors, reference: Errors, beta: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logistic loss on how much more the policy improved on the winner than on the loser.

    With w, l the policy's errors and w_ref, l_ref the reference's, each a mean over the latent:

        logit = -0.5 * beta * ((w - w_ref) - (l - l_ref)),    loss = -log sigmoid(min(logit, 46)).

    This is the convention of the Diffusion-DPO authors' code, in which SD-1.5 uses beta 2000 to 5000. The
    same loss elsewhere: with errors summed over the latent and no 0.5 (the paper's pseudocode, and eq. C.6 of
    SPIN-Diffusion with a constant weight), beta_sum = 0.5 * beta / (C * H * W), so 2000 on a 4x64x64 latent
    is 0.061; with mean errors and no 0.5 (the diffusers example), beta_diffusers = 0.5 * beta. A beta for every
    sample, `[B]`, is one that a weight of its timestep was multiplied into.

    Returns the loss `[B]` and the signals `[B]`: `implicit_accuracy` (1 where the logit is above 0, 0.5 for a
    tie, so that an untrained policy shows 0.5), `logit`, and the drift of either error from the reference.
    """
    assert policy.loser is not None and reference.loser is not None
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


def require_positive(beta: float) -> float:
    """Return beta; raises ValueError where the loss would prefer the losers, or nothing."""
    if not beta > 0:
        raise ValueError(f"beta must be above 0, not {beta}")
    return beta
