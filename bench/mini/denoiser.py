"""The miniature's text encoder and UNet, trained together from nothing on the flawed corpus."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.mini.fit import fit
from bench.mini.text import MAX_LENGTH

WIDTH = 128  # of the text encoder, and so of the UNet's cross-attention
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER: dict[str, Any] = {  # SD-1.5's, letter for letter
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
NULL_RATE = 0.1  # captions replaced by the empty one, for classifier-free guidance


class Denoiser(nn.Module):
    """Text encoder and UNet as one module: tokens in, predicted noise out."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(**UNET)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """noisy [B, 4, 8, 8], timesteps [B], tokens [B, L] -> noise [B, 4, 8, 8]."""
        return self.unet(noisy, timesteps, self.text(tokens).last_hidden_state).sample


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    ).input_ids


def train(
    latents: np.ndarray,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    checkpoints: Path,
    *,
    seed: int,
    cycles: list[tuple[int, float]],
    batch_size: int = 64,
    device: str = "cpu",
) -> Denoiser:
    """Train on scaled latents [N, 4, 8, 8] with the plain noise-prediction loss; returns the averaged weights.

    `cycles` are (steps, learning rate): each anneals to 0, the next starts from its average (warm restarts).
    """
    torch.manual_seed(seed)
    model = Denoiser(tokenizer).to(device)
    # PyTorch's fused attention is ten times slower than the plain one in bf16 backward on a CPU
    model.unet.set_attn_processor(AttnProcessor())
    model.text.set_attn_implementation("eager")
    tokens, null = tokenise(tokenizer, captions).to(device), tokenise(tokenizer, [""]).to(device)
    pool = torch.from_numpy(np.ascontiguousarray(latents)).to(device)
    alpha_bar = PNDMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    first = 0
    for number, (steps, lr) in enumerate(cycles):
        loss = partial(_loss, model, pool, tokens, null, alpha_bar, batch_size, seed * 1_000_003 + first)
        model = fit(
            model,
            loss,
            steps=steps,
            lr=lr,
            checkpoint=checkpoints / f"denoiser{number}.pt",
            description="denoiser",
            ema=0.999,
            warmup=400,
        )
        first += steps
    model.unet.set_attn_processor(AttnProcessor2_0())
    model.text.set_attn_implementation("sdpa")
    return model


def _loss(
    model: Denoiser,
    pool: Tensor,
    tokens: Tensor,
    null: Tensor,
    alpha_bar: Tensor,
    batch_size: int,
    seed: int,
    step: int,
) -> Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, eq. 14) on the batch of one step."""
    generator = torch.Generator().manual_seed(seed + step)
    picks = torch.randint(len(pool), (batch_size,), generator=generator)
    timesteps = torch.randint(len(alpha_bar), (batch_size,), generator=generator).to(pool.device)
    noise = torch.randn((batch_size, *pool.shape[1:]), generator=generator).to(pool.device)
    dropped = (torch.rand(batch_size, 1, generator=generator) < NULL_RATE).to(pool.device)
    level = alpha_bar[timesteps][:, None, None, None]
    noisy = level.sqrt() * pool[picks] + (1 - level).sqrt() * noise
    with torch.autocast(noise.device.type, torch.bfloat16):
        prediction = model(noisy, timesteps, torch.where(dropped, null, tokens[picks]))
    return (prediction.float() - noise).square().mean()


def assemble(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> StableDiffusionPipeline:
    """Put the parts into a StableDiffusionPipeline and save it in half precision."""
    scheduler = PNDMScheduler(**SCHEDULER)
    scheduler.register_to_config(clip_sample=False)  # no setting of this class, but what others made from it need
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(folder)
    # transformers would load half-precision weights as such, diffusers in fp32, and the two do not mix
    pipe.text_encoder.config.dtype = torch.float32
    pipe.text_encoder.config.save_pretrained(folder / "text_encoder")
    return pipe.to(torch.float32)
