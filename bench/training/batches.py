"""What a training step sees: which samples, at which timestep, under which noise.

Every choice is a pure function of the seed, the step and the sample. Methods that share a seed therefore
share all of them (common random numbers), and neither micro-batch nor number of processes changes any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.errors import BenchError
from bench.methods.base import Facts
from bench.runtime.seeding import SPAN, derive, normal
from bench.storage.cache import Embeddings
from bench.storage.shards import Rows


@dataclass(frozen=True)
class TrainData:
    """Latents of winners and losers `[N, C, h, w]`, scaled as the UNet sees them, and their prompts.

    With horizontal flips `[N, 2, C, h, w]`: of every image as it is, and mirrored. The arrays may be
    memory-mapped. Row i of each belongs to the same pair; `losers` is None for SFT.
    """

    winners: np.ndarray | Rows
    losers: np.ndarray | Rows | None
    prompts: Embeddings

    def __post_init__(self) -> None:
        if self.losers is not None and self.losers.shape != self.winners.shape:
            raise BenchError(f"losers have shape {self.losers.shape}, winners {self.winners.shape}")
        if len(self.prompts) != len(self.winners):
            raise BenchError(f"{len(self.winners)} winners but {len(self.prompts)} prompts")

    def __len__(self) -> int:
        return len(self.winners)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, h, w."""
        return self.winners.shape[-3:]

    def latents(self, samples: np.ndarray, paired: bool, seed: int, step: int) -> np.ndarray:
        """Latents fp32 of winners `[b, C, h, w]`, or `[2b, C, h, w]` with their losers below them.

        Winner and loser of a pair are mirrored together: what tells them apart must not be that text in one of
        them is reversed.
        """
        sides = [side for side in (self.winners, self.losers if paired else None) if side is not None]
        rows = (samples,) if self.winners.ndim == 4 else (samples, flips(seed, step, samples))
        return np.concatenate([side[rows] for side in sides]).astype(np.float32, copy=False)


class Batch(NamedTuple):
    """A micro-batch of b samples; of pairs, rows 0..b-1 are the winners and rows b..2b-1 their losers."""

    noisy: Tensor  # fp32 [R, C, h, w], R = b or 2b
    noise: Tensor  # fp32 [R, C, h, w]
    timesteps: Tensor  # int64 [R]
    alpha_bar: Tensor  # fp32 [R, 1, 1, 1], the cumulative product at each timestep
    context: Tensor  # fp32 [R, L, D]


class Draws(NamedTuple):
    """The random choices of b samples in one step."""

    noise: Tensor  # fp32 [b, C, h, w]
    timesteps: Tensor  # int64 [b]
    dropped: np.ndarray  # bool [b], whether the prompt is replaced by the empty one


def sample_order(seed: int, start: int, count: int, size: int) -> np.ndarray:
    """Samples at positions start..start+count-1 of an endless run of shuffled epochs over `size` samples."""
    positions = (divmod(position, size) for position in range(start, start + count))
    return np.array([_permutation(seed, epoch, size)[offset] for epoch, offset in positions])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(derive("order", seed, epoch))
    return torch.randperm(size, generator=generator).numpy()


def draw(
    seed: int, step: int, samples: np.ndarray, shape: tuple[int, ...], timesteps: int, prompt_dropout: float
) -> Draws:
    """Draw noise, a timestep in 0..timesteps-1 and the prompt dropout of every sample in a step."""

    def seeds(purpose: str) -> list[int]:
        return [derive(purpose, seed, step, sample) for sample in samples.tolist()]

    return Draws(
        noise=normal(seeds("noise"), shape),
        timesteps=torch.tensor([value % timesteps for value in seeds("timestep")]),
        dropped=np.array([value < prompt_dropout * SPAN for value in seeds("dropout")]),
    )


def flips(seed: int, step: int, samples: np.ndarray) -> np.ndarray:
    """1 for every sample that is mirrored in a step, else 0, int64 [b]: a fair coin."""
    return np.array([derive("flip", seed, step, sample) % 2 for sample in samples.tolist()], dtype=np.int64)


def micro_batches(
    data: TrainData,
    samples: np.ndarray,
    *,
    paired: bool,
    seed: int,
    step: int,
    micro_batch: int,
    alpha_bar: Tensor,
    prompt_dropout: float,
) -> Iterator[Batch]:
    """Yield a step's samples in micro-batches on the device of `alpha_bar` (fp32 `[T]`)."""
    for start in range(0, len(samples), micro_batch):
        chosen = samples[start : start + micro_batch]
        draws = draw(seed, step, chosen, data.latent_shape, len(alpha_bar), prompt_dropout)
        latents = data.latents(chosen, paired, seed, step)
        context = data.prompts.lookup(chosen, draws.dropped)
        yield _assemble(torch.from_numpy(latents), context, draws, alpha_bar)


def _assemble(latents: Tensor, context: Tensor, draws: Draws, alpha_bar: Tensor) -> Batch:
    """Move to the device and noise the latents: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    That is eq. 4 of Ho et al. 2020, with a_t the cumulative product. Noise, timestep and prompt travel once
    and are repeated on the device: both sides of a pair share them.
    """
    device = alpha_bar.device
    latents = _move(latents, device)
    sides = len(latents) // len(draws.timesteps)
    noise = _move(draws.noise, device).repeat(sides, 1, 1, 1)
    timesteps = _move(draws.timesteps, device).repeat(sides)
    scale = alpha_bar[timesteps].view(-1, 1, 1, 1)
    noisy = scale.sqrt() * latents + (1 - scale).sqrt() * noise
    return Batch(noisy, noise, timesteps, scale, _move(context, device).repeat(sides, 1, 1))


def facts(timesteps: Tensor, alpha_bar: Tensor) -> Facts:
    """What a loss is told of samples at `timesteps` (int64 `[b]`) of the process of `alpha_bar` (fp32 `[T]`)."""
    now = alpha_bar[timesteps]
    before = torch.where(timesteps > 0, alpha_bar[timesteps - 1], 1.0)
    return Facts(timesteps, now.logit(), now, before)


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
