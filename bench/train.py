"""The one training loop: a method plugs in its loss, everything else is shared."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bench.batches import Batch, TrainData, micro_batches, sample_order
from bench.errors import BenchError, UsageError
from bench.progress import track
from methods.base import Errors, Method, Pairing

__all__ = ["TrainData", "TrainSettings", "train"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one iteration. A sample is a pair, or one image when a method trains on winners alone."""

    steps: int
    lr: float
    batch_size: int  # samples per optimizer step, over all processes
    micro_batch: int  # samples per forward pass and process; changes memory and speed only
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    prompt_dropout: float = 0.0
    log_every: int = 10
    first_step: int = 0  # steps of earlier iterations: this one sees other noise and goes on in the data

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant; `step` counts from 0 in this iteration."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


class Denoiser(nn.Module):
    """A UNet that answers with the predicted noise in fp32, whatever it was trained to predict.

    The loop hands this shell to accelerate, so that no wrapper of it stays on the UNet itself.
    """

    def __init__(self, unet: UNet2DConditionModel, prediction_type: str):
        super().__init__()
        self.unet = unet
        self.prediction_type = prediction_type

    def forward(self, noisy: Tensor, timesteps: Tensor, alpha_bar: Tensor, context: Tensor) -> Tensor:
        output = self.unet(noisy, timesteps, encoder_hidden_states=context).sample.float()
        return predicted_noise(output, noisy, alpha_bar, self.prediction_type)


