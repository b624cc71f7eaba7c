"""How one iteration is trained: its settings, and the optimizer and the precision they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn

from bench.errors import BenchError, UsageError
from bench.methods.base import Method, Pairing
from bench.models import adapters
from bench.runtime import processes
from bench.training.batches import TrainData

# settings that change speed, memory or when a training stops, and never a number it writes
NEUTRAL = ("gradient_checkpointing", "checkpoint_every", "checkpoint_minutes", "stop_on_collapse")
# settings that came later: at their defaults they change nothing, so they do not make older results stale
LATER = ("lr_schedule", "schedule_steps", "precision", "optimizer", "ema", "lora_rank", "compile")


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
    lr_schedule: str = "constant"  # after the warm-up: "constant", or "linear" down to 0
    schedule_steps: int | None = None  # where "linear" reaches 0; None: at the end of the iteration
    max_grad_norm: float = 1.0
    prompt_dropout: float = 0.0
    precision: str = "fp32"  # of matrix products and convolutions: "fp32", "bf16", "fp16"; weights stay fp32
    optimizer: str = "adamw"  # or "adamw8bit"
    ema: float | None = None  # decay of the moving average that becomes the result, the same in every step
    lora_rank: int | None = None  # of the adapter that is trained instead of the weights
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 10
    checkpoint_every: int | None = 50
    checkpoint_minutes: float = 0.0
    stop_on_collapse: bool = True
    first_step: int = 0  # steps of earlier iterations: this one sees other noise and goes on in the data

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or linear to 0; `step` counts from 0 in this iteration."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.lr_schedule == "constant" or step < self.warmup_steps:
            return rate
        end = self.schedule_steps or self.steps
        return rate * max(0.0, (end - step) / max(1, end - self.warmup_steps))

    def identity(self) -> dict[str, Any]:
        """What decides the numbers, for the hash of a stage."""
        later = {field.name: field.default for field in fields(self) if field.name in LATER}
        decides = {
            name: value
            for name, value in asdict(self).items()
            if name not in NEUTRAL and not (name in later and value == later[name])
        }
        return decides if self.ema is None else {**decides, "ema_ramp": False}  # results with one are stale


def make_accelerator(precision: str) -> Accelerator:
    """An accelerator for a training in "fp32", "bf16" or "fp16" on the best device there is."""
    accelerator = processes.accelerator("no" if precision == "fp32" else precision)
    if precision != "fp32" and not accelerator.native_amp:  # it would train in fp32 without a word
        raise UsageError(f"train.precision={precision} does not run on a {accelerator.device.type}: use bf16 or fp32")
    return accelerator


def make_optimizer(trained: list[nn.Parameter], settings: TrainSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or the same with its two moments in 8 bits (arXiv 2110.02861)."""
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, fused=device.type in ("cpu", "cuda"), **options)
        optimizer.register_load_state_dict_post_hook(_lay_out_moments)
        return optimizer
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(trained, **options)
    strides = [parameter.stride() for parameter in trained]
    optimizer.register_step_post_hook(lambda *_: _lay_out_weights(trained, strides))
    return optimizer


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory layout of their parameters, values unchanged.

    They come with the strides they were saved with, but fused AdamW walks parameter, gradient and moments as they lie
    in memory: where the layouts differ, as between a GPU (channels last) and a processor, it pairs wrong elements.
    Moments in 8 bits are no such case: bitsandbytes has both sides in NCHW order in every step, whatever the strides.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _lay_out_weights(trained: Sequence[nn.Parameter], strides: Sequence[tuple[int, ...]]) -> None:
    """Undo what bitsandbytes does to weights in a step: it makes them contiguous, which loses channels last."""
    for parameter, stride in zip(trained, strides, strict=True):
        if parameter.stride() != stride:
            parameter.data = parameter.data.new_empty_strided(parameter.shape, stride).copy_(parameter.data)


def require_packages(optimizer: str, lora_rank: int | None) -> None:
    """Say before anything is started which package for an option is not installed."""
    for wanted, package, option in (
        (optimizer == "adamw8bit", "bitsandbytes", "optimizer=adamw8bit"),
        (lora_rank is not None, "peft", f"lora_rank={lora_rank}"),
    ):
        if wanted and find_spec(package) is None:
            raise UsageError(
                f"train.{option} needs {package}, which is not installed: "
                f"pip install 'diffusion-align-bench[{package}]'"
            )


def expect_trainable(
    policy: UNet2DConditionModel,
    reference: UNet2DConditionModel | None,
    method: Method,
    data: TrainData,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> None:
    """Refuse what could only fail later or, worse, train something else."""
    if policy.dtype != torch.float32:
        raise BenchError(
            f"the policy's weights are {policy.dtype}, in which small updates vanish: "
            "train fp32 weights with mixed precision"
        )
    if method.pairing is not Pairing.WINNER and data.losers is None:
        raise BenchError(f"{method.name} is trained on pairs, but the data has no losers")
    if accelerator.mixed_precision != ("no" if settings.precision == "fp32" else settings.precision):
        raise BenchError(
            f"train.precision is {settings.precision}, but the accelerator was made for {accelerator.mixed_precision}"
        )
    if adapters.attached(policy) != (settings.lora_rank is not None):
        raise BenchError(f"train.lora_rank is {settings.lora_rank}: the policy needs an adapter exactly then")
    if reference is policy and settings.lora_rank is None:
        raise BenchError("only a policy that trains an adapter can be its own reference")
    if method.needs_reference and reference is None:
        raise BenchError(f"{method.name} needs a reference model")
    if settings.batch_size < accelerator.num_processes:
        raise UsageError(
            f"batch_size {settings.batch_size} is smaller than the number of processes, {accelerator.num_processes}"
        )
