"""What one pass of each of a suite's models takes: counted once, and only when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Protocol

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from bench.costs import cost
from bench.sampling.sample import SCHEDULERS, latent_shape


class Parts(Protocol):
    """The networks of a pipeline; on the meta device they count as well as loaded."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


class Operations:
    """Floating-point operations of a pipeline's networks, as `cost` counts them."""

    def __init__(self, parts: Parts, tokens: int):
        self.parts, self.tokens, self.shape = parts, tokens, latent_shape(parts.unet)
        self._counted: dict[Hashable, int] = {}

    @cached_property
    def forward(self) -> int:
        """One UNet pass for one latent."""
        return cost.unet_flops(self.parts.unet, self.shape, self.tokens)

    def forward_and_backward(self, checkpointing: bool, lora_rank: int | None) -> int:
        """One training pass for one latent, with what gradient checkpointing computes again."""
        return self._once(
            (checkpointing, lora_rank),
            lambda: cost.unet_training_flops(self.parts.unet, self.shape, self.tokens, checkpointing, lora_rank),
        )

    @cached_property
    def coding(self) -> tuple[int, int]:
        """Encoding and decoding one image."""
        return cost.vae_flops(self.parts.vae, self.shape)

    @cached_property
    def text(self) -> int:
        """Encoding one prompt."""
        return cost.text_flops(self.parts.text_encoder, self.tokens)

    def images(self, count: int, *, scheduler: str, steps: int, guidance: float) -> int:
        """Sampling and decoding so many images."""
        return self._sampling(count, self.coding[1], scheduler, steps, guidance)

    def latents(self, count: int, *, scheduler: str, steps: int, guidance: float, roundtrip: bool) -> int:
        """Sampling so many latents, with `roundtrip` decoded and encoded again."""
        return self._sampling(count, sum(self.coding) if roundtrip else 0, scheduler, steps, guidance)

    def _sampling(self, count: int, after: int, scheduler: str, steps: int, guidance: float) -> int:
        evaluations = solver_evaluations(scheduler, steps)
        return cost.sampling_flops(self.forward, after, count, steps=evaluations, guidance=guidance)

    def _once(self, key: Hashable, count: Callable[[], int]) -> int:
        """Iterations mostly share their training step."""
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]


def solver_evaluations(scheduler: str, steps: int) -> int:
    """UNet evaluations of so many steps: PNDM takes one more than it is asked for."""
    solver = SCHEDULERS[scheduler](DDIMScheduler().config)
    solver.set_timesteps(steps)
    return len(solver.timesteps)
