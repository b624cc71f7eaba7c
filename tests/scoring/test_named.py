"""A name never stands without its checkpoint, and miniatures are warned about away from their world."""

from __future__ import annotations

import pytest

from bench import registry
from bench.data import world
from bench.data.prompts import load_prompts
from bench.scoring.named import beyond_their_world, checkpoint, is_mini, named

MINI = {"title": "PickScore", "checkpoint": "mini (0123456789ab)"}


@pytest.mark.parametrize(
    ("said", "shown", "mini"),
    [
        ("mini (0123456789ab)", "mini", True),
        ("mini (0123456789ab) on mini (ba9876543210)", "mini", True),
        ("yuvalkirstain/PickScore_v1 (0123456789ab)", "yuvalkirstain/PickScore_v1", False),
        ("head.pth (0123456789ab) on openai/clip (0123456789ab)", "head.pth on openai/clip", False),
        ("head.pth (0123456789ab) on mini (0123456789ab)", "head.pth on mini", True),
        ("/weights/minister.pt (0123456789ab)", "/weights/minister.pt", False),
    ],
)
def test_a_checkpoint_is_shown_without_its_digest(said: str, shown: str, mini: bool) -> None:
    info = {"checkpoint": said}
    assert (checkpoint(info), is_mini(info), named("X", info)) == (shown, mini, f"X ({shown})")


def test_a_scorer_without_a_checkpoint_is_its_name() -> None:
    assert named("Darkness", {}) == "Darkness" and not is_mini({})


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward", "aesthetic", "clip"])
def test_every_bundled_scorer_says_that_it_is_a_miniature(name: str) -> None:
    kind = registry.metric(name)
    assert named(kind.title, kind.load().info()) == f"{kind.title} (mini)"


def test_the_drawn_worlds_prompts_need_no_warning() -> None:
    prompts = [prompt for name in ("test", "hard") for prompt in load_prompts(f"world:{name}").prompts]
    assert beyond_their_world(prompts, {"pickscore": MINI}) == ""


def test_other_prompts_are_counted_once_and_one_is_named() -> None:
    drawn = world.caption(world.Scene((world.Thing("small", "red", "star"),), "single", "white"))
    said = beyond_their_world([drawn, "a cat", "a cat", "\x1bdog"], {"pickscore": MINI, "darkness": {"title": "D"}})
    assert said.startswith("warning: made for the drawn world alone: PickScore (mini); 2 of 3 prompts are not of it")
    assert "'a cat'" in said and "--weights official" in said and "\n" not in said and "\x1b" not in said
    real = {"pickscore": {"checkpoint": "yuvalkirstain/PickScore_v1 (0123456789ab)"}}
    assert beyond_their_world(["a cat"], real) == ""
