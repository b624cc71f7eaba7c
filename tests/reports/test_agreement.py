"""Agreement of metrics: against scipy's own correlations, resampling by hand, and runs whose answer is known."""

from __future__ import annotations

import io
import json
from pathlib import Path

import fake_runs
import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau, spearmanr

from bench.commands import cli
from bench.reports import agreement, columns, stats, tables
from bench.reports.load import Runs, load_runs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_runs.write_all(tmp_path_factory.mktemp("runs"), seeds=(0, 1), count=60)


@pytest.fixture(scope="module")
def runs(root: Path) -> Runs:
    return load_runs(None, root)


def one(tidy: pd.DataFrame, unit: str, first: str, second: str) -> pd.Series:
    return tidy.set_index(["unit", "first", "second"]).loc[unit, first, second]


def wide(runs: Runs) -> pd.DataFrame:
    """Images by metrics at guidance 3, straight from the long table."""
    rows = runs.scores.query("guidance == 3").assign(train_seed=lambda t: t["train_seed"].fillna(0))
    return rows.pivot_table(
        index=["model", "train_seed", "prompt_id", "seed"], columns="metric", values="value", observed=True
    )


def test_over_images_it_is_scipys_correlation(runs: Runs) -> None:
    tidy = agreement.table(runs, guidance=3.0)
    images = wide(runs)
    assert len(images) == 11 * 60  # the base once, five trained models under two training seeds
    for first, second in (("pickscore", "clip"), ("aesthetic", "judge/utility")):
        row = one(tidy, "images", first, second)
        assert row["spearman"] == pytest.approx(spearmanr(images[first], images[second]).statistic)
        assert row["kendall"] == pytest.approx(kendalltau(images[first], images[second]).statistic)
        assert row["low"] < row["spearman"] < row["high"] and row["n"] == len(images) and row["n_prompts"] == 60
        assert pd.isna(row["told_apart"])


def test_a_defect_agrees_with_the_judge_where_it_falls(runs: Runs) -> None:
    images = wide(runs)
    tidy = agreement.table(runs, guidance=3.0, metrics=["pickscore", "judge/fade"])
    row = one(tidy, "images", "pickscore", "judge/fade")
    assert row["spearman"] == pytest.approx(-spearmanr(images["pickscore"], images["judge/fade"]).statistic)
    assert not tidy["beside"].any()  # it is the judge's, but not what decides who won


def test_over_changes_and_models(runs: Runs) -> None:
    tidy = agreement.table(runs, guidance=3.0)
    by_model = wide(runs).groupby(["model", "prompt_id"], observed=True).mean()
    gain = pd.concat([by_model.loc[model] - by_model.loc["base"] for model in runs.models if model != "base"])
    row = one(tidy, "changes", "pickscore", "judge/utility")
    assert row["spearman"] == pytest.approx(spearmanr(gain["pickscore"], gain["judge/utility"]).statistic)
    assert row["n"] == len(gain) == 5 * 60
    means = by_model.groupby("model", observed=True).mean()
    row = one(tidy, "models", "aesthetic", "judge/utility")
    assert row["spearman"] == pytest.approx(spearmanr(means["aesthetic"], means["judge/utility"]).statistic)
    assert row["kendall"] == pytest.approx(kendalltau(means["aesthetic"], means["judge/utility"]).statistic)
    assert row["n"] == 6 and row["low"] <= row["spearman"] <= row["high"]


def test_a_gamed_metric_is_told(tmp_path: Path) -> None:
    """`clip` falls where the judge's utility rises; `aesthetic` rises with it."""
    metrics = fake_runs.METRICS | {
        "clip": (0.33, 0.01, 0.001, -1.0),
        "aesthetic": (5.4, 0.1, 0.01, 3.0),
        "judge/utility": (0.8, 0.01, 0.001, 1.0),
    }
    fake_runs.write_all(tmp_path, metrics=metrics, count=40)
    tidy = agreement.table(load_runs(None, tmp_path), guidance=1.0)
    against, along = (one(tidy, "models", name, "judge/utility") for name in ("clip", "aesthetic"))
    assert against["spearman"] == pytest.approx(-1) and along["spearman"] == pytest.approx(1)
    assert against["told_apart"] == against["opposed"] >= 10 and along["opposed"] == 0 < along["told_apart"]
    assert "base > SPIN-3" in against["opposed_models"].split("; ")
    text = agreement.render(tidy)
    line = next(line for line in text.splitlines() if line.startswith("CLIP") and "-1.00 [-1.00, -1.00]" in line)
    assert line.split()[-2:] == [str(against["told_apart"]), str(against["opposed"])]
    assert agreement.opposed(tidy) == {"CLIP": against["opposed_models"]} and against["opposed_models"] in text


