"""Randomness as a pure function of names, so that methods are paired and a resumed run is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from numbers import Integral

import torch

SPAN = 2**32  # PyTorch's CPU generator reads no more of a seed


def derive(*parts: int | str) -> int:
    """Return a seed in 0..SPAN-1 that depends on every part and on nothing else."""
    named = (f"int:{int(part)}" if isinstance(part, Integral) else f"str:{part}" for part in parts)
    joined = "\x1f".join(named).encode("utf-8", "surrogatepass")  # any text Python can hold, file names for instance
    return int.from_bytes(hashlib.sha256(joined).digest()[:4], "big")


def normal(seeds: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise `[N, *shape]` in fp32 on the CPU; row i comes from a generator of its own.

    A row therefore does not depend on the batch it is in, on its place there, or on the device used later.
    """
    out = torch.empty((len(seeds), *shape), dtype=torch.float32)
    generator = torch.Generator()
    for row, seed in zip(out, seeds, strict=True):
        torch.randn(shape, generator=generator.manual_seed(seed), out=row)
    return out
