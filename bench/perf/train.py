"""`bench perf train`: pairs per second of the shared loop, beside the FLOP floor and the published recipe."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from bench import models, registry
from bench.costs import cost, memory
from bench.experiment import build_method
from bench.methods.base import Method, Pairing
from bench.perf import compared, interleave, matmul_flops, protocol
from bench.perf.baseline import Baseline, Recipe
from bench.runtime.progress import quiet
from bench.sampling.sample import latent_shape
from bench.storage.cache import encode_images, encode_prompts
from bench.suites import Iteration, options
from bench.training.recipe import TrainSettings, make_accelerator
from bench.training.train import Loop, TrainData

SEED, LR, BETA = 0, 1e-8, 2000.0  # a rate that leaves the weights as they are, however long one measures
USED = 0.8  # of the free memory: what the allocator wastes and the libraries' workspaces come on top


@dataclass(frozen=True)
class Setting:
    """What is trained and how. A sample is a pair, or an image of a method that reads winners alone."""

    model: str = "mini"
    methods: tuple[str, ...] = ("spin", "sft")
    precision: str = "fp32"
    batch_size: int = 32
    micro_batch: int | None = None  # None: the largest part of the batch that fits the memory (costs/memory.py)
    baseline_micro_batch: int = 1
    steps: int = 5  # optimizer steps in one measurement
    repeats: int = 5


def measure(setting: Setting) -> dict[str, Any]:
    """One row a method: rates of ours, of the baseline and of the floor, and their ratios."""
    accelerator = make_accelerator(setting.precision)
    device, dtype = accelerator.device, models.DTYPES[setting.precision]
    pipe = models.load_pipeline(setting.model, device, dtype)
    rows = [_measure(name, setting, pipe, accelerator) for name in setting.methods]
    return {
        "protocol": protocol(
            device,
            command="bench perf train",
            model=setting.model,
            precision=setting.precision,
            batch_size=setting.batch_size,
            baseline_micro_batch=setting.baseline_micro_batch,
            optimizer_steps=setting.steps,
            repeats=setting.repeats,
            unit="pairs per second (sft: images per second)",
            ours="the shared training loop on cached latents and prompt embeddings",
            baseline="published recipe: VAE and text encoder in every step, no cache, no compilation; images come "
            "decoded",
            floor="UNet operations of the policy forward and backward and the reference forward, at the rate of a "
            f"large matrix product in {setting.precision} measured in the same turns",
            ratios="turn by turn, interleaved; median, smallest and largest",
        ),
        "rows": rows,
    }


def _measure(name: str, setting: Setting, pipe: StableDiffusionPipeline, accelerator: Accelerator) -> dict[str, Any]:
    own = {"beta": BETA} if "beta" in options.options(registry.method(name)) else {}
    method = build_method(name, Iteration(steps=1, lr=LR, **own))
    paired, device, dtype = method.pairing is not Pairing.WINNER, accelerator.device, models.DTYPES[setting.precision]
    images, prompts = _batch(pipe, setting.batch_size, sides=2 if paired else 1)
    micro_batch = setting.micro_batch or _largest_micro_batch(method, setting, pipe, device)
    with _ours(method, setting, micro_batch, pipe, images, prompts, accelerator) as ours:
        work = {
            "ours": ours,
            "baseline": _baseline(paired, setting, pipe, images, prompts, dtype),
            "matmul": matmul_flops(device, dtype),
        }
        rates = interleave(work, setting.repeats, device, f"{name}: ours, baseline, matmul")
    per_sample = _floor(method, pipe)
    row = compared(rates, "ours", "baseline", "pairs_per_s")
    peak = statistics.median(rates["matmul"])
    used = [rate * per_sample / matmul for rate, matmul in zip(rates["ours"], rates["matmul"], strict=True)]
    row |= {
        "pairs_per_s_floor": peak / per_sample,
        "ratio_to_floor": statistics.median(used),
        "ratio_to_floor_min": min(used),
        "ratio_to_floor_max": max(used),
        "gflop_per_pair": per_sample / 1e9,
        "matmul_gflop_per_s": peak / 1e9,
    }
    return {"method": name, **row, "micro_batch": micro_batch}


def _floor(method: Method, pipe: StableDiffusionPipeline) -> int:
    """Operations that a sample cannot do without."""
    shape, tokens = latent_shape(pipe.unet), pipe.tokenizer.model_max_length
    reference = cost.unet_flops(pipe.unet, shape, tokens) if method.needs_reference else 0
    sides = 1 if method.pairing is Pairing.WINNER else 2
    return sides * (cost.unet_training_flops(pipe.unet, shape, tokens) + reference)


def _batch(pipe: StableDiffusionPipeline, size: int, sides: int) -> tuple[list[np.ndarray], list[str]]:
    """Random images uint8 [B, H, W, 3] of the model's size for each side, and a prompt for each."""
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    _, height, width = (side * scale for side in latent_shape(pipe.unet))
    random = np.random.default_rng(SEED)
    images = [random.integers(0, 256, (size, height, width, 3), dtype=np.uint8) for _ in range(sides)]
    return images, [f"a large red circle above {number} small blue squares" for number in range(size)]


