"""The shapes of a suite's models without their weights: what counting and planning need, of any size, in no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from bench import models
from bench.errors import BenchError, first_line
from bench.models.random_weights import PREFIX, configurations, is_random
from bench.runtime.hub import is_hub_id
from bench.sampling.sample import latent_shape

SD15_NAMES = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5")
PARTS = ("unet", "vae", "text_encoder")


class Architecture(NamedTuple):
    """A Stable Diffusion pipeline on the meta device."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel

    @property
    def tokens(self) -> int:
        """How many tokens of a prompt the UNet sees."""
        return self.text_encoder.config.max_position_embeddings

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of an image in the sampler's hands."""
        _, height, width = latent_shape(self.unet)
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return height * scale, width * scale


def architecture(weights: str) -> Architecture:
    """Of whatever `model.weights` may name; of a hub id only the small configuration files are read.

    SD-1.5 is known by name, so it can be planned for where it is not at hand.
    """
    if is_random(weights) or weights in SD15_NAMES:
        configs = configurations(weights if is_random(weights) else PREFIX)
    else:
        folder = _hub_configs(weights) if is_hub_id(weights) else models.weights_folder(weights)
        configs = {part: _read(folder / part / "config.json") for part in PARTS}
    with torch.device("meta"):
        return Architecture(
            UNet2DConditionModel.from_config(configs["unet"]),
            AutoencoderKL.from_config(configs["vae"]),
            CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        )


def _hub_configs(weights: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(weights, allow_patterns=["*/config.json"]))
    except Exception as error:  # the hub's client raises errors of several libraries
        cause = first_line(error)
        raise BenchError(
            f"{weights}: no such folder, and its configuration cannot be read from the hub: {cause}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read as a model's configuration: {error}") from error
