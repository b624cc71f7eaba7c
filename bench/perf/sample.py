"""`bench perf sample`: images per second of the batched sampler, beside one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from bench import models
from bench.costs import cost
from bench.data import load_prompts
from bench.perf import compared, interleave, protocol
from bench.sampling.sample import SCHEDULERS, latent_shape, sample

SEED = 5775709


@dataclass(frozen=True)
class Setting:
    model: str = "mini"
    prompts: str = "world:test"
    images: int = 32
    guidance: tuple[float, ...] = (1.0, 3.0)
    steps: int = 10
    scheduler: str = "ddim"
    batch_size: int = 32
    precision: str = "fp32"
    repeats: int = 5


def measure(setting: Setting) -> dict[str, Any]:
    """One row a guidance scale: images per second of both, and the ratio."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = models.load_pipeline(setting.model, device, models.DTYPES[setting.precision])
    prompts = load_prompts(setting.prompts, setting.images).prompts
    rows = [_measure(pipe, prompts, guidance, setting, device) for guidance in setting.guidance]
    return {
        "protocol": protocol(
            device,
            command="bench perf sample",
            model=setting.model,
            precision=setting.precision,
            images=len(prompts),
            steps=setting.steps,
            scheduler=setting.scheduler,
            batch_size=setting.batch_size,
            repeats=setting.repeats,
            ours="the shared sampler, decoding included",
            baseline="diffusers' StableDiffusionPipeline called once a prompt, as published evaluation scripts do",
            ratios="turn by turn, interleaved; median, smallest and largest",
        ),
        "rows": rows,
    }


def _measure(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], guidance: float, setting: Setting, device: torch.device
) -> dict[str, Any]:
    single = StableDiffusionPipeline(
        **{
            **pipe.components,
            "requires_safety_checker": False,
            "scheduler": SCHEDULERS[setting.scheduler](pipe.scheduler.config),
        }
    )
    single.set_progress_bar_config(disable=True)

    def batched() -> float:
        return len(
            sample(
                pipe,
                prompts,
                guidance=guidance,
                steps=setting.steps,
                seeds=[SEED],
                scheduler=setting.scheduler,
                batch_size=setting.batch_size,
            )
        )

    def one_at_a_time() -> float:
        for prompt in prompts:
            single(
                prompt,
                guidance_scale=guidance,
                num_inference_steps=setting.steps,
                generator=torch.Generator().manual_seed(SEED),
            )
        return len(prompts)

    rates = interleave(
        {"ours": batched, "baseline": one_at_a_time}, setting.repeats, device, f"sampling, guidance {guidance:g}"
    )
    shape = latent_shape(pipe.unet)
    flops = cost.sampling_flops(
        cost.unet_flops(pipe.unet, shape, pipe.tokenizer.model_max_length),
        cost.vae_flops(pipe.vae, shape)[1],
        1,
        steps=setting.steps,
        guidance=guidance,
    )
    return {"guidance": guidance, **compared(rates, "ours", "baseline", "images_per_s"), "gflop_per_image": flops / 1e9}