def test_the_sentence_tells_every_level_by_hand() -> None:
    """A metric that orders models as the judge does may order nothing else so, and that is said."""
    found = {
        "images": {"pickscore": (0.2, 0.4), "clip": (-0.3, -0.1), "aesthetic": (0.1, 0.3)},
        "changes": {"pickscore": (-0.1, 0.1), "clip": (0.0, 0.2), "aesthetic": (0.1, 0.3)},
        "models": {"pickscore": (0.5, 1.0), "clip": (0.5, 1.0), "aesthetic": (np.nan, np.nan)},
    }
    rows = pd.DataFrame(
        [
            (first, "judge/utility", unit, (low + high) / 2, low, high)
            for unit, metrics in found.items()
            for first, (low, high) in metrics.items()
        ],
        columns=["first", "second", "unit", "spearman", "low", "high"],
    )
    rows = rows.assign(first_title=[columns.of_before(name).title for name in rows["first"]], beside=True)
    assert agreement.sentence(rows) == (
        "Image by image with the judge: PickScore, Aesthetic; against it: CLIP. "
        "Prompt by prompt with the judge: Aesthetic; neither: PickScore, CLIP. "
        "Model by model with the judge: PickScore, CLIP."
    )
    assert agreement.sentence(rows.assign(beside=False)) == ""


def test_no_level_is_told_alone(runs: Runs) -> None:
    """Text and page: the sentence, and each level with its interval and count beside the others."""
    tidy = agreement.table(runs, guidance=3.0)
    text = agreement.render(tidy)
    said = agreement.sentence(tidy)
    assert said in " ".join(text.split()) and all(level in said for level in agreement.LEVELS.values())
    assert (
        "over images, n 660  over changes to base, n 300  over means of models, n 6"
        in " ".join(text.split("\n\n")[1].splitlines()[1].split("metric")[1:]).strip()
    )
    line = next(line for line in text.splitlines() if line.startswith("PickScore") and line.count("[") == 3)
    for unit in agreement.UNITS:
        row = one(tidy, unit, "pickscore", "judge/utility")
        assert f"{row['spearman']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" in line
    header, body = agreement.with_judge(tidy)
    assert len(header) == 6 and {len(row) for row in body} == {6}


