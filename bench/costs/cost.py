"""Floating-point operations of a run, counted by torch on weightless twins of the models.

A multiplication and an addition count as two operations. Only matrix products, convolutions and attention are
counted; they are nearly all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextModel

from bench.models import adapters

BACKWARD = 2  # a backward pass costs two forward passes: gradients of the inputs and of the weights
ADAPTER = 1  # ... and one where an adapter alone is trained: of the frozen weights there are none


def flops(call: Callable[[], object]) -> int:
    """Operations of whatever `call` runs; attention in its plain form, for the fused one of a CPU is not counted."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def unet_flops(unet: UNet2DConditionModel, latent_shape: tuple[int, int, int], tokens: int) -> int:
    """One forward pass of one sample: latent C, h, w and the number of text tokens."""
    twin = _weightless(unet)
    sample = torch.empty(1, *latent_shape, device="meta")
    context = torch.empty(1, tokens, unet.config.cross_attention_dim, device="meta")
    return flops(lambda: twin(sample, torch.zeros(1, device="meta"), encoder_hidden_states=context))


def unet_training_flops(
    unet: UNet2DConditionModel,
    latent_shape: tuple[int, int, int],
    tokens: int,
    checkpointing: bool = False,
    lora_rank: int | None = None,
) -> int:
    """A forward and a backward pass of one sample; with gradient checkpointing also what is computed again."""
    twin = _weightless(unet)
    if lora_rank:
        adapters.attach(twin, lora_rank, 0)
    if checkpointing:
        twin.enable_gradient_checkpointing()
        twin.train()
    sample = torch.empty(1, *latent_shape, device="meta")
    context = torch.empty(1, tokens, unet.config.cross_attention_dim, device="meta")
    return flops(
        lambda: twin(sample, torch.zeros(1, device="meta"), encoder_hidden_states=context).sample.sum().backward()
    )


def text_flops(encoder: CLIPTextModel, tokens: int) -> int:
    """Encoding one prompt."""
    with torch.device("meta"):
        twin = type(encoder)(encoder.config)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    return flops(lambda: twin(ids))


def vae_flops(vae: AutoencoderKL, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Encoding and decoding of one image whose latent is C, h, w."""
    twin = _weightless(vae)
    channels, height, width = latent_shape
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    image = torch.empty(1, vae.config.in_channels, height * scale, width * scale, device="meta")
    latent = torch.empty(1, channels, height, width, device="meta")
    return flops(lambda: twin.encode(image)), flops(lambda: twin.decode(latent))


def training_flops(
    forward: int, samples: int, *, paired: bool, reference: bool, adapter: bool = False, statistic: bool = False
) -> int:
    """Training all weights, or an adapter, on `samples` pairs, or single images when not `paired`.

    The policy runs forward and backward, the reference forward only. A pair with a reference is
    8 forward passes, an SFT image 3: a ratio of 2.67. With an adapter it is 6 and 2. A method with a
    `statistic` of the batch runs both forward once more.
    """
    expected = 1 if reference else 0
    policy = 1 + (ADAPTER if adapter else BACKWARD)
    return forward * samples * (2 if paired else 1) * (policy + expected + (1 + expected if statistic else 0))


def sampling_flops(forward: int, decode: int, images: int, *, steps: int, guidance: float) -> int:
    """Sampling and decoding: one UNet evaluation a step, two with classifier-free guidance."""
    return images * (forward * steps * (1 if guidance == 1 else 2) + decode)


def _weightless(model: ModelMixin) -> ModelMixin:
    """The same architecture on the meta device: shapes without storage, so counting is free at any size."""
    with torch.device("meta"):
        return type(model).from_config(model.config)
