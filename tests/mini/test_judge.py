"""The judges: how readings become scores, and that training learns and resumes."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.data import drawings, world
from bench.errors import BenchError
from bench.mini import MINI_WEIGHTS, pools
from bench.mini import __main__ as builder
from bench.mini import judge_training as judging
from bench.mini.judge import OPTIONS, Judge, JudgeNet, SecondJudge, scenes
from bench.mini.judge_training import train_judge

ASKED = "a small red circle to the left of a large blue ring on a navy background"


def reading_of(scene: world.Scene, defects: dict[str, float], beyond: str = "cross") -> dict[str, np.ndarray]:
    """What a perfect judge reads off a drawing; slots without an object hold arbitrary values."""
    named = {f"shape{slot}": beyond for slot in range(3)} | {"arrangement": scene.arrangement}
    named |= world.attributes(scene)
    attributes = {name: np.array([options.index(named.get(name, options[0]))]) for name, options in OPTIONS.items()}
    return attributes | {name: np.array([defects.get(name, 0.0)], np.float32) for name in world.DEFECTS}


@pytest.fixture
def judge_reading(monkeypatch):
    def make(caption: str, **defects: float) -> Judge:
        judge = Judge(JudgeNet())
        monkeypatch.setattr(judge, "read", lambda images: reading_of(world.parse(caption), defects))
        return judge

    return make


BLANK = np.zeros((1, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("shown", "right"),
    [
        (ASKED, 9),  # of 9: count, background, arrangement, and size, colour, shape of two objects
        (ASKED.replace("red", "green"), 8),
        (ASKED.replace("to the left of", "above"), 8),
        ("a large blue ring to the right of a small red circle on a navy background", 9),
        ("a large blue ring to the left of a small red circle on a navy background", 3),  # every slot is wrong
        ("a small red circle on a navy background", 4),  # count, arrangement and the second slot are lost
    ],
)
def test_alignment_is_the_share_of_asked_attributes(judge_reading, shown, right):
    score = judge_reading(shown).score(BLANK, [ASKED])
    assert score["alignment"][0] == pytest.approx(right / 9)
    assert score["alignment"].dtype == np.float32


def test_an_object_too_many_costs_the_count_only(judge_reading):
    score = judge_reading(ASKED).score(BLANK, ["a small red circle on a navy background"])
    assert score["alignment"][0] == pytest.approx(4 / 5)


def test_aesthetics_and_utility_are_the_worlds(judge_reading):
    score = judge_reading(ASKED.replace("red", "green"), fade=0.5, shadow=1.0).score(BLANK, [ASKED])
    weights = world.DEFECT_WEIGHTS
    aesthetics = 1 - 0.5 * weights["fade"] - weights["shadow"]
    assert score["aesthetics"][0] == pytest.approx(aesthetics)
    assert score["utility"][0] == pytest.approx((8 / 9 + aesthetics) / 2)
    assert score["fade"][0] == pytest.approx(0.5) and score["blotches"][0] == 0
    assert set(score) == {"utility", "alignment", "aesthetics", *world.DEFECTS}


def test_reading_and_exact_labels_agree_on_a_drawing():
    """What `targets` calls the truth, read back, gives the drawing's own alignment and utility."""
    items = [drawings.pair(0, index).loser for index in range(40)]
    attributes, defects = judging.targets(items)
    reading = {name: value.clamp(min=0).numpy() for name, value in attributes.items()}
    reading |= dict(zip(world.DEFECTS, defects.numpy().T, strict=True))
    for item, scene in zip(items, scenes(reading), strict=True):
        assert scene == item.drawn
        assert world.alignment(item.asked, scene) == item.alignment


def test_a_foreign_prompt_is_refused_in_one_line():
    with pytest.raises(BenchError, match="drawn world's captions only: .*an astronaut"):
        Judge(JudgeNet()).score(BLANK, ["an astronaut riding a horse"])


def test_nothing_to_judge():
    assert Judge(JudgeNet()).score([], [])["utility"].shape == (0,)


def test_batches_sizes_and_modes_do_not_matter():
    torch.manual_seed(0)
    images = drawings.render([drawings.labelled(0, index) for index in range(5)])
    network = JudgeNet()
    at_once, one_by_one = Judge(network).read(images), Judge(network, batch_size=1).read(images)
    pictures = Judge(network).read([Image.fromarray(image).convert("RGBA") for image in images])
    for name, values in at_once.items():
        np.testing.assert_allclose(one_by_one[name], values, atol=1e-5)
        np.testing.assert_allclose(pictures[name], values, atol=1e-5)
    large = Image.fromarray(images[0]).resize((128, 128), Image.Resampling.NEAREST)
    assert len(Judge(network).read([large])["count"]) == 1


def test_size_of_the_network():
    assert sum(value.numel() for value in JudgeNet().parameters()) < 1_050_000


def train(folder, **changes):
    settings = {"seed": 1, "steps": 2, "batch_size": 4, "pool": 16, "held_out": 12}
    return train_judge(folder, folder.with_suffix(".pt"), **(settings | changes))


