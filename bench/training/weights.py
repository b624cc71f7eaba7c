"""A policy's weights around a training: where they lie, what is kept of them, and their moving average."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from bench.models import adapters, load_unet, save_unet
from bench.training.checkpoint import copied


def moving_average(weights: list[nn.Parameter], decay: float) -> EMAModel:
    """a <- decay a + (1 - decay) w after every step, a being the weights w before the first.

    Left to itself diffusers' class takes a <- w at the first step and then min(decay, n / (9 + n)) at step n: a ramp
    under which 0.999 means 0.7 at step 20 and is reached at 9,000, later than most trainings here end.
    """
    return EMAModel(weights, decay=decay, min_decay=decay, update_after_step=-1, foreach=True)


def place(unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """Move a UNet for training; eval mode keeps dropout, if a configuration has any, out of the errors."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return unet.to(device, memory_format=layout).eval()


def copied_weights(policy: UNet2DConditionModel) -> Callable[[Path], None]:
    """What writes the weights as they are now, whatever becomes of the policy: `unet/`, which loads in plain diffusers,
    or the adapter alone where only that is trained."""
    if adapters.attached(policy):
        weights = copied(adapters.weights(policy))
        return lambda folder: adapters.write(weights, folder / "lora")
    with torch.device("meta"):
        twin = type(policy).from_config(policy.config)
    twin.load_state_dict(copied(policy.state_dict()), assign=True)
    return lambda folder: save_unet(twin, folder / "unet")


def load_weights(policy: UNet2DConditionModel, folder: Path) -> None:
    if adapters.attached(policy):
        adapters.load(policy, folder / "lora")
    else:
        policy.load_state_dict(load_unet(folder / "unet").state_dict())
