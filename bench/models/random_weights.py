"""Stable Diffusion pipelines of the true shape with random, seeded weights: the whole path without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.errors import UsageError, did_you_mean
from bench.storage.stages import Stage, fingerprint

PREFIX = "random"
REMARK = (
    "random weights, so scores mean nothing; the tokenizer has the miniature's vocabulary, whose tokens for most "
    "words are shorter than CLIP's, so prompts are cut earlier"
)
SEED = 15
SD15: dict[str, dict[str, Any]] = {  # the published configuration files, as far as they differ from the defaults
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
}
NARROW: dict[str, dict[str, Any]] = {  # fewer channels, heads and text layers; everything else as it is
    "unet": {
        "block_out_channels": (8, 16, 16, 16),
        "attention_head_dim": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "layers_per_block": 1,
    },
    "vae": {"block_out_channels": (4, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
    "text_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    },
}
SHAPES = {"random:sd15": SD15, "random:sd15-small": {part: {**SD15[part], **NARROW.get(part, {})} for part in SD15}}


def is_random(weights: str | Path) -> bool:
    return str(weights).partition(":")[0] == PREFIX


def full_name(weights: str) -> str:
    """One of SHAPES; "random" alone is SD-1.5's."""
    name = "random:sd15" if weights == PREFIX else weights
    if name not in SHAPES:
        raise UsageError(
            f"model.weights: no pipeline '{weights}'{did_you_mean(weights, SHAPES)}; "
            f"random ones are {', '.join(SHAPES)}"
        )
    return name


def configurations(weights: str) -> dict[str, dict[str, Any]]:
    """The configuration of every part of such a pipeline."""
    return SHAPES[full_name(weights)]


def random_folder(weights: str, cache: Path, vocabulary: Path) -> Path:
    """The folder of such a pipeline, made on first use and kept under `cache` in half precision (2.1 GB whole).

    "random" and "random:sd15" have the shape of SD-1.5, "random:sd15-small" has it in reduced width. Equal
    names give equal weights with equal versions of torch. `vocabulary` is a tokenizer's folder.
    """
    name = full_name(weights)
    inputs = {"kind": name, "shape": SHAPES[name], "seed": SEED, "torch": torch.__version__}
    stage = Stage(cache / f"{name.replace(':', '-')}-{fingerprint(inputs)}", inputs)
    stage.make(lambda folder: random_pipeline(name, vocabulary).to(torch.float16).save_pretrained(folder))
    return stage.directory


def random_pipeline(name: str, vocabulary: Path) -> StableDiffusionPipeline:
    """A pipeline of one of SHAPES in fp32."""
    shape = SHAPES[name]
    text = shape["text_encoder"]
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary, model_max_length=text["max_position_embeddings"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return StableDiffusionPipeline(
            unet=UNet2DConditionModel(**shape["unet"]),
            vae=AutoencoderKL(**shape["vae"]),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    **text,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            scheduler=PNDMScheduler(**shape["scheduler"]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
