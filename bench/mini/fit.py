"""The builder's one training loop: seeded, resumable, with progress; used for every network of the miniature."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from bench.errors import BenchError
from bench.runtime.progress import track
from bench.storage.stages import temporary


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    checkpoint: Path,
    description: str,
    warmup: int = 200,
    weight_decay: float = 1e-2,
    ema: float | None = None,
    checkpoint_every: int = 500,
) -> torch.nn.Module:
    """Minimise `loss(step)` over the trainable parameters of `model` and return the model (its average with `ema`).

    `loss` must be a function of the step and the weights alone; a killed fit then goes on from its last checkpoint as
    if nothing had happened. The checkpoint also says how many steps were planned: another plan starts afresh.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average = copy.deepcopy(model).eval() if ema else None
    first = _restore(checkpoint, steps, model, optimizer, average)
    bar = track(range(first, steps), description, total=steps, unit="step", initial=first)
    recent = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, warmup)
        model.train()
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average is not None:
            _update_average(average, model, min(ema, (step + 1) / (step + 10)))
        if step % 50 == 0:
            recent = value.item()
            if not math.isfinite(recent):
                raise BenchError(f"{description}: the loss is {recent} at step {step}; lower the learning rate")
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            _save(checkpoint, steps, step + 1, model, optimizer, average)
    return (average if average is not None else model).eval()


@torch.no_grad()
def _update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for kept, fresh in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(fresh)


def _save(path: Path, steps: int, step: int, model, optimizer, average) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    torch.save(
        {
            "steps": steps,
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict() if average is not None else None,
        },
        unfinished,
    )
    os.replace(unfinished, path)


def _restore(path: Path, steps: int, model, optimizer, average) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["steps"] != steps:
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["average"])
    return state["step"]
