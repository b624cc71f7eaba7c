"""What is encoded once is encoded right, found again, and never found half-written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.errors import BenchError
from bench.storage import cache, shards
from bench.storage.cache import Embeddings, cached_prompts, count_truncated, encode_images, encode_prompts
from bench.storage.cache import cached_latents as cached
from bench.storage.shards import BrokenRows, Share

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


SHAPE = (4, 8, 8)


def cached_latents(root, made_from, vae, fetch, count, **options):
    return cached(root, made_from, vae, fetch, count, SHAPE, **options)


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


def test_latents_are_cached_and_memory_mapped(tiny_pipeline, tmp_path):
    fetch = Fetch()
    first = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    asked = fetch.calls
    again = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    assert fetch.calls == asked
    assert all(isinstance(shard, np.memmap) and not shard.flags.writeable for shard in again.shards)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(again, encode_images(tiny_pipeline.vae, Fetch(), 5))


def test_other_inputs_make_another_entry_and_keep_the_first(tiny_pipeline, tmp_path):
    fetch = Fetch()
    cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    other = cached_latents(tmp_path, {"data": "b"}, tiny_pipeline.vae, Fetch(IMAGES[::-1]), 5)
    fewer = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 3)
    asked = fetch.calls
    first = cached_latents(tmp_path, {"data": "a"}, tiny_pipeline.vae, fetch, 5)
    assert fetch.calls == asked and len(fewer) == 3
    np.testing.assert_allclose(other, first[::-1], atol=1e-5)
    np.testing.assert_allclose(fewer, first[:3], atol=1e-5)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)


def test_rows_are_read_across_shards_in_the_order_asked_for(tiny_pipeline, tmp_path, small_shards):
    rows = cached_latents(tmp_path, {}, tiny_pipeline.vae, Fetch(), 5)
    whole = np.asarray(rows)
    assert [len(shard) for shard in rows.shards] == [2, 2, 1] and rows.shape == (5, 4, 8, 8)
    np.testing.assert_array_equal(rows[np.array([4, 0, 3, 0])], whole[[4, 0, 3, 0]])
    np.testing.assert_array_equal(rows.select(np.array([1, 3, 4]))[[2, 0]], whole[[4, 1]])
    np.testing.assert_allclose(whole, encode_images(tiny_pipeline.vae, Fetch(), 5), atol=1e-5)


def test_a_killed_encode_goes_on_from_the_last_finished_shard(tiny_pipeline, tmp_path, small_shards):
    """What a kill leaves is the temporary folder of the shard it was in, or a folder without its marker."""
    asked = []

    def fetch(indices):
        asked.extend(indices)
        return IMAGES[list(indices)]

    def breaks(indices):
        if 2 in indices:
            raise RuntimeError("power cut")
        return fetch(indices)

    with pytest.raises(RuntimeError, match="power cut"):
        cached_latents(tmp_path, {}, tiny_pipeline.vae, breaks, 5, batch_size=1)
    (entry,) = tmp_path.iterdir()
    assert [path.name for path in entry.iterdir()] == ["00000"]
    for name in ("00001", ".00001.12345.tmp"):
        (entry / name).mkdir()
        (entry / name / "rows.npy").write_bytes(b"\x93NUMPY half")
    del asked[:]
    latents = cached_latents(tmp_path, {}, tiny_pipeline.vae, fetch, 5, batch_size=1)
    assert asked == [2, 3, 4]
    np.testing.assert_array_equal(latents, encode_images(tiny_pipeline.vae, Fetch(), 5, batch_size=1))


def test_rows_that_cannot_be_read_are_marked_and_the_others_are_there(tiny_pipeline, tmp_path, small_shards):
    def fetch(indices):
        bad = {row: "undecodable image: truncated" for row in indices if row in (1, 4)}
        if bad:
            raise BrokenRows(bad)
        return IMAGES[list(indices)]

    for _ in range(2):  # made, and found
        latents = cached_latents(tmp_path, {}, tiny_pipeline.vae, fetch, 5)
        assert latents.broken == dict.fromkeys((1, 4), "undecodable image: truncated")
        assert np.isnan(latents[[1, 4]]).all()
        whole = encode_images(tiny_pipeline.vae, Fetch(), 5)
        np.testing.assert_allclose(latents[[0, 2, 3]], whole[[0, 2, 3]], atol=1e-5)


def test_mirrored_images_are_encoded_not_mirrored_latents(tiny_pipeline, tmp_path):
    both = cached_latents(tmp_path, {}, tiny_pipeline.vae, Fetch(), 5, flip=True)
    mirrored = encode_images(tiny_pipeline.vae, Fetch(IMAGES[:, :, ::-1]), 5)
    assert both.shape == (5, 2, 4, 8, 8)
    rows, side = np.array([3, 0, 3]), np.array([1, 0, 0])
    expected = np.stack([mirrored[3], both[[0], [0]][0], both[[3], [0]][0]])
    np.testing.assert_array_equal(both[rows, side], expected)
    assert abs(mirrored[0] - both[[0], [0]][0][:, :, ::-1]).max() > 1e-3


def test_half_precision_halves_the_disk(tiny_pipeline, tmp_path):
    half = cached_latents(tmp_path, {}, tiny_pipeline.vae, Fetch(), 5, precision="fp16")
    full = cached_latents(tmp_path, {}, tiny_pipeline.vae, Fetch(), 5)
    assert half.dtype == np.float16 and half.shards[0].nbytes * 2 == full.shards[0].nbytes
    np.testing.assert_allclose(half, full, atol=2e-3)
    prompts = cached_prompts(tmp_path, {}, tiny_pipeline, ["a cat", "a dog"], precision="fp16")
    assert prompts.table.dtype == np.float16 and prompts.lookup([1, 0]).dtype == torch.float32


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5 * 4 * 64 * 4 - 1}))
    fetch = Fetch()
    said = "latents: 5 rows need 5.12 kB in .*, but 5.12 kB are free; use a smaller data.size"
    with pytest.raises(BenchError, match=said) as caught:
        cached_latents(tmp_path, {}, tiny_pipeline.vae, fetch, 5)
    assert "\n" not in str(caught.value) and not fetch.calls and not list(tmp_path.iterdir())
    assert len(cached_latents(tmp_path, {}, tiny_pipeline.vae, fetch, 5, precision="fp16")) == 5
    assert "encoding images (2.56 kB)" in capsys.readouterr().err


def test_processes_share_the_shards_and_read_together(tiny_pipeline, tmp_path, small_shards):
    """The second process finds, when the first has come, its own shard and those of the first."""

    def first_comes():
        cached_latents(tmp_path, {}, tiny_pipeline.vae, Fetch(), 5, share=Share(0, 2, lambda: None))

    fetch = Fetch()
    latents = cached_latents(tmp_path, {}, tiny_pipeline.vae, fetch, 5, share=Share(1, 2, first_comes))
    assert fetch.calls == 1
    np.testing.assert_allclose(latents, encode_images(tiny_pipeline.vae, Fetch(), 5), atol=1e-5)
    with pytest.raises(BenchError, match="2 of 3 shards are not there yet, first 00000"):
        cached_latents(tmp_path, {"other": 1}, tiny_pipeline.vae, Fetch(), 5, share=Share(1, 2))


def test_prompts_are_cached_by_weights_and_text(tiny_pipeline, tmp_path, monkeypatch):
    prompts = ["a cat", "dog", "a cat"]
    first = cached_prompts(tmp_path, {"weights": "w"}, tiny_pipeline, prompts)
    with monkeypatch.context() as patch:
        encode = cache.encode_prompt_batch
        patch.setattr(
            cache,
            "encode_prompt_batch",
            lambda pipe, texts: encode(pipe, texts) if texts == [""] else pytest.fail("encoded again"),
        )
        again = cached_prompts(tmp_path, {"weights": "w"}, tiny_pipeline, prompts)
    for name in ("table", "index", "null"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    cached_prompts(tmp_path, {"weights": "w"}, tiny_pipeline, prompts[:1])
    cached_prompts(tmp_path, {"weights": "v"}, tiny_pipeline, prompts)
    assert len(list(tmp_path.iterdir())) == 3


def test_prompts_longer_than_the_text_encoder_are_counted_as_often_as_they_come(tiny_pipeline):
    """Of 8 tokens two are the ends, and single letters are one each: six fit."""
    six, seven = "a b c d e f", "a b c d e f g"
    assert count_truncated(tiny_pipeline.tokenizer, [six, seven, "", seven]) == 2
