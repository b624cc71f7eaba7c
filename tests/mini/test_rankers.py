"""The miniature HPS v2 and ImageReward, by trainings of a few steps, come out in the published formats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data import drawings
from bench.metrics.hpsv2 import HPSv2
from bench.metrics.imagereward import ImageReward
from bench.metrics.open_clip_format import from_transformers, to_transformers
from bench.mini import rankers, scorers
from bench.mini.pools import Pool, pair_pool
from bench.mini.text import build_tokenizer

SMALL = {"seed": 0, "steps": 2, "held_out": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rankers")
    scorers.train_clip(root / "clip", root / "clip.pt", build_tokenizer(), pool=12, batch_size=4, **SMALL)
    shared = {"roundtrip": lambda images: images // 2, "samples": pair_pool(9, 2, "train"), **SMALL}
    rankers.train_imagereward(root / "imagereward", root / "ir.pt", root / "clip", pairs=6, batch_size=4, **shared)
    shared["samples"] = None
    rankers.train_hpsv2(root / "hpsv2", root / "hps.pt", root / "clip", rankings=6, batch_size=3, **shared)
    return root


def test_they_score_through_the_metrics(folder):
    pairs = pair_pool(5, 3, "test")
    for metric in (HPSv2.load(str(folder / "hpsv2" / "hpsv2.pt")), ImageReward.load(str(folder / "imagereward"))):
        scores = metric.score(pairs.images, pairs.captions)
        assert scores.shape == (6,) and np.isfinite(scores).all() and scores.std() > 0
        assert metric.count_truncated(pairs.captions) == 0
    sizes = [path.stat().st_size for path in folder.glob("*/*.pt")]
    assert len(sizes) == 2 and sum(sizes) < 7e6
    for name in ("hpsv2", "imagereward"):
        report = json.loads((folder / name / "accuracy.json").read_text())
        assert list(report) == ["drawings", "round_trips"] and report["drawings"]["pairwise"]["pairs"] == 6


def test_saving_in_open_clips_names_loses_nothing():
    from transformers import CLIPModel

    state = CLIPModel(scorers.clip_config(build_tokenizer())).state_dict()
    back = to_transformers(from_transformers(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_probability_of_a_ranking():
    """For two images the Bradley-Terry choice; for three the product of choosing best, then second best."""
    assert rankers.plackett_luce(torch.tensor([[1.0, 0.0]])).item() == pytest.approx(math.log(1 + math.exp(-1)))
    a, b, c = math.exp(2.0), math.exp(-1.0), math.exp(0.5)
    expected = -math.log(a / (a + b + c) * b / (b + c))
    assert rankers.plackett_luce(torch.tensor([[2.0, -1.0, 0.5]])).item() == pytest.approx(expected, rel=1e-5)


def test_rankings_follow_the_utilities():
    gap = 2 * drawings.LABEL_TEMPERATURE
    places = rankers.noisy_rankings(np.tile([0.5, 0.5 + gap, -9, -9.5], 4000), [0, 1])
    assert (places[:, 0] == 1).mean() == pytest.approx(1 / (1 + np.exp(-2)), abs=0.02)
    assert (places[:, 3] == 3).all()


def test_groups_share_a_caption():
    pool = rankers.ranked_pool(0, 3)
    assert len(pool) == 12 and all(len(set(pool.captions[start : start + 4])) == 1 for start in (0, 4, 8))
    mixed = Pool(np.zeros((4, 64, 64, 3), np.uint8), ["b", "a", "b", "a"], np.arange(4.0), np.arange(4.0), judged=4)
    assert rankers.grouped(mixed).captions == ["a", "a", "b", "b"] and rankers.grouped(mixed).judged == 4
    assert rankers.grouped(mixed).utility.tolist() == [1, 3, 0, 2]


def test_captions_are_words_to_the_reward_model():
    tokenizer = rankers.bert_tokenizer()
    captions = pair_pool(1, 20, "train").captions
    ids = tokenizer(captions).input_ids
    assert max(map(len, ids)) <= 35 and not any(tokenizer.unk_token_id in row for row in ids)
