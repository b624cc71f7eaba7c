"""What is encoded once is encoded right, found again, and never found half-written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.cache import Embeddings, cached_latents, cached_prompts, encode_images, encode_prompts

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


class Fetch:
    """Hands out images and counts how often it is asked."""

    def __init__(self, images: np.ndarray = IMAGES):
        self.images, self.calls = images, 0

    def __call__(self, indices) -> np.ndarray:
        self.calls += 1
        return self.images[list(indices)]


def test_a_latent_is_the_scaled_posterior_mean(tiny_pipeline):
    vae = tiny_pipeline.vae
    latents = encode_images(vae, Fetch(), len(IMAGES), batch_size=2)
    pixels = tiny_pipeline.image_processor.preprocess(IMAGES / 255.0).float()
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert latents.dtype == np.float32 and latents.shape == (5, 4, 8, 8)
    np.testing.assert_allclose(latents, expected, atol=1e-5)
    np.testing.assert_allclose(latents, encode_images(vae, Fetch(), len(IMAGES), batch_size=5), atol=1e-5)


def test_prompts_are_encoded_as_diffusers_does_and_once_each(tiny_pipeline):
    prompts = ["a red cat", "dog", "a red cat", "a very long prompt about a cat"]
    embeddings = encode_prompts(tiny_pipeline, prompts, batch_size=2)
    expected, null = tiny_pipeline.encode_prompt(prompts, "cpu", 1, True)
    assert len(embeddings) == 4 and len(embeddings.table) == 3
    np.testing.assert_allclose(embeddings.lookup(range(4)), expected.detach(), atol=1e-5)
    np.testing.assert_allclose(embeddings.null, null[0].detach(), atol=1e-5)


def test_lookup_replaces_dropped_prompts():
    table = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
    embeddings = Embeddings(table, np.array([2, 0, 1]), np.full((1, 2), -1, np.float32))
    rows = embeddings.lookup([0, 1, 2], np.array([False, True, False]))
    assert rows.squeeze(1).tolist() == [[4, 5], [-1, -1], [2, 3]]
    assert table.min() == 0  # the table itself is not written to


def test_latents_are_cached_memory_mapped_and_read_only(tiny_pipeline, tmp_path):
    fetch = Fetch()
    first = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    asked = fetch.calls
    again = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    assert fetch.calls == asked
    assert isinstance(again, np.memmap) and not again.flags.writeable
    np.testing.assert_array_equal(first, again)


def test_other_inputs_make_another_entry_and_keep_the_first(tiny_pipeline, tmp_path):
    fetch = Fetch()
    cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    other = cached_latents(tmp_path, {"data": "b"}, tiny_pipeline.vae, Fetch(IMAGES[::-1]), 5)
    fewer = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 3)
    asked = fetch.calls
    first = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    assert fetch.calls == asked and len(fewer) == 3
    np.testing.assert_allclose(other, first[::-1], atol=1e-5)


def test_a_failure_half_way_leaves_no_entry(tiny_pipeline, tmp_path):
    def breaks(indices):
        if 2 in indices:
            raise RuntimeError("broken image")
        return IMAGES[list(indices)]

    with pytest.raises(RuntimeError, match="broken image"):
        cached_latents(tmp_path, {}, tiny_pipeline.vae, breaks, 5, batch_size=1)
    assert not list(tmp_path.iterdir())
    assert len(cached_latents(tmp_path, {}, tiny_pipeline.vae, Fetch(), 5)) == 5


def test_what_a_killed_process_left_is_not_read(tiny_pipeline, tmp_path):
    """A kill leaves the temporary folder, or a folder whose marker never came: both are encoded anew."""
    folder = next(iter(_entry(tiny_pipeline, tmp_path / "whole")))
    killed = tmp_path / "killed"
    for name in (folder.name, f".{folder.name}.12345.tmp"):
        (killed / name).mkdir(parents=True)
        (killed / name / "latents.npy").write_bytes(b"\x93NUMPY half")
    fetch = Fetch()
    latents = cached_latents(killed, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    assert fetch.calls and latents.shape == (5, 4, 8, 8)


def _entry(pipe, root):
    cached_latents(root, {"data": "a"}, pipe.vae, Fetch(), 5)
    return root.iterdir()


def test_prompts_are_cached_by_weights_and_text(tiny_pipeline, tmp_path, monkeypatch):
    prompts = ["a cat", "dog", "a cat"]
    first = cached_prompts(tmp_path, {"weights": "w"}, tiny_pipeline, prompts)
    with monkeypatch.context() as patch:
        patch.setattr("bench.cache._encode_prompt_batch", lambda *_: pytest.fail("encoded again"))
        again = cached_prompts(tmp_path, {"weights": "w"}, tiny_pipeline, prompts)
    for name in ("table", "index", "null"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    cached_prompts(tmp_path, {"weights": "w"}, tiny_pipeline, prompts[:2])
    cached_prompts(tmp_path, {"weights": "v"}, tiny_pipeline, prompts)
    assert len(list(tmp_path.iterdir())) == 3
