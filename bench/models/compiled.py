"""What a compiler made of a model, held against the model itself before anything is trained or sampled with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.errors import UsageError

OUTPUT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Relative distance of two outputs of a UNet in a precision up to which other kernels may have made it."""
SCALE = 1024.0  # keeps the gradients of a mean error within fp16's range
ROUNDING = {"fp32": 0.01, "bf16": 0.1, "fp16": 0.1}
"""Relative distance of two gradients up to which the order of additions may have made it. Code that is wrong loses
whole layers: 0.45 for a small UNet with torch 2.13's C++ backend, whose forward pass is right to the last digits."""


def expect_same_gradients(
    compiled: Callable[[], Tensor], plain: Callable[[], Tensor], trained: Sequence[nn.Parameter], precision: str
) -> None:
    """Refuse a compiler whose gradients of an error `[B]` are not those of the plain model; leaves no gradients."""
    found, expected = (_gradients(errors, trained) for errors in (compiled, plain))
    distance = _norm([one - other for one, other in zip(found, expected, strict=True)]) / _norm(expected)
    if not distance <= ROUNDING[precision]:  # NaN is none either
        raise UsageError(
            f"train.compile: torch {torch.__version__} compiles this model wrongly for a "
            f"{trained[0].device.type}: its gradients are {distance:.0%} off; set train.compile=false"
        )


def expect_same_output(compiled: Tensor, plain: Tensor, precision: torch.dtype) -> None:
    """Refuse a compiler whose network answers otherwise than the plain one, which computes in `precision`."""
    distance = (compiled - plain).norm() / plain.norm()
    if not distance <= OUTPUT[precision]:  # NaN is none either
        raise UsageError(
            f"opponent.compile: torch {torch.__version__} compiles this model wrongly for a {plain.device.type}: "
            f"its output is {distance:.0%} off; set opponent.compile=false"
        )


def _gradients(errors: Callable[[], Tensor], trained: Sequence[nn.Parameter]) -> list[Tensor]:
    (errors().sum() * SCALE).backward()
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trained]
    for weight in trained:
        weight.grad = None
    return gradients


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()
