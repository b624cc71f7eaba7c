"""The drawn world: exact, pure, and split without leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.data import PreferenceData, drawings, load_prompts, world
from bench.errors import BenchError, UsageError

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.integers(0, world.CAPTION_VARIANTS - 1), st.sampled_from([1, 2, 3]))
def test_parse_is_the_inverse_of_caption(seed, variant, count):
    scene = world.random_scene(np.random.default_rng(seed), counts=(count,))
    assert world.parse(world.caption(scene, variant)) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a small red circle",
        "a small red circle a large blue ring on a white background",
        "a small red circle above a large blue ring to the left of a small green star on a white background",
    ],
)
def test_parse_refuses_what_the_grammar_cannot_say(text):
    with pytest.raises(ValueError, match="not a caption"):
        world.parse(text)


def test_utility_worked_by_hand():
    """Asked: a small red circle left of a large blue ring on white. Drawn: the ring green, fade 0.5, shadow 0.2.

    Attributes asked: count, background, arrangement, and size, colour, shape of two objects = 9; one is wrong.
    alignment = 8/9; aesthetics = 1 - 0.20 * 0.5 - 0.15 * 0.2 = 0.87; utility = (0.8889 + 0.87) / 2 = 0.87944.
    """
    asked = world.parse("a small red circle to the left of a large blue ring on a white background")
    drawn = world.parse("a small red circle to the left of a large green ring on a white background")
    defects = (0.5, 0.0, 0.0, 0.0, 0.2)
    drawing = drawings.Drawing("", asked, drawn, defects, 0)
    assert drawing.alignment == pytest.approx(8 / 9)
    assert drawing.aesthetics == pytest.approx(0.87)
    assert drawing.utility == pytest.approx((8 / 9 + 0.87) / 2)


def test_a_dropped_object_costs_its_attributes_its_count_and_its_place():
    asked = world.parse("a small red circle above a large blue ring on a white background")
    drawn = world.parse("a small red circle on a white background")
    assert world.alignment(asked, drawn) == pytest.approx(4 / 9)  # background and the circle's three


def test_weights_leave_room_above_zero():
    assert sum(world.DEFECT_WEIGHTS.values()) == pytest.approx(1)
    assert world.aesthetics(np.zeros(5)) == 1


@given(seeds)
def test_drawings_are_pure_functions_of_seed_and_index(seed):
    first, again = drawings.corpus(seed, 3), drawings.corpus(seed, 3)
    assert first == again
    assert np.array_equal(drawings.render([first]), drawings.render([again]))
    assert drawings.corpus(seed, 4) != first


def test_a_drawing_does_not_depend_on_its_batch():
    items = [drawings.labelled(5, index) for index in range(12)]
    together = drawings.render(items)
    assert together.shape == (12, 64, 64, 3) and together.dtype == np.uint8
    alone = np.concatenate([drawings.render([item]) for item in items])
    assert np.array_equal(together, alone)


def test_objects_are_where_and_what_the_scene_says():
    scene = world.parse("a large red square to the left of a small blue circle on a white background")
    image = world.render([scene], np.zeros((1, 5)), [0])[0].astype(int)
    assert abs(image[32, 16] - world.COLOURS["red"]).max() <= 1
    assert abs(image[32, 48] - world.COLOURS["blue"]).max() <= 1
    assert abs(image[2, 2] - world.BACKGROUNDS["white"]).max() <= 1


@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_shape_covers_a_fair_part_of_its_circle(shape):
    scene = world.parse(f"a large red {shape} on a black background")
    image = world.render([scene], np.zeros((1, 5)), [1])[0].astype(int)
    covered = (abs(image - world.COLOURS["red"]).max(axis=2) < 40).sum() / (np.pi * world.RADII[1][1] ** 2)
    assert 0.25 < covered < 1.2


def test_each_defect_changes_what_it_names():
    scene = world.parse("a large red square on a grey background")
    clean, *spoilt = world.render([scene] * 6, np.concatenate([np.zeros((1, 5)), np.eye(5)]), [3] * 6).astype(float)
    fade, oversaturation, blotches, displacement, shadow = spoilt
    chroma = {
        name: np.ptp(image, axis=2).max()
        for name, image in (("clean", clean), ("fade", fade), ("over", oversaturation))
    }
    assert chroma["fade"] < 0.6 * chroma["clean"] < chroma["clean"] < 0.8 * chroma["over"]
    assert blotches[:8, :8].std() > 5 * max(clean[:8, :8].std(), 1)
    centre = [np.argwhere(image[..., 0] > 170).mean(axis=0) for image in (clean, displacement)]
    assert 6 < np.linalg.norm(centre[1] - centre[0]) < 10
    assert shadow.mean() < 0.85 * clean.mean()


def test_splits_share_no_combination():
    sets = {name: load_prompts(f"world:{name}") for name in ("train", "validation", "test", "hard")}
    assert [len(sets[name]) for name in ("validation", "test", "hard")] == [250, 500, 250]
    combinations = {
        name: {world.parse(prompt).combination for prompt in prompts.prompts} for name, prompts in sets.items()
    }
    assert not combinations["test"] & (combinations["train"] | combinations["validation"])
    assert not combinations["validation"] & combinations["train"]
    assert all(len(world.parse(prompt).things) == 3 for prompt in sets["hard"].prompts)
    for seed in range(200):
        assert world.split_of(drawings.corpus(seed, 0).asked) == "train"
        assert world.split_of(drawings.pair(seed, 0).winner.asked) == "train"


def test_prompt_ids_are_unique_and_depend_on_the_text_alone(tmp_path):
    whole, part = load_prompts("world:test"), load_prompts("world:test", 7)
    assert len(set(whole.ids)) == 500 and part.ids == whole.ids[:7]
    path = tmp_path / "twice.txt"
    path.write_text("one\ntwo\none\n")
    ids = load_prompts(str(path)).ids
    assert ids[2] == ids[0] + "-2"


def test_labels_follow_the_exact_utility_with_noise():
    pairs = [drawings.pair(0, index) for index in range(1500)]
    agree = np.mean([pair.winner.utility >= pair.loser.utility for pair in pairs])
    assert 0.72 < agree < 0.88
    corpus = np.mean([drawings.corpus(0, index).aesthetics for index in range(1500)])
    assert np.mean([pair.winner.aesthetics for pair in pairs]) > corpus + 0.15


def test_preference_data_renders_winners_and_losers_of_the_same_prompt():
    data = PreferenceData(size=6, seed=1)
    assert len(data) == 6 == len(data.prompts)
    assert data.winners([0, 5]).shape == (2, 64, 64, 3)
    assert not np.array_equal(data.winners([2]), data.losers([2]))
    assert data.fingerprint == PreferenceData(6, 1).fingerprint != PreferenceData(6, 2).fingerprint


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "empty.txt", "no prompts"),
        ("a\n\nb\n", "gap.txt", "1 empty prompt.*row 2"),
        ("words\nhello\n", "table.csv", "no column 'prompt'; found words"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path, content, name, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(BenchError, match=message):
        load_prompts(str(path))


def test_unknown_prompt_sets_get_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'test'"):
        load_prompts("world:tset")
    with pytest.raises(BenchError, match="not found"):
        load_prompts("nowhere.txt")
