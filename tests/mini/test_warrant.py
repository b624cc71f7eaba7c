"""Both judges and the pixels on the same images: which images, and what is said of their agreement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.stats import kendalltau, rankdata, spearmanr

from bench.data import load_prompts, world
from bench.errors import BenchError, UsageError
from bench.mini import MINI_WEIGHTS, warrant
from bench.mini.judge import Judge, SecondJudge
from bench.scoring.evaluate import write_images


def readings(models: dict[str, float], prompts: int = 60, copies: int = 1, **changes) -> pd.DataFrame:
    """Images whose fade is a prompt's own and the model's; judge2 reads 0.1 more, the pixels the reverse of both."""
    own = np.repeat(np.random.default_rng(0).normal(size=prompts), copies)
    parts = []
    for model, shift in models.items():
        fade = own + shift
        parts.append(
            pd.DataFrame(
                {
                    "prompt_set": "test",
                    "guidance": 1.0,
                    "model": model,
                    "train_seed": 0,
                    "prompt": np.repeat([f"p{index:03d}" for index in range(prompts)], copies),
                    "seed": np.tile(np.arange(copies), prompts),
                    "judge/fade": fade,
                    "judge2/fade": fade + 0.1,
                    "pixels/fade": -fade,
                }
            )
        )
    return pd.concat(parts, ignore_index=True).assign(**changes)


def row(table: pd.DataFrame, model: str, statistic: str, first: str, second: str = "") -> pd.Series:
    [found] = [
        line
        for _, line in table.iterrows()
        if (line["model"], line["statistic"], line["first"], line["second"]) == (model, statistic, first, second)
    ]
    return found


def test_what_is_said_of_readers_that_agree_and_that_do_not():
    images = readings({"base": 0.0, "sft-1": 0.5, "spin-1": 1.0})
    table = warrant.warrant(images)
    assert row(table, "sft-1", "spearman", "judge", "judge2")["value"] == pytest.approx(1)
    assert row(table, "sft-1", "spearman", "judge", "pixels")["value"] == pytest.approx(-1)
    shift = row(table, "spin-1", "difference", "judge", "judge2")
    assert (shift["value"], shift["low"], shift["high"]) == pytest.approx((0.1, 0.1, 0.1))
    mean = row(table, "spin-1", "mean", "judge")
    own = images.loc[images["model"] == "spin-1", "judge/fade"]
    error = own.std(ddof=0) / np.sqrt(60)
    assert mean["value"] == pytest.approx(own.mean())
    assert mean["high"] - mean["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    for name in ("spearman", "kendall"):
        assert row(table, "order", name, "judge", "judge2")["value"] == pytest.approx(1)
        assert row(table, "order", name, "judge", "pixels")["value"] == pytest.approx(-1)
    assert row(table, "order", "kendall", "judge", "judge2")["n"] == 3
    assert row(table, "all", "mean", "judge")["n"] == 180 and set(table["quantity"]) == {"fade"}


def test_images_of_one_prompt_are_no_further_evidence():
    """Four equal images of every prompt: the interval is that of one image each."""
    width = {}
    for copies in (1, 4):
        mean = row(warrant.warrant(readings({"base": 0.0}, copies=copies)), "base", "mean", "judge")
        assert (mean["n"], mean["n_prompts"]) == (60 * copies, 60)
        width[copies] = mean["high"] - mean["low"]
    assert width[4] == pytest.approx(width[1])


def test_what_a_reader_cannot_read_is_left_out_in_pairs():
    images = readings({"base": 0.0})
    images.loc[:19, "pixels/fade"] = np.nan
    table = warrant.warrant(images)
    assert row(table, "base", "spearman", "judge", "pixels")["n"] == 40
    assert row(table, "base", "mean", "judge")["n"] == 60 and row(table, "base", "mean", "pixels")["n_prompts"] == 40
    nothing = warrant.warrant(readings({"base": 0.0}, **{"pixels/fade": np.nan}))
    assert "pixels" not in set(nothing["second"])  # what nobody measured has no row


def test_a_model_that_a_reader_hardly_sees_has_no_place_in_the_order():
    images = readings({"base": 0.0, "sft-1": 0.5, "spin-1": 1.0, "spin-2": 2.0})
    images.loc[images["model"].eq("spin-2") & ~images["prompt"].isin(["p000", "p001"]), "pixels/fade"] = np.nan
    table = warrant.warrant(images)
    assert row(table, "order", "kendall", "judge", "pixels")["n"] == 3
    assert row(table, "order", "kendall", "judge", "judge2")["n"] == 4
    images.loc[images["model"].eq("spin-1"), "pixels/fade"] = np.nan
    table = warrant.warrant(images)
    assert "pixels" not in set(table.loc[table["model"] == "order", "second"])


def test_a_tie_of_all_models_has_no_order():
    table = warrant.warrant(readings(dict.fromkeys(("base", "sft-1", "spin-1"), 0.0)))
    assert np.isnan(row(table, "order", "spearman", "judge", "judge2")["value"])


def test_orders_of_many_resamples_are_scipys():
    one, other = np.random.default_rng(0).integers(0, 5, (2, 20, 6)).astype(float)
    for found, theirs in (
        (warrant._kendall(one, other), kendalltau),
        (warrant._pearson(rankdata(one, axis=1), rankdata(other, axis=1)), spearmanr),
    ):
        np.testing.assert_allclose(found, [theirs(*pair).statistic for pair in zip(one, other, strict=True)])


def write_run(root: Path, name: str, method: str, seed: int, severities: dict[str, float], count: int = 8) -> Path:
    """A run whose checkpoints show what was asked, each with one severity of fade; made again the base is the same."""
    prompts = load_prompts("world:validation", count)
    folder = root / name / "images" / "validation"
    folder.mkdir(parents=True)
    (root / name / "protocol.json").write_text(json.dumps({"method": method, "seed": seed}))
    (folder / "prompts.json").write_text(json.dumps(dict(zip(prompts.ids, prompts.prompts, strict=True))))
    for checkpoint, severity in severities.items():
        defects = np.zeros((count, len(world.DEFECTS)))
        defects[:, world.DEFECTS.index("fade")] = severity
        place = folder / "g3" / checkpoint
        place.mkdir(parents=True)
        images = world.render([world.parse(prompt) for prompt in prompts.prompts], defects, range(count))
        write_images([place / f"{prompt}-7.png" for prompt in prompts.ids], images)
    return root / name


def test_which_images_are_read(tmp_path):
    first = write_run(tmp_path, "a", "sft", 0, {"iter0": 0.5, "iter1": 0.2, "iter1-step50": 0.3}, 1)
    second = write_run(tmp_path, "b", "sft", 1, {"iter0": 0.5, "iter1": 0.2}, 1)
    found = [(identity["model"], identity["train_seed"]) for _, identity in warrant.image_folders([first, second])]
    assert found == [("base", 0), ("sft-1", 0), ("sft-1-step50", 0), ("sft-1", 1)]
    again = write_run(tmp_path, "c", "sft", 1, {"iter1": 0.1}, 1)  # the same method and seed, so other settings
    found = [identity["model"] for _, identity in warrant.image_folders([first, second, again])]
    assert found == ["base", "sft-1", "sft-1-step50", "b-1", "c-1"]


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="is no run"):
        list(warrant.image_folders([tmp_path]))
    with pytest.raises(UsageError, match="unfinished has no images yet; finish it with"):
        warrant.read_runs([write_run(tmp_path, "unfinished", "sft", 0, {}, 1)], {})
    emptied = write_run(tmp_path, "emptied", "sft", 0, {"iter1": 0.5}, 1)
    next(emptied.rglob("*.png")).unlink()
    with pytest.raises(BenchError, match="iter1 has no images of the prompts"):
        warrant.read_runs([emptied], {})


def test_prompts_that_some_model_lacks_are_left_out(tmp_path):
    first = write_run(tmp_path, "a", "sft", 0, {"iter0": 0.5, "iter1": 0.2}, 4)
    second = write_run(tmp_path, "b", "spin", 0, {"iter1": 0.2}, 2)
    images = warrant.read_runs([first, second], {})
    assert images.groupby("model")["prompt"].nunique().to_dict() == {"base": 2, "sft-1": 2, "spin-1": 2}
    assert "pixels/fade" in images and len(images) == 6


def test_what_is_shown_by_hand():
    asked = world.parse("a small red circle to the left of a large blue ring on a navy background")
    one = world.parse("a small red circle on a navy background")
    other = world.parse("a small red circle on a beige background")
    found = warrant.shown([asked, asked, one, one], [asked, one, asked, other])
    np.testing.assert_array_equal(found["colours"], [1, 0.5, 1, 1])
    np.testing.assert_array_equal(found["background"], [1, 1, 1, 0])


@pytest.mark.skipif(
    not all((MINI_WEIGHTS / name).exists() for name in (Judge.bundled, SecondJudge.bundled, "pipeline")),
    reason="needs both judges and the autoencoder",
)
def test_the_command_finds_the_models_in_their_order(tmp_path, monkeypatch):
    """Drawings of more and less fade: all three readers see the order; on drawings all are near the truth."""
    monkeypatch.setattr(warrant, "HELD_OUT", ("held-out", 1000, 20))
    runs = [
        write_run(tmp_path, "a", "sft", 0, {"iter0": 0.9, "iter1": 0.5}),
        write_run(tmp_path, "b", "spin", 0, {"iter0": 0.9, "iter1": 0.1, "iter2": 0.0}),
    ]
    done = CliRunner().invoke(warrant.main, [*map(str, runs), "-o", str(tmp_path / "out" / "judge.csv")])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "out" / "judge.csv", keep_default_na=False, na_values=[""])
    assert tuple(table.columns) == warrant.COLUMNS
    fade = table[table["quantity"] == "fade"].fillna({"second": ""})
    generated, drawn = (fade[fade["prompt_set"] == name] for name in ("validation", "held-out"))
    for second in ("judge2", "pixels"):
        assert row(generated, "order", "spearman", "judge", second)["value"] == pytest.approx(1)
    for reader in warrant.READERS:
        assert row(drawn, "drawings", "spearman", "truth", reader)["value"] > 0.7
    refused = CliRunner().invoke(warrant.main, [str(tmp_path / "out")])
    assert refused.exit_code == 1 and "is no run" in refused.output