def test_ranks_are_those_of_the_resample() -> None:
    """Against rows repeated as often as they were drawn, ties included."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (40, 3)).astype(float)
    weights = rng.integers(0, 4, (40, 5)).astype(np.float32)
    found = agreement.spearman(values, weights)
    for draw in range(5):
        repeated = np.repeat(values, weights[:, draw].astype(int), axis=0)
        np.testing.assert_allclose(found[draw], spearmanr(repeated).statistic, atol=1e-12)


def test_the_interval_covers_the_truth() -> None:
    """Of normal pairs whose rank correlation is known (6 / pi * asin(r / 2)), in about 95 of 100 samples."""
    truth, hits = 6 / np.pi * np.arcsin(0.6 / 2), 0
    for trial in range(100):
        x = np.random.default_rng(trial).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 150)
        ((_, _, _, low, high, _, _),) = agreement._over_rows(x, np.arange(150), 150)
        hits += low < truth < high
    assert 88 <= hits <= 99


def test_rows_without_a_score_leave_only_their_pairs_out() -> None:
    values = np.random.default_rng(1).standard_normal((50, 3))
    values[:20, 2] = np.nan
    found = {row[:2]: row for row in agreement._over_rows(values, np.arange(50), 50)}
    assert found[0, 1][-1] == 50 and found[0, 2][-1] == found[1, 2][-1] == 30
    assert found[0, 2][2] == pytest.approx(spearmanr(values[20:, 0], values[20:, 2]).statistic)


def test_without_spread_there_is_no_correlation() -> None:
    values = np.stack([np.arange(9.0), np.ones(9)], axis=1)
    ((_, _, value, low, high, _, _),) = agreement._over_rows(values, np.arange(9), 9)
    assert np.isnan([value, low, high]).all()


def test_a_metric_of_some_runs_only(tmp_path: Path) -> None:
    """The others are compared over all models, this one over those that have it."""
    fewer = {name: value for name, value in fake_runs.METRICS.items() if name != "aesthetic"}
    fake_runs.write_run(tmp_path, "sft", metrics=fewer)
    fake_runs.write_run(tmp_path, "spin")
    tidy = agreement.table(load_runs(None, tmp_path), guidance=1.0)
    assert one(tidy, "images", "pickscore", "clip")["n"] == 5 * 24
    assert one(tidy, "images", "pickscore", "aesthetic")["n"] == 4 * 24


def test_computed_once_for_table_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.reports import page

    fake_runs.write_run(tmp_path, "spin", guidance=(3.0,), count=12)
    loaded, calls = load_runs(None, tmp_path), []
    compute = agreement._setting
    monkeypatch.setattr(agreement, "_setting", lambda *given: calls.append(given[1]) or compute(*given))
    html = page.html(loaded)
    agreement.table(loaded)
    assert sorted(calls) == sorted(loaded.groups)
    assert "Do the metrics agree? Over changes to base" in html and "told apart by both" in html
    assert agreement.sentence(agreement.table(loaded, metrics=None)) in html
    value = agreement.matrix(agreement.table(loaded, guidance=3.0), "changes").loc["pickscore", "clip"]
    assert f"PickScore and CLIP {value:.2f}" in html


@pytest.mark.parametrize("format", ["text", "md", "latex"])
def test_formats_for_people(runs: Runs, format: str) -> None:
    shown = agreement.render(agreement.table(runs, guidance=3.0), format)
    for words in ("agreement with the judge", "over changes to base", "guidance 3", "60 prompts", "PickScore"):
        assert words in shown
    if format == "text":
        assert max(map(len, shown.splitlines()[:-1])) <= 140 and "Aesthetic" in shown
    if format == "latex":
        assert "95 %" not in shown and "&" in shown


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["table", *arguments])
    return exit_.value.code, *capsys.readouterr()


def test_the_command(root: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(
        capsys,
        str(root),
        "--stat",
        "agreement",
        "--format",
        "csv",
        "--guidance",
        "3",
        "--metrics",
        "pickscore,clip,judge/utility",
    )
    read = pd.read_csv(io.StringIO(out))
    assert code == 0 and list(read) == agreement.COLUMNS and len(read) == 3 * 3
    code, out, _ = run(capsys, str(root), "--stat", "agreement", "--format", "json", "--guidance", "3")
    assert {row["unit"] for row in json.loads(out)} == set(agreement.UNITS)
    code, _, err = run(capsys, str(root), "--stat", "agreement", "--against", "sft")
    assert code == 2 and "does not go with" in err
    code, _, err = run(capsys, str(root), "--stat", "agremeent")
    assert code == 2 and "did you mean 'agreement'" in err


def test_names_of_models_are_escaped(runs: Runs) -> None:
    tidy = agreement.table(runs, guidance=3.0, metrics=["clip", "judge/utility"])
    tidy["opposed"], tidy["opposed_models"] = 1, "a_b & | > base"
    assert r"a\_b \&" in agreement.render(tidy, "latex") and r"a\_b & \|" in agreement.render(tidy, "md")


def test_the_default_metrics_are_those_of_every_table(runs: Runs) -> None:
    tidy = agreement.table(runs, guidance=3.0)
    names = tables.chosen_metrics(runs, None)
    assert list(agreement.matrix(tidy, "images")) == names and len(tidy) == 3 * len(names) * (len(names) - 1) / 2
    assert not set(names) & set(stats.AVERAGES)
