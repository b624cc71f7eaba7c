"""What a training starts from and what it leaves: policy and reference off the disk, the result onto it."""

from __future__ import annotations

import copy
from pathlib import Path

from diffusers import UNet2DConditionModel

from bench import models
from bench.models import adapters
from bench.models.frozen import Weights
from bench.training.recipe import TrainSettings


def load_models(
    settings: TrainSettings, previous: Weights, reference: Weights | None, seed: int
) -> tuple[UNet2DConditionModel, UNet2DConditionModel | None]:
    """Policy and reference. A policy that trains an adapter on the reference's weights is the reference itself,
    with the adapter off; every iteration starts a new adapter, on weights the last one was merged into."""
    policy = models.load_unet(previous.folder)
    if settings.lora_rank:
        adapters.attach(policy, settings.lora_rank, seed, settings.first_step)
    if reference is None:
        return policy, None
    shared = settings.lora_rank is not None and reference.key == previous.key
    return policy, policy if shared else models.load_unet(reference.folder)


def save_result(policy: UNet2DConditionModel, folder: Path) -> None:
    """`unet/` with any adapter merged, and the adapter alone; the policy itself is left as it is."""
    if adapters.attached(policy):
        adapters.save(policy, folder / "lora")
        policy = copy.deepcopy(policy)
        adapters.merge(policy)
    models.save_unet(policy, folder / "unet")
