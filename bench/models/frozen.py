"""What no run of a suite changes: the pipeline it starts from, of which only the network is ever replaced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel

from bench import models
from bench.costs.operations import Operations
from bench.sampling.sample import latent_shape
from bench.storage.cache import count_truncated


class Weights(NamedTuple):
    """A UNet on disk, and the hash of all that made it."""

    folder: Path
    key: str


class Frozen:
    """Autoencoder, text encoder and schedule of a pipeline folder, and the base UNet's place.

    The UNet itself is not kept: `unet` loads what is sampled from, `pipe.unet` is a shape on the meta device.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: str):
        self.device, self.dtype = device, models.DTYPES[dtype]
        self.base = Weights(folder / "unet", models.weights_fingerprint(folder))
        self.pipe = models.load_pipeline(folder, device, self.dtype)
        self.pipe.unet.to("meta")
        self.latent_shape = latent_shape(self.pipe.unet)
        self.operations = Operations(self.pipe, self.pipe.tokenizer.model_max_length)

    def unet(self, weights: Weights) -> UNet2DConditionModel:
        """A UNet to sample from, in the precision of the frozen models."""
        return models.load_unet(weights.folder, self.dtype).to(self.device)

    def truncated(self, prompts: Sequence[str]) -> int:
        """How many of these prompts the text encoder does not read to their end."""
        return count_truncated(self.pipe.tokenizer, prompts)