def _largest_micro_batch(method: Method, setting: Setting, pipe: StableDiffusionPipeline, device: torch.device) -> int:
    """What fits beside the baseline, of whose step everything but the activations stays, in the memory there is."""
    sides = 1 if method.pairing is Pairing.WINNER else 2

    def needed(samples: int) -> int:
        return memory.training_bytes(
            pipe.unet,
            latent_shape(pipe.unet),
            pipe.tokenizer.model_max_length,
            sides * samples,
            dtype=setting.precision,
            reference=method.needs_reference,
            accumulate=samples < setting.batch_size,
        )

    budget = USED * memory.free_bytes(device) - needed(setting.baseline_micro_batch)
    return memory.fitting_micro_batch(needed, setting.batch_size, budget)


@contextmanager
def _ours(
    method: Method,
    setting: Setting,
    micro_batch: int,
    pipe: StableDiffusionPipeline,
    images: list[np.ndarray],
    prompts: list[str],
    accelerator: Accelerator,
) -> Iterator[Callable[[], float]]:
    """Work for `interleave`: the shared loop, encoding done beforehand as in a run.

    It is one training that goes on from one measurement to the next, as the baseline's does: a new one each time would
    empty the device's memory before it, and pay for allocating it again.
    """
    with quiet():
        latents = [encode_images(pipe.vae, lambda rows, side=side: side[list(rows)], len(side)) for side in images]
        embeddings = encode_prompts(pipe, prompts)
    data = TrainData(latents[0], latents[1] if len(latents) > 1 else None, embeddings)
    policy = copy.deepcopy(pipe.unet).float()
    reference = copy.deepcopy(policy) if method.needs_reference else None
    settings = TrainSettings(
        steps=setting.steps * (setting.repeats + 1),
        lr=LR,
        batch_size=setting.batch_size,
        micro_batch=micro_batch,
        log_every=setting.steps,
        precision=setting.precision,
        stop_on_collapse=False,
    )
    loop, steps = Loop(policy, reference, method, data, settings, pipe.scheduler, SEED, accelerator, None), count()

    def run() -> float:
        for step in islice(steps, setting.steps):
            loop.step(step)
        loop.log(step)
        return setting.steps * setting.batch_size

    try:
        yield run
    finally:
        loop.close()


def _baseline(
    paired: bool,
    setting: Setting,
    pipe: StableDiffusionPipeline,
    images: list[np.ndarray],
    prompts: list[str],
    dtype: torch.dtype,
):
    """Work for `interleave`: the published recipe on the same images."""
    pixels = [torch.from_numpy(side).permute(0, 3, 1, 2).float() / 127.5 - 1 for side in images]
    recipe = Recipe(paired, setting.batch_size, setting.baseline_micro_batch, lr=LR)
    baseline = Baseline(pipe, copy.deepcopy(pipe.unet).float(), recipe, dtype)

    def run() -> float:
        for _ in range(setting.steps):
            loss = baseline.step(pixels[0], pixels[1] if paired else None, prompts)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the baseline's loss became {loss}")
        return setting.steps * setting.batch_size

    return run
