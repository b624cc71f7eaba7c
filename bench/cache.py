"""Latents and prompt embeddings, encoded once: no encoder runs in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

from bench.progress import track
from bench.stages import Stage, fingerprint

LAYOUT = 1  # raise when the files or their meaning change, so that older caches are not read


@dataclass(frozen=True)
class Embeddings:
    """Text encoder outputs, each distinct prompt stored once.

    `table` fp32 `[U, L, D]`; `index` int64 `[N]`, the table row of every prompt; `null` fp32 `[L, D]`, the
    embedding of the empty prompt (classifier-free guidance and prompt dropout).
    """

    table: np.ndarray
    index: np.ndarray
    null: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def lookup(self, samples: Sequence[int] | np.ndarray, dropped: np.ndarray | None = None) -> Tensor:
        """Embeddings `[B, L, D]` of the given prompts, the null embedding where `dropped` is true."""
        rows = np.array(self.table[self.index[samples]])
        if dropped is not None:
            rows[dropped] = self.null
        return torch.from_numpy(rows)


def encode_images(vae: AutoencoderKL, fetch: Callable[[Sequence[int]], np.ndarray], count: int,
                  batch_size: int = 32, path: Path | None = None) -> np.ndarray:
    """Encode images 0..count-1 to fp32 latents `[count, C, h, w]`, scaled as the UNet sees them.

    `fetch(indices)` returns uint8 `[n, H, W, 3]`. A latent is the posterior's mean: one image always gives
    one latent. With `path` the result is a memory-mapped .npy file, so it may be larger than memory.
    """
    batches = (range(start, min(start + batch_size, count)) for start in range(0, count, batch_size))
    encoded = (encode_image_batch(vae, fetch(batch)) for batch in batches)
    return _collect(encoded, count, "encoding images", path)


def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str], batch_size: int = 64,
                   path: Path | None = None) -> Embeddings:
    """Encode every distinct prompt once; longer prompts are cut at the text encoder's length."""
    position = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    unique = list(position)
    batches = (unique[start:start + batch_size] for start in range(0, len(unique), batch_size))
    encoded = (encode_prompt_batch(pipe, batch) for batch in batches)
    table = _collect(encoded, len(unique), "encoding prompts", path)
    index = np.array([position[prompt] for prompt in prompts], dtype=np.int64)
    return Embeddings(table, index, encode_prompt_batch(pipe, [""])[0])


def cached_latents(root: Path, made_from: dict[str, Any], vae: AutoencoderKL,
                   fetch: Callable[[Sequence[int]], np.ndarray], count: int,
                   batch_size: int = 32) -> np.ndarray:
    """`encode_images` through a folder under `root`; `made_from` names all that decides the content.

    That is the fingerprints of the weights and of the images. The result is memory-mapped and read-only.
    """
    stage = _stage(root, "latents", {**made_from, "count": count})
    if not stage.done:
        with stage.fresh() as folder:
            encode_images(vae, fetch, count, batch_size, folder / "latents.npy")
    return np.load(stage.directory / "latents.npy", mmap_mode="r")


def cached_prompts(root: Path, made_from: dict[str, Any], pipe: StableDiffusionPipeline,
                   prompts: Sequence[str]) -> Embeddings:
    """`encode_prompts` through a folder under `root`; `made_from` names the weights (their fingerprint)."""
    stage = _stage(root, "prompts", {**made_from, "prompts": fingerprint(list(prompts))})
    if not stage.done:
        with stage.fresh() as folder:
            embeddings = encode_prompts(pipe, prompts, path=folder / "table.npy")
            np.save(folder / "index.npy", embeddings.index)
            np.save(folder / "null.npy", embeddings.null)
    table = np.load(stage.directory / "table.npy", mmap_mode="r")
    return Embeddings(table, np.load(stage.directory / "index.npy"), np.load(stage.directory / "null.npy"))


def _stage(root: Path, kind: str, made_from: dict[str, Any]) -> Stage:
    """A folder per content, so that two suites share a cache without evicting each other."""
    inputs = {"kind": kind, "layout": LAYOUT, **made_from}
    return Stage(Path(root) / f"{kind}-{fingerprint(inputs)}", inputs)


@torch.inference_mode()
def encode_image_batch(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """One batch of `encode_images`: uint8 `[B, H, W, 3]` to fp32 `[B, C, h, w]`."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(vae.device).permute(0, 3, 1, 2)
    posterior = vae.encode((pixels.float() / 127.5 - 1).to(vae.dtype)).latent_dist
    return (posterior.mode().float() * vae.config.scaling_factor).cpu().numpy()


@torch.inference_mode()
def encode_prompt_batch(pipe: StableDiffusionPipeline, prompts: list[str]) -> np.ndarray:
    """One batch of `encode_prompts`: fp32 `[B, L, D]`."""
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    tokens = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                       return_tensors="pt").to(encoder.device)
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids, attention_mask=mask).last_hidden_state.float().cpu().numpy()


def _collect(batches: Iterable[np.ndarray], count: int, description: str, path: Path | None) -> np.ndarray:
    """Fill one fp32 array, in memory or in a .npy file, from batches whose row shape the first one tells."""
    allocate = partial(np.empty, dtype=np.float32)
    if path is not None:
        allocate = partial(np.lib.format.open_memmap, path, "w+", np.float32)
    out, row = None, 0
    with track(description=description, total=count) as bar:
        for batch in batches:
            out = allocate((count, *batch.shape[1:])) if out is None else out
            out[row:row + len(batch)] = batch
            row += len(batch)
            bar.update(len(batch))
    if isinstance(out, np.memmap):
        out.flush()
    return out
