"""A tiny training problem; as a script, trains it under torchrun, each method into a folder of its name."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from plug_ins import DiffusionKTO
from tiny import make_unet

from bench.methods.diffusion_dpo import DiffusionDPO
from bench.models import save_unet
from bench.storage.cache import Embeddings
from bench.training.train import TrainData, TrainSettings, train

SCHEDULER = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
METHODS = (DiffusionDPO(500.0), DiffusionKTO(500.0))  # KTO's statistic is of the batch of all processes
SETTINGS = TrainSettings(steps=4, lr=1e-3, batch_size=6, micro_batch=3, prompt_dropout=0.2)


def make_data(count: int = 10) -> TrainData:
    """Winners and losers that differ in their mean, under five prompts."""
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, count, 4, 8, 8), dtype=np.float32)
    table = generator.standard_normal((5, 3, 16), dtype=np.float32)
    prompts = Embeddings(table, np.arange(count) % 5, np.zeros((3, 16), np.float32))
    return TrainData(latents[0] + 0.5, latents[1] - 0.5, prompts)


def main(place: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for method in METHODS:
        torch.manual_seed(0)
        policy = make_unet()
        settings = replace(SETTINGS, steps=10, batch_size=7)
        history = train(policy, copy.deepcopy(policy), method, make_data(), settings, SCHEDULER, 0, accelerator)
        if accelerator.is_main_process:
            save_unet(policy, place / method.name)
            (place / method.name / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
