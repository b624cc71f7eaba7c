"""The miniature scorers are saved in the published formats, by trainings of a few steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from bench.data import drawings, world
from bench.metrics.aesthetic import Aesthetic
from bench.metrics.clip import CLIPScore
from bench.metrics.clip_family import ClipBackbone
from bench.metrics.pickscore import PickScore
from bench.mini import scorers
from bench.mini.pools import pair_pool
from bench.mini.text import build_tokenizer

SMALL = {"seed": 0, "steps": 2, "batch_size": 4, "held_out": 6}


def darker(images: np.ndarray) -> np.ndarray:
    return images // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mini")
    samples = replace(pair_pool(9, 2, "train"), judged=4)
    shared = {"roundtrip": darker, "samples": samples, **SMALL}
    scorers.train_clip(root / "clip", root / "clip.pt", build_tokenizer(), pool=12, **shared)
    scorers.train_pickscore(root / "pickscore", root / "pickscore.pt", root / "clip", pairs=6, **shared)
    scorers.train_aesthetic(root / "aesthetic", root / "aesthetic.pt", root / "clip", pool=12, samples=samples, **SMALL)
    return root


def test_saved_in_the_published_formats(folder):
    for name in ("clip", "pickscore"):
        assert CLIPModel.from_pretrained(folder / name).dtype == torch.float16
    head = load_file(folder / "aesthetic" / "head.safetensors")
    assert {key.rsplit(".", 1)[0] for key in head} == {f"layers.{place}" for place in (0, 2, 4, 6, 7)}
    sizes = [path.stat().st_size for path in folder.glob("*/*.safetensors")]
    assert len(sizes) == 3 and sum(sizes) < 8e6


def test_they_score_through_the_metrics(folder):
    clip = str(folder / "clip")
    loaded = [
        CLIPScore.load(clip),
        PickScore.load(str(folder / "pickscore")),
        Aesthetic.load(str(folder / "aesthetic" / "head.safetensors"), backbone=clip),
    ]
    pairs = pair_pool(5, 2, "test")
    for metric in loaded:
        assert np.isfinite(metric.score(pairs.images, pairs.captions)).all()
    assert loaded[0].info()["truncates"] == "prompts after 77 tokens"


def test_accuracy_is_stored(folder):
    for name, sources in (("clip", 2), ("pickscore", 2), ("aesthetic", 1)):
        report = json.loads((folder / name / "accuracy.json").read_text())
        assert list(report) == ["drawings", "round_trips"][:sources]
        assert report["drawings"]["pairwise"]["pairs"] == 6


def test_who_labelled_what_a_scorer_was_taught_is_stored(folder):
    """12 drawings, round trips of half of them where there is an autoencoder, and 4 samples rated by the judge."""
    for name, images in (("clip", 22), ("pickscore", 22), ("aesthetic", 16)):
        stored = json.loads((folder / name / "training.json").read_text())
        assert stored == {"images": images, "labelled_by_judge": 4, "share": round(4 / images, 4)}


def test_training_sees_what_the_metric_sees(folder):
    backbone = ClipBackbone.load(str(folder / "clip"), "clip")
    pool = pair_pool(5, 2, "test")
    tokens = scorers.tokenise(backbone.tokenizer, pool.captions)
    with torch.no_grad():
        image, text = scorers.embed(backbone.model, backbone.pixels.processor, pool.images, tokens, "cpu")
    # Training runs in bf16, so agreement is to its three digits.
    torch.testing.assert_close(image, backbone.embed_images(pool.images), atol=0.02, rtol=0)
    torch.testing.assert_close(text, backbone.embed_texts(pool.captions), atol=0.02, rtol=0)


def test_choices_follow_bradley_terry():
    gap = 2 * drawings.LABEL_TEMPERATURE
    first, second = scorers.shares(np.array([0.5 + gap, 0.5, 0.1, 0.1]))
    assert first == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))])
    assert second == pytest.approx([0.5, 0.5])


def test_pairs_are_picked_together():
    rows = scorers.pick_pairs(seed=1, step=2, rows=20, count=5)
    assert len(set(rows)) == 10 and (rows[0::2] % 2 == 0).all() and (rows[1::2] == rows[0::2] + 1).all()
    np.testing.assert_array_equal(rows, scorers.pick_pairs(seed=1, step=2, rows=20, count=5))


def test_alternative_texts_name_what_is_striking():
    scene = world.parse("a small red circle on a navy background")
    dark = drawings.Drawing(world.caption(scene, 2), scene, scene, (0.0, 0.0, 0.6, 0.0, 0.9), 0)
    rng = np.random.default_rng(0)
    texts = {scorers.alternative_text(dark, rng) for _ in range(40)}
    assert texts == {
        "a picture of a small red circle on a navy background",
        "a blotchy, dark picture of a small red circle on a navy background",
    }


def test_twins_differ_and_texts_fit():
    pool = scorers.alternative_pool(0, 30)
    tokens = scorers.tokenise(build_tokenizer(), pool.captions)
    assert tokens.shape[0] == 60 and tokens.shape[1] < scorers.TEXT["max_position_embeddings"]
    scenes = [world.parse(caption) for caption in pool.captions]
    assert all(first != second for first, second in zip(scenes[0::2], scenes[1::2], strict=True))


def test_the_builder_teaches_each_scorer_from_the_same_inputs(tmp_path, monkeypatch):
    from bench.mini import __main__ as builder

    calls = {}
    for name in builder.SCORERS:
        monkeypatch.setitem(
            builder.SCORERS, name, lambda *places, _name=name, **given: calls.update({_name: (places, given)})
        )
    monkeypatch.setattr(builder.Builder, "load_samples", lambda self: "samples")
    work = builder.Builder(tmp_path / "work", tmp_path / "out", "cpu")
    for need in ("vae", "denoiser", "judge", "samples", "clip"):
        with work.stage(need).fresh():
            pass
    for name in builder.SCORERS:
        work.build(name)
        (folder, checkpoint, clip), given = calls[name]
        assert folder.parent == tmp_path / "work" and checkpoint.name == f"{name}.pt" and clip.name == "clip"
        assert given["samples"] == "samples" and builder.PLAN[name].items() <= given.items()
        assert work.stage(name).done
