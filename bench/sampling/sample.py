"""The one sampler: large batches, and an image that depends on its prompt and its seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from textwrap import shorten
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from bench.errors import BenchError, UsageError, did_you_mean
from bench.models.chunks import chunks
from bench.models.compiled import expect_same_output
from bench.runtime.progress import track
from bench.runtime.seeding import derive, normal
from bench.storage.cache import encode_image_batch, encode_prompt_batch

# Latents are not bounded by 1: clipping them, these classes' default for pixels, washes every colour out. SD-1.5's own
# configuration says so, but one saved by a scheduler without the setting does not.
SCHEDULERS = {
    "ddim": partial(DDIMScheduler.from_config, clip_sample=False),
    "pndm": partial(PNDMScheduler.from_config, skip_prk_steps=True),  # no Runge-Kutta steps, as in SD-1.5
    "ddpm": partial(DDPMScheduler.from_config, clip_sample=False),
}


Output = Literal["images", "latents", "roundtrip"]
Key = tuple[int, str]  # seed and prompt: all that a sample depends on


def sample(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    guidance: float,
    steps: int,
    seeds: Sequence[int],
    scheduler: str = "ddim",
    batch_size: int = 16,
    output: Output = "images",
    unet: UNet2DConditionModel | None = None,
    name: str = "model",
    description: str = "sampling",
) -> np.ndarray:
    """Sample every prompt with every seed; row `p * len(seeds) + s` belongs to prompt p and seed s.

    The other arguments and the result are those of `Sampler`, for all rows at once.
    """
    batches = sample_batches(
        pipe,
        prompts,
        guidance=guidance,
        steps=steps,
        seeds=seeds,
        scheduler=scheduler,
        batch_size=batch_size,
        output=output,
        unet=unet,
        name=name,
        description=description,
    )
    return np.concatenate(list(batches))


def sample_batches(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    guidance: float,
    steps: int,
    seeds: Sequence[int],
    scheduler: str = "ddim",
    batch_size: int = 16,
    output: Output = "images",
    unet: UNet2DConditionModel | None = None,
    name: str = "model",
    description: str = "sampling",
) -> Iterator[np.ndarray]:
    """As `sample`, but yield the rows batch by batch, so that they can be written while others are made."""
    sampler = Sampler(pipe, guidance=guidance, steps=steps, scheduler=scheduler, output=output, unet=unet, name=name)
    rows = keys(prompts, seeds)
    with track(description=description, total=len(rows), unit="image") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield sampler(batch)
            bar.update(len(batch))


def keys(prompts: Sequence[str], seeds: Sequence[int]) -> list[Key]:
    """Every prompt with every seed, the seeds of one prompt side by side."""
    return [(int(seed), prompt) for prompt in prompts for seed in seeds]


class Sampler:
    """A model and a solver that make whole batches, each a function of its own rows and of nothing else.

    Its results are uint8 images `[B, H, W, 3]`, or with output="latents" fp32 `[B, C, h, w]`, scaled as the UNet
    sees them; "roundtrip" decodes these to 8-bit images and encodes them again. `unet` stands in for the
    pipeline's; `name` is what errors call the model.

    The noise prediction is n + g (c - n), of the empty prompt n and of the prompt c (arXiv 2207.12598). guidance g = 1
    is sampling from the model itself and costs one UNet evaluation per step; any other value costs two. Below 1 that
    leans towards the empty prompt, and 0 ignores the prompt, where diffusers' pipelines take anything up to 1 for 1.

    With `compile` the UNet goes through torch.compile, and its first answer is held against the plain model's. Sizes of
    batches may differ: at the second one torch makes a graph for any.

    Raises BenchError where the UNet's latents or the VAE's pixels are not finite: as 8-bit images they would be black
    or white, and be scored.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        *,
        guidance: float,
        steps: int,
        scheduler: str = "ddim",
        output: Output = "images",
        unet: UNet2DConditionModel | None = None,
        name: str = "model",
        compile: bool = False,
    ):
        if scheduler not in SCHEDULERS:
            raise UsageError(
                f"unknown scheduler '{scheduler}'{did_you_mean(scheduler, SCHEDULERS)}; known: {', '.join(SCHEDULERS)}"
            )
        if not math.isfinite(guidance):
            raise UsageError(f"guidance must be a finite number, got {guidance}")
        self.pipe, self.guidance, self.steps, self.output, self.name = pipe, guidance, steps, output, name
        self.unet = (pipe.unet if unet is None else unet).eval()
        if self.unet.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.network = Checked(self.unet) if compile else self.unet
        self.solver = SCHEDULERS[scheduler](pipe.scheduler.config)
        if steps > (known := self.solver.config.num_train_timesteps):
            raise UsageError(f"{steps} steps: the model has {known} timesteps, a solver takes at most as many steps")
        self.null = torch.from_numpy(encode_prompt_batch(pipe, [""])[0])

    def __call__(self, batch: Sequence[Key]) -> np.ndarray:
        latents = _denoise(self.network, self.solver, self._context(batch), self.null, batch, self.guidance, self.steps)
        if self.output == "latents":
            self._expect_finite(batch, {"UNet": latents})
            return latents.cpu().numpy()
        pixels = _decode(self.pipe, latents)
        self._expect_finite(batch, {"UNet": latents, "VAE": pixels})
        images = _eight_bits(pixels)
        if self.output == "images":
            return images
        latents = encode_image_batch(self.pipe.vae, images)
        self._expect_finite(batch, {"VAE": torch.from_numpy(latents)})
        return latents

    def _expect_finite(self, batch: Sequence[Key], made: dict[str, Tensor]) -> None:
        """Refuse rows that are not finite, by the first part of the model that made one; waits for the device once."""
        finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in made.values()]).cpu()
        for part, rows in zip(made, finite, strict=True):
            if not rows.all():
                seed, prompt = batch[int(rows.int().argmin())]
                raise BenchError(
                    f"{self.name}: what its {part} makes of {shorten(prompt, 80)!r} (seed {seed}, guidance "
                    f"{self.guidance:g}) is not finite, as of {int((~rows).sum())} of {len(rows)} in the batch; check "
                    "its weights, train with a lower lr, or set model.dtype=fp32 if it is fp16, which overflows"
                )

    def _context(self, batch: Sequence[Key]) -> Tensor:
        """Prompt embeddings `[B, L, D]`; a prompt that several seeds share is encoded once."""
        row = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for _, prompt in batch))}
        table = torch.from_numpy(encode_prompt_batch(self.pipe, list(row)))
        return table[[row[prompt] for _, prompt in batch]]


