"""LoRA (Hu et al., arXiv 2106.09685) on the attention of a UNet: few weights to train, and the rest is the reference.

peft does the work; it is an optional dependency.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.runtime.seeding import derive

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the projections of every self- and cross-attention
FILE = "pytorch_lora_weights.safetensors"  # the name under which diffusers looks for it
PREFIX = "unet."  # the component of a pipeline the weights belong to


def attach(unet: UNet2DConditionModel, rank: int, *seed: int | str) -> None:
    """Add an adapter to a UNet and freeze all else: W x becomes W x + B A x, with B = 0 and so no change at first.

    A is normal with standard deviation 1 / rank, drawn from `seed` alone. No scaling factor: alpha is the rank.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("lora", *seed))
        inject_adapter_in_model(config, unet)


def attached(unet: UNet2DConditionModel) -> bool:
    return any(".lora_A." in name for name, _ in unet.named_parameters())


@contextmanager
def switched_off(unet: UNet2DConditionModel) -> Iterator[None]:
    """Run the UNet as it was before the adapter was attached."""
    layers = [layer for _, layer in _layers(unet)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(unet: UNet2DConditionModel) -> None:
    """Add the adapter to the weights and remove it: W becomes W + B A, and the UNet is a plain one again."""
    for name, layer in _layers(unet):
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    del unet.peft_config
    unet.requires_grad_(True)


def save(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapter alone, for `pipe.load_lora_weights(folder)` on the weights it was trained from."""
    write(weights(unet), folder)


def weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter's weights under the names they are saved by."""
    return {PREFIX + name.replace(".default.", "."): weight.detach() for name, weight in _weights(unet).items()}


def write(weights: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, folder / FILE)


def load(unet: UNet2DConditionModel, folder: Path) -> None:
    """Put the weights of a saved adapter into the attached one of the same rank."""
    stored = load_file(folder / FILE)
    with torch.no_grad():
        for name, weight in _weights(unet).items():
            weight.copy_(stored[PREFIX + name.replace(".default.", ".")])


def _weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {name: weight for name, weight in unet.named_parameters() if ".lora_" in name}


def _layers(unet: UNet2DConditionModel) -> list[tuple[str, BaseTunerLayer]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer)]
