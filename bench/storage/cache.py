"""Latents and prompt embeddings, encoded once: no encoder runs in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from bench.models.chunks import chunks
from bench.runtime.progress import track
from bench.storage.shards import ALONE, Rows, Share, Store, ahead
from bench.storage.stages import fingerprint

LAYOUT = 2  # raise when the files or their meaning change, so that older caches are not read


@dataclass(frozen=True)
class Embeddings:
    """Text encoder outputs, each distinct prompt stored once.

    `table` fp32 or fp16 `[U, L, D]`, an array or rows on disk; `index` int64 `[N]`, the table row of every
    prompt; `null` fp32 `[L, D]`, the embedding of the empty prompt (classifier-free guidance, prompt dropout).
    """

    table: np.ndarray | Rows
    index: np.ndarray
    null: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def lookup(self, samples: Sequence[int] | np.ndarray, dropped: np.ndarray | None = None) -> Tensor:
        """Embeddings fp32 `[B, L, D]` of the given prompts, the null embedding where `dropped` is true."""
        rows = np.array(self.table[self.index[samples]], dtype=np.float32)
        if dropped is not None:
            rows[dropped] = self.null
        return torch.from_numpy(rows)

    def select(self, positions: np.ndarray) -> Embeddings:
        """The embeddings of some of the prompts."""
        return Embeddings(self.table, self.index[positions], self.null)


def encode_images(
    vae: AutoencoderKL, fetch: Callable[[Sequence[int]], np.ndarray], count: int, batch_size: int = 32
) -> np.ndarray:
    """Encode images 0..count-1 to fp32 latents `[count, C, h, w]` in memory, scaled as the UNet sees them.

    `fetch(indices)` returns uint8 `[n, H, W, 3]`. A latent is the posterior's mean, not a sample of it: one
    image always gives one latent, and Stable Diffusion's posterior is so narrow that nothing else is lost.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    encoded = (encode_image_batch(vae, images) for images in ahead(fetch, batches))
    return _collect(encoded, count, "encoding images")


def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str], batch_size: int = 64) -> Embeddings:
    """Encode every distinct prompt once, in memory; longer prompts are cut at the text encoder's length."""
    unique, index = _distinct(prompts)
    batches = (unique[start : start + batch_size] for start in range(0, len(unique), batch_size))
    encoded = (encode_prompt_batch(pipe, batch) for batch in batches)
    table = _collect(encoded, len(unique), "encoding prompts")
    return Embeddings(table, index, encode_prompt_batch(pipe, [""])[0])


def cached_latents(
    root: Path,
    made_from: dict[str, Any],
    vae: AutoencoderKL,
    fetch: Callable[[Sequence[int]], np.ndarray],
    count: int,
    shape: Sequence[int],
    *,
    batch_size: int = 32,
    flip: bool = False,
    precision: str = "fp32",
    share: Share = ALONE,
) -> Rows:
    """`encode_images` through a folder under `root`, each latent of `shape` C, h, w.

    `made_from` names all that decides the content: the fingerprints of the weights and of the images. With
    `flip` every image is encoded as it is and mirrored, `[count, 2, C, h, w]`: the encoder of a mirrored image
    is not the mirrored latent. Images that `fetch` cannot read (bench.storage.shards.BrokenRows) are in `broken`.
    With several processes each encodes its `share`; all of them must call.
    """

    def encode(images: np.ndarray) -> np.ndarray:
        if not flip:
            return encode_image_batch(vae, images)
        return np.stack([encode_image_batch(vae, side) for side in (images, images[:, :, ::-1])], axis=1)

    store = Store(
        root,
        "latents",
        {"layout": LAYOUT, "flip": flip, **made_from},
        count,
        (2, *shape) if flip else shape,
        np.dtype(f"float{precision[2:]}"),
    )
    store.fill(fetch, encode, batch_size, "encoding images", share)
    return store.read()


def cached_prompts(
    root: Path,
    made_from: dict[str, Any],
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    precision: str = "fp32",
    batch_size: int = 64,
    share: Share = ALONE,
) -> Embeddings:
    """`encode_prompts` through a folder under `root`; `made_from` names the weights (their fingerprint)."""
    unique, index = _distinct(prompts)
    null = encode_prompt_batch(pipe, [""])[0]
    made_from = {"layout": LAYOUT, **made_from, "prompts": fingerprint(unique)}
    store = Store(root, "prompts", made_from, len(unique), null.shape, np.dtype(f"float{precision[2:]}"))
    store.fill(
        lambda rows: [unique[row] for row in rows],
        lambda texts: encode_prompt_batch(pipe, texts),
        batch_size,
        "encoding prompts",
        share,
    )
    return Embeddings(store.read(), index, null)


def _distinct(prompts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct prompts in order, and for every prompt its place among them, int64 [N]."""
    position: dict[str, int] = {}
    index = [position.setdefault(prompt, len(position)) for prompt in prompts]
    return list(position), np.array(index, dtype=np.int64)


@torch.inference_mode()
def encode_image_batch(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """One batch of `encode_images`: uint8 `[B, H, W, 3]` to fp32 `[B, C, h, w]`."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).to(vae.device).permute(0, 3, 1, 2)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    parts = chunks(vae, pixels, *(side // scale for side in pixels.shape[-2:]))
    posteriors = [vae.encode((part.float() / 127.5 - 1).to(vae.dtype)).latent_dist for part in parts]
    return (torch.cat([one.mode() for one in posteriors]).float() * vae.config.scaling_factor).cpu().numpy()


@torch.inference_mode()
def encode_prompt_batch(pipe: StableDiffusionPipeline, prompts: list[str]) -> np.ndarray:
    """One batch of `encode_prompts`: fp32 `[B, L, D]`."""
    tokenizer, encoder = pipe.tokenizer, pipe.text_encoder
    tokens = tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).to(encoder.device)
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids, attention_mask=mask).last_hidden_state.float().cpu().numpy()


def count_truncated(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> int:
    """How many of these prompts are longer than the text encoder reads, and lose their end in `encode_prompts`."""
    unique, index = _distinct(prompts)
    lengths = np.array([len(tokens) for tokens in tokenizer(unique, verbose=False).input_ids])
    return int((lengths > tokenizer.model_max_length)[index].sum())


def _collect(batches: Iterable[np.ndarray], count: int, description: str) -> np.ndarray:
    """Fill one fp32 array from batches whose row shape the first one tells."""
    out, row = None, 0
    with track(description=description, total=count) as bar:
        for batch in batches:
            out = np.empty((count, *batch.shape[1:]), np.float32) if out is None else out
            out[row : row + len(batch)] = batch
            row += len(batch)
            bar.update(len(batch))
    return out