class Checked(nn.Module):
    """A compiled UNet, whose first output must be the plain one's."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.config, self.plain, self.compiled, self.checked = unet.config, unet, torch.compile(unet), False

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype

    def forward(self, *arguments: Tensor, **context: Tensor) -> UNet2DConditionOutput:
        found = self.compiled(*arguments, **context)
        if not self.checked:
            expect_same_output(found.sample, self.plain(*arguments, **context).sample, self.dtype)
            self.checked = True
        return found


def initial_latents(chosen: Sequence[Key], shape: tuple[int, ...]) -> Tensor:
    """The starting noise of every (seed, prompt), fp32 `[B, *shape]`, the same on every device."""
    return normal([derive("sample", seed, prompt) for seed, prompt in chosen], shape)


def latent_shape(unet: UNet2DConditionModel) -> tuple[int, int, int]:
    """C, h, w of the latents a UNet was made for."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


@torch.inference_mode()
def _denoise(
    unet: UNet2DConditionModel | Checked,
    solver: DDIMScheduler | PNDMScheduler | DDPMScheduler,
    context: Tensor,
    null: Tensor,
    chosen: Sequence[Key],
    guidance: float,
    steps: int,
) -> Tensor:
    """Run the reverse process on one batch; the latents stay in fp32 whatever the UNet's precision."""
    guided = guidance != 1
    context = context.to(unet.device, unet.dtype)
    if guided:
        context = torch.cat([null.to(context).expand_as(context), context])
    # The solver indexes its tables with the timestep, the UNet embeds it. On the device the first would wait for every
    # step; of a timestep on the CPU the UNet makes a copy that waits, 50 a batch. So there is one for each.
    solver.set_timesteps(steps)
    on_device = solver.timesteps.to(unet.device)
    options = {}
    if isinstance(solver, DDPMScheduler):  # the one solver here that adds noise on the way
        options["generator"] = [torch.Generator().manual_seed(derive("sample-steps", *key)) for key in chosen]
    latents = initial_latents(chosen, latent_shape(unet)).to(unet.device) * solver.init_noise_sigma
    for timestep, embedded in zip(solver.timesteps, on_device, strict=True):
        inputs = solver.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        prediction = unet(inputs.to(unet.dtype), embedded, encoder_hidden_states=context).sample.float()
        if guided:
            without, given = prediction.chunk(2)
            prediction = without + guidance * (given - without)
        latents = solver.step(prediction, timestep, latents, **options).prev_sample
    return latents


@torch.inference_mode()
def _decode(pipe: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents as the UNet sees them to pixels fp32 `[B, 3, H, W]`, from about -1 to 1."""
    vae = pipe.vae
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    return torch.cat([vae.decode(rows).sample.float() for rows in chunks(vae, scaled, *scaled.shape[-2:])])


def _eight_bits(pixels: Tensor) -> np.ndarray:
    """uint8 `[B, H, W, 3]`."""
    return (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