def predicted_noise(output: Tensor, noisy: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise a UNet's output stands for; of v: sqrt(a) v + sqrt(1 - a) x_t (arXiv 2202.00512, app. D)."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * noisy
    raise BenchError(f"prediction type {prediction_type!r} cannot be trained; known: epsilon, v_prediction")


def denoising_errors(denoiser: nn.Module, batch: Batch, paired: bool) -> Errors:
    """Mean over C, H, W of (noise - predicted noise)^2, fp32, split into winners and losers."""
    prediction = denoiser(batch.noisy, batch.timesteps, batch.alpha_bar, batch.context)
    error = (batch.noise - prediction).square().mean(dim=(1, 2, 3))
    return Errors(*error.chunk(2)) if paired else Errors(error)


def train(policy: UNet2DConditionModel, reference: UNet2DConditionModel | None, method: Method,
          data: TrainData, settings: TrainSettings, noise_scheduler: Any, seed: int, accelerator: Accelerator,
          description: str = "training") -> list[dict[str, float]]:
    """Train `policy` in place with fp32 weights and return the logged signals.

    `noise_scheduler` is the pipeline's (any diffusers scheduler): its `alphas_cumprod` and `prediction_type`
    define the forward process. Each process takes its slice of the same global batch, so the number of
    processes changes nothing but rounding. There is a row per log interval, each signal a mean over it:
    step (counted over all iterations), loss, the method's signals, grad_norm (before clipping), and lr,
    pairs_per_s. Raises BenchError when the loss or the gradient is no longer finite.
    """
    _check(policy, reference, method, data, settings, accelerator)
    loop = Loop(policy, reference, method, data, settings, noise_scheduler, seed, accelerator)
    steps = range(settings.steps)
    if accelerator.is_main_process:
        steps = track(steps, description, unit="step")
    history: list[dict[str, float]] = []
    try:
        for step in steps:
            loop.step(step)
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                history.append(loop.read(step))
    finally:
        accelerator.free_memory()
    return history


class Loop:
    """The state of one training run: models, optimizer, and sums of the signals since the last log line."""

    def __init__(self, policy: UNet2DConditionModel, reference: UNet2DConditionModel | None, method: Method,
                 data: TrainData, settings: TrainSettings, noise_scheduler: Any, seed: int,
                 accelerator: Accelerator):
        self.method, self.data, self.settings, self.seed = method, data, settings, seed
        self.accelerator = accelerator
        self.paired = method.pairing is not Pairing.WINNER
        device, prediction_type = accelerator.device, noise_scheduler.config.prediction_type
        self.alpha_bar = noise_scheduler.alphas_cumprod.to(device, torch.float32)
        self.reference = None
        if reference is not None:
            self.reference = Denoiser(_place(reference, device).requires_grad_(False), prediction_type)
        denoiser = Denoiser(_place(policy, device), prediction_type)
        self.denoiser, self.optimizer = accelerator.prepare(denoiser, _adamw(denoiser, settings, device))
        self.sums: dict[str, Tensor] = {}
        self.since, self.started = 0, time.perf_counter()

    def step(self, step: int) -> None:
        """One optimizer step; `step` counts from 0 in this iteration. Never waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(step)
        samples = self._own_samples(self.settings.first_step + step)
        last = math.ceil(len(samples) / self.settings.micro_batch) - 1
        batches = micro_batches(self.data, samples, paired=self.paired, seed=self.seed,
                                step=self.settings.first_step + step, micro_batch=self.settings.micro_batch,
                                alpha_bar=self.alpha_bar, prompt_dropout=self.settings.prompt_dropout)
        for number, batch in enumerate(batches):
            # gradients of several processes are exchanged once a step, with the last micro-batch
            with nullcontext() if number == last else self.accelerator.no_sync(self.denoiser):
                self._accumulate(batch)
        norm = self.accelerator.clip_grad_norm_(self.denoiser.parameters(), self.settings.max_grad_norm)
        self._add("grad_norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since += 1

    def _own_samples(self, step: int) -> np.ndarray:
        """This process's slice, by position, of the global batch."""
        size, processes = self.settings.batch_size, self.accelerator.num_processes
        index = self.accelerator.process_index
        batch = sample_order(self.seed, step * size, size, len(self.data))
        return batch[size * index // processes:size * (index + 1) // processes]

    def _accumulate(self, batch: Batch) -> None:
        """Add a micro-batch's share of the gradient of the mean loss over the global batch.

        The reference runs first, on the same rows in the same order as the policy: equal weights then go
        through equal kernels and give equal bits, and the first loss of DPO and SPIN is exactly log 2.
        """
        reference = None
        if self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast():
                reference = denoising_errors(self.reference, batch, self.paired)
        policy = denoising_errors(self.denoiser, batch, self.paired)
        loss, signals = self.method.loss(policy, reference)
        # processes average their gradients, so the sum over all of them is divided by the batch size alone
        scale = self.accelerator.num_processes / self.settings.batch_size
        self.accelerator.backward(loss.sum() * scale)
        for name, signal in {"loss": loss, **signals}.items():
            self._add(name, signal)

    def _add(self, name: str, values: Tensor) -> None:
        exact = torch.float32 if values.device.type == "mps" else torch.float64
        total = values.detach().sum(dtype=exact)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def read(self, step: int) -> dict[str, float]:
        """The means since the last call, over all processes; the one place that waits for the device."""
        totals = self.accelerator.reduce(torch.stack(list(self.sums.values())), "sum").tolist()
        samples, norms = self.since * self.settings.batch_size, self.since * self.accelerator.num_processes
        row: dict[str, float] = {"step": self.settings.first_step + step + 1}
        for name, total in zip(self.sums, totals, strict=True):
            row[name] = total / (norms if name == "grad_norm" else samples)
        row["lr"] = self.settings.learning_rate(step)
        row["pairs_per_s"] = samples / (time.perf_counter() - self.started)
        self._expect_finite(row)
        self.sums, self.since, self.started = {}, 0, time.perf_counter()
        return row

    def _expect_finite(self, row: dict[str, float]) -> None:
        # under fp16 the loss scaler skips steps whose gradient overflowed, so there only the loss counts
        for name in ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm"):
            if not math.isfinite(row[name]):
                first = row["step"] - self.since + 1
                raise BenchError(f"{self.method.name}: {name} became {row[name]} in steps {first} to "
                                 f"{row['step']} (lr {row['lr']:g}); try a lower lr or a longer warm-up")


def _place(unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    """Move a UNet for training; eval mode keeps dropout, if a configuration has any, out of the errors."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return unet.to(device, memory_format=layout).eval()


def _adamw(module: nn.Module, settings: TrainSettings, device: torch.device) -> torch.optim.AdamW:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=settings.lr, betas=(settings.adam_beta1, settings.adam_beta2),
                             weight_decay=settings.weight_decay, fused=device.type in ("cpu", "cuda"))


def _check(policy: UNet2DConditionModel, reference: UNet2DConditionModel | None, method: Method,
           data: TrainData, settings: TrainSettings, accelerator: Accelerator) -> None:
    """Refuse what could only fail later or, worse, train something else."""
    if policy.dtype != torch.float32:
        raise BenchError(f"the policy's weights are {policy.dtype}, in which small updates vanish: "
                         "train fp32 weights with mixed precision")
    if method.pairing is not Pairing.WINNER and data.losers is None:
        raise BenchError(f"{method.name} is trained on pairs, but the data has no losers")
    if method.needs_reference and reference is None:
        raise BenchError(f"{method.name} needs a reference model")
    if settings.batch_size < accelerator.num_processes:
        raise UsageError(f"batch_size {settings.batch_size} is smaller than the number of processes, "
                         f"{accelerator.num_processes}")
