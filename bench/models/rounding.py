"""Whether the precision that is sampled in can show what a training did to the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from bench.models import DTYPES, load_unet


class Movement(NamedTuple):
    """Root mean squares over all weights: how far a training moved them, and what rounding both its ends to a precision
    adds to that or takes from it."""

    moved: float
    added: float


@torch.no_grad()
def movement(start: Path, end: Path, dtype: torch.dtype) -> Movement:
    """Of two UNets on disk, in fp32, that are to be sampled from in `dtype`."""
    before, after = load_unet(start).state_dict(), load_unet(end).state_dict()
    moved = added = count = 0.0
    for name, old in before.items():
        new = after[name]
        step, shown = new.double() - old.double(), new.to(dtype).double() - old.to(dtype).double()
        moved += step.square().sum().item()
        added += (shown - step).square().sum().item()
        count += step.numel()
    return Movement(math.sqrt(moved / count), math.sqrt(added / count))


def warning(title: str, start: Path, end: Path, precision: str) -> str | None:
    """What a reader of a result's numbers must be told where rounding outweighs the training; None where it does not.

    A step far below the spacing of numbers is not lost: of typical weights it turns a few to their neighbours, each by
    many times the step (5e-6 in bf16: 11 % of typical weights, and 5 times the step in all).
    """
    if precision == "fp32":
        return None
    found = movement(start, end, DTYPES[precision])
    if not 0 < found.moved <= found.added:
        return None
    return (
        f"{title}: training moved its weights by {found.moved:.1e} (root mean square), and rounding them to "
        f"{precision} for sampling changes that by {found.added:.1e}: its images may show rounding more than training; "
        f"set model.dtype={'fp16 or fp32' if precision == 'bf16' else 'fp32'}"
    )