def test_training_saves_a_judge_with_its_accuracy(tmp_path):
    trained = train(tmp_path / "judge", roundtrip=lambda images: images // 2)
    report = json.loads((tmp_path / "judge" / "accuracy.json").read_text())
    assert set(report) == {"drawings", "round_trips"}
    assert {"count", "size0", "shape1"} <= set(report["drawings"]["attributes"]) <= set(OPTIONS)
    assert set(report["drawings"]["defects_r2"]) == set(world.DEFECTS)
    assert report["drawings"]["pairwise"]["pairs"] == 6
    loaded = Judge.load(tmp_path / "judge")
    assert loaded.accuracy == report == loaded.info()["accuracy"]
    images, prompts = np.concatenate([BLANK, BLANK + 99]), [ASKED] * 2
    for name, values in trained.score(images, prompts).items():
        np.testing.assert_array_equal(loaded.score(images, prompts)[name], values)


def test_training_is_a_function_of_the_seed(tmp_path):
    first, again, other = (
        train(tmp_path / name, seed=seed).info()["checkpoint"]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again != other


def test_a_second_judge_is_of_another_architecture_and_half_the_bytes(tmp_path):
    trained = train(tmp_path / "judge2", trunk="convnext", half=True, measured_on=1, seed=3)
    loaded = Judge.load(tmp_path / "judge2")
    assert (loaded.network.kind, Judge(JudgeNet()).network.kind) == ("convnext", "residual")
    weights = sum(value.numel() for value in JudgeNet("convnext").parameters())
    assert (tmp_path / "judge2" / "judge.safetensors").stat().st_size < 2 * weights + 10_000
    images, prompts = np.concatenate([BLANK, BLANK + 99]), [ASKED] * 2
    for name, values in trained.score(images, prompts).items():
        np.testing.assert_array_equal(loaded.score(images, prompts)[name], values)


def test_both_judges_are_measured_on_the_same_drawings(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(judging, "measure", lambda judge, seed, *_: seeds.append(seed) or {})
    train(tmp_path / "first", seed=0)
    train(tmp_path / "second", seed=100, measured_on=1)
    assert seeds == [1, 1]


def test_nothing_is_taught_by_the_second_judge_nor_it_by_what_taught_the_first():
    assert not any("judge2" in needs for needs in builder.NEEDS.values())
    plan = builder.PLAN["judge2"]
    assert plan["seed"] not in (builder.SEED, builder.SEED + 1) and plan["trunk"] != "residual"
    inspect.signature(train_judge).bind(None, None, **plan)


def test_missing_judge_is_one_line(tmp_path):
    with pytest.raises(BenchError, match=r"no judge at .*judge\.safetensors"):
        Judge.load(tmp_path)
    with pytest.raises(BenchError, match="weights 'no_such' not found"):
        Judge.load("no_such")


def test_another_networks_weights_are_refused_in_one_line(tmp_path):
    train(tmp_path / "judge")
    path = tmp_path / "judge" / "judge.safetensors"
    save_file(load_file(path), path, {"trunk": "convnext"})
    with pytest.raises(BenchError, match="does not hold a judge"):
        Judge.load(tmp_path / "judge")


def test_pairwise_accuracy_by_hand():
    utility = np.array([0.9, 0.1, 0.2, 0.8, 0.5, 0.5, 0.7, 0.6])
    report = pools.pairwise(np.array([3.0, 1.0, 2.0, 1.0, 0.0, 9.0, 5.0, 4.0]), utility)
    assert report["pairs"] == 3 and report["accuracy"] == round(2 / 3, 4)  # the tie is left out
    low, high = report["interval"]
    assert 0.2 < low < 2 / 3 < high < 0.95


def test_pairs_share_a_caption_and_have_their_exact_utility():
    pool = pools.pair_pool(3, 6, "validation", rough=True)
    assert pool.captions[0::2] == pool.captions[1::2] and pool.images.shape == (12, 64, 64, 3)
    seen = pool.round_tripped(lambda images: 255 - images, 4)
    both = pool + seen
    assert len(both) == 16 and (both.utility[12:] == pool.utility[:4]).all()
    np.testing.assert_array_equal(both.images[12:], 255 - pool.images[:4])


@pytest.mark.skipif(not (MINI_WEIGHTS / "judge").exists(), reason="the judge is not built")
def test_the_bundled_judge_reads_drawings():
    judge = Judge.load()
    pairs = pools.pair_pool(77, 60, "test")
    utility = judge.score(pairs.images, pairs.captions)["utility"]
    assert np.abs(utility - pairs.utility).mean() < 0.05
    assert judge.accuracy["round_trips"]["all_attributes"] > 0.85


@pytest.mark.skipif(not (MINI_WEIGHTS / SecondJudge.bundled).exists(), reason="the second judge is not built")
def test_the_second_judge_reads_drawings_as_its_record_says():
    judge = SecondJudge.load()
    assert judge.network.kind != Judge.load().network.kind
    pairs = pools.pair_pool(77, 60, "test")
    utility = judge.score(pairs.images, pairs.captions)["utility"]
    assert np.abs(utility - pairs.utility).mean() < 0.05
    assert judge.accuracy["round_trips"]["all_attributes"] > 0.85
    assert (MINI_WEIGHTS / SecondJudge.bundled / "judge.safetensors").stat().st_size < 1.5e6
