"""The published training recipe, written down for comparison: nothing cached, one pair at a time.

As the released code of Diffusion-DPO and its descendants does a step (and diffusers' text-to-image example for SFT):
every micro-batch goes through the VAE and the text encoder again, the reference and the policy each run once for it,
gradients add up over the micro-batches of a batch, then clipping, AdamW and a schedule. Frozen parts run in the
mixed precision; the policy's weights are fp32 under autocast. What the recipe leaves to data-loading workers (reading,
decoding and cropping images) is not charged to it: images come as tensors. It shares no code with
bench/training/.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

BETA = 2000.0  # of Diffusion-DPO on SD-1.5; no matter for the speed


@dataclass(frozen=True)
class Recipe:
    """paired: preference loss on winner and loser, else the winner's denoising loss alone (SFT)."""

    paired: bool
    batch_size: int
    micro_batch: int = 1
    lr: float = 1e-8
    max_grad_norm: float = 1.0


class Baseline:
    """One optimizer step at a time. Takes over `policy`; the pipeline's other parts are only read."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        policy: UNet2DConditionModel,
        recipe: Recipe,
        precision: torch.dtype = torch.float32,
    ):
        self.vae, self.text_encoder, self.tokenizer = pipe.vae, pipe.text_encoder, pipe.tokenizer
        self.recipe, self.precision, self.device = recipe, precision, policy.device
        self.policy = policy.train()
        self.reference = None
        if recipe.paired:
            self.reference = copy.deepcopy(policy).to(precision).eval().requires_grad_(False)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe.lr, weight_decay=1e-2)
        self.rate = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)

    def step(self, winners: Tensor, losers: Tensor | None, prompts: Sequence[str]) -> float:
        """Train on one batch: images fp32 `[B, 3, H, W]` in -1..1. Returns the mean loss."""
        total, micro = 0.0, self.recipe.micro_batch
        for start in range(0, self.recipe.batch_size, micro):
            rows = slice(start, start + micro)
            pixels = winners[rows] if losers is None else torch.cat([winners[rows], losers[rows]])
            loss = self.loss(pixels.to(self.device), prompts[rows])
            (loss * len(prompts[rows]) / self.recipe.batch_size).backward()
            total += loss.item() * len(prompts[rows])
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        return total / self.recipe.batch_size

    def loss(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean loss of a micro-batch; of pairs, the first half of `pixels` are the winners."""
        noisy, noise, timesteps, context = self.inputs(pixels, prompts)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            prediction = self.policy(noisy, timesteps, encoder_hidden_states=context).sample
        if self.reference is None:
            return F.mse_loss(prediction.float(), noise.float())
        with torch.no_grad():
            given = self.reference(noisy, timesteps, encoder_hidden_states=context).sample
        return preference_loss(errors(prediction, noise), errors(given, noise))

    @torch.no_grad()
    def inputs(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode images and prompts, and add noise: one draw of noise and timestep for both sides of a pair."""
        sides = len(pixels) // len(prompts)
        latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.sample() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents[: len(prompts)]).repeat(sides, 1, 1, 1)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(prompts),), device=self.device).repeat(sides)
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            return_tensors="pt",
            max_length=self.tokenizer.model_max_length,
        ).input_ids.to(self.device)
        context = self.text_encoder(tokens)[0].repeat(sides, 1, 1)
        return self.scheduler.add_noise(latents, noise, timesteps), noise, timesteps, context


def errors(prediction: Tensor, noise: Tensor) -> Tensor:
    return (prediction.float() - noise.float()).pow(2).mean(dim=(1, 2, 3))


def preference_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """-log sigmoid(-beta / 2 * ((w - l) - (w_ref - l_ref))), the mean over pairs (Wallace et al. 2023)."""
    winner, loser = policy.chunk(2)
    winner_reference, loser_reference = reference.chunk(2)
    inside = -0.5 * BETA * ((winner - loser) - (winner_reference - loser_reference))
    return -F.logsigmoid(inside).mean()
