"""Weights of timesteps by name: a factor for every sample, fp32 `[B]`, that its error or its logit is multiplied by.

Errors here are of the predicted noise, so a weight of 1 is already one: that of Ho et al. 2020, eq. 14.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from bench.methods.base import Facts

Weighting = Literal["constant", "min_snr", "h_squared"]


def constant(facts: Facts) -> Tensor:
    """1 for every timestep."""
    return torch.ones_like(facts.alpha_bar)


def min_snr(facts: Facts, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma) / snr: low noise counts less (Hang et al., arXiv 2303.09556, for errors of the noise)."""
    return (gamma / facts.log_snr.exp()).clamp(max=1)


def h_squared(facts: Facts) -> Tensor:
    """h_t^2 of SPIN-Diffusion, eq. C.6 (arXiv 2402.10210), where steps of the reverse process are compared:

        h_t = sqrt(1 - a_{t-1} - s_t^2) - sqrt(a_{t-1} / a_t) sqrt(1 - a_t).

    s_t is that of DDPM, s_t^2 = (1 - a_{t-1}) / (1 - a_t) (1 - a_t / a_{t-1}) (Ho et al. 2020, eq. 7), with which

        h_t^2 = (1 - c)^2 / (c (1 - a_t)),    c = a_t / a_{t-1},

    the weight of their eq. 12 without 1 / (2 s_t^2); computed so, because the other form is a difference of nearly
    equal numbers. On SD-1.5's schedule it is 8.5e-4 at the first timestep, 1.7e-5 at the 163rd, its least, and 1.5e-4
    at the last: a beta for it is some ten thousand times one for `constant`. Infinite where a_t is 0.
    """
    kept = facts.alpha_bar / facts.alpha_bar_previous
    return (1 - kept).square() / (kept * (1 - facts.alpha_bar))


WEIGHTINGS: dict[Weighting, Callable[[Facts], Tensor]] = {
    "constant": constant,
    "min_snr": min_snr,
    "h_squared": h_squared,
}
