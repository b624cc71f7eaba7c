"""No tensor of an autoencoder passes 2^31 elements, and what is small enough is not divided."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.models import chunks as rows
from bench.models.architecture import architecture
from bench.sampling import sample as sampling
from bench.storage.cache import encode_image_batch


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, made)
        return made

    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        self.elements = max(self.elements, tensor.numel())
        return tensor


@pytest.fixture(scope="module")
def sd15() -> AutoencoderKL:
    return architecture("random:sd15").vae


@torch.no_grad()
def largest(call) -> int:
    with Largest() as seen:
        call()
    return seen.elements


def test_the_largest_tensor_of_one_image_is_the_one_counted(sd15, tiny_pipeline):
    """SD-1.5's decoder has 256 channels on 512 x 512 pixels: 67 million elements, and 2^31 in 32 images."""
    latents, image = torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, 3, 512, 512, device="meta")
    assert rows.widest(sd15, 64, 64) == largest(lambda: sd15.decode(latents)) == 2**31 // 32
    assert largest(lambda: sd15.encode(image)) <= rows.widest(sd15, 64, 64)
    assert rows.rows_at_once(sd15, 64, 64) == 31 and rows.rows_at_once(sd15, 1024, 1024) == 1
    tiny = tiny_pipeline.vae
    assert rows.widest(tiny, 8, 8) == largest(lambda: tiny.decode(torch.zeros(1, 4, 8, 8)))


@pytest.mark.parametrize("count", [31, 32, 64])
def test_no_tensor_of_a_batch_passes_the_limit(sd15, count):
    latents, pipe, made = torch.empty(count, 4, 64, 64, device="meta"), SimpleNamespace(vae=sd15), []
    assert largest(lambda: made.append(sampling._decode(pipe, latents))) <= rows.LIMIT
    assert made[0].shape == (count, 3, 512, 512)


def test_in_parts_images_are_the_same_and_within_the_limit_they_are_whole(tiny_pipeline, monkeypatch):
    vae, seen = tiny_pipeline.vae, []
    latents = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), np.uint8)
    for name in ("decode", "encode"):
        call = getattr(vae, name)
        monkeypatch.setattr(vae, name, lambda part, call=call: seen.append(len(part)) or call(part))

    def both():
        return sampling._decode(tiny_pipeline, latents), encode_image_batch(vae, images)

    whole = both()
    monkeypatch.setattr(rows, "LIMIT", 3 * rows.widest(vae, 8, 8))
    parts = both()
    assert seen == [7, 7, 3, 2, 2, 3, 2, 2]
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(parts[1], whole[1], rtol=0, atol=1e-5)
