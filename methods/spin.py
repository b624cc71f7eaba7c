"""SPIN-Diffusion (Yuan et al., arXiv 2402.10210): self-play, no human loser is ever read."""

from __future__ import annotations

from methods.base import Pairing, Weights
from methods.diffusion_dpo import DiffusionDPO


class SPIN(DiffusionDPO):
    """The preference loss between preferred images and samples of the previous iteration.

    Eq. 4.9 of the paper in the form used for its experiments (C.6), with the per-timestep weight taken as
    constant. Reference, opponent and starting point of iteration k + 1 are all the result of iteration k.
    """

    name = "spin"
    title = "SPIN-Diffusion"
    pairing = Pairing.SELF_PLAY

    def next_reference(self, base: Weights, previous: Weights) -> Weights:
        return previous
