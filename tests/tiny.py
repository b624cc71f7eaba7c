"""A random Stable Diffusion pipeline: the real classes, at a size that takes no time."""

from __future__ import annotations

import string

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 8


def make_tokenizer() -> CLIPTokenizer:
    """Letters, and a few merges so that common words are single tokens."""
    merges = [("r", "e"), ("re", "d</w>"), ("a", "t</w>"), ("c", "at</w>")]
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    words = [*letters, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def make_unet(**changes: object) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**(settings | changes)).eval()


def make_pipeline() -> StableDiffusionPipeline:
    """Random weights, the same ones at every call; the VAE maps 64x64 images to 4x8x8 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        vae = AutoencoderKL(
            sample_size=64,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        pipe = StableDiffusionPipeline(
            vae=vae.eval(),
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer,
            unet=make_unet(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
