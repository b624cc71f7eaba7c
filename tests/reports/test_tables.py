"""Tables: tidy rows, their layouts, and the summary a run ends with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import fake_runs
import pandas as pd
import pytest

from bench.commands import cli
from bench.errors import UsageError
from bench.reports import layouts, seeds, significance, tables
from bench.reports.load import Runs, load_runs
from bench.reports.summary import summary


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    return load_runs(None, fake_runs.write_all(root, seeds=(0, 1, 2), prompt_sets=("test", "hard"), count=60))


def test_values_are_those_of_the_scores(runs: Runs) -> None:
    tidy = tables.table(runs, "mean", prompt_set="hard", guidance=1.0, metrics=["clip"]).set_index("model")
    rows = runs.scores.query("prompt_set == 'hard' and guidance == 1 and metric == 'clip' and model == 'SPIN-2'")
    row = tidy.loc["SPIN-2"]
    assert row["value"] == pytest.approx(rows["value"].mean())
    assert row["low"] < row["value"] < row["high"]
    assert (row["n_prompts"], row["n_seeds"], tidy.loc["base", "n_seeds"]) == (60, 3, 1)


def test_every_training_seed_by_itself_gives_the_means_of_the_table(runs: Runs) -> None:
    rows = seeds.table(runs, "test", 3.0, ["clip"])
    assert len(rows) == 1 + 5 * 3  # the base is not trained
    assert rows.loc[rows["model"] == "base", "train_seed"].isna().all()
    one = runs.scores.query(
        "prompt_set == 'test' and guidance == 3 and metric == 'clip' and model == 'SPIN-1' and train_seed == 2"
    )
    row = rows.query("model == 'SPIN-1' and train_seed == 2").squeeze()
    assert row["value"] == pytest.approx(one["value"].mean()) and row["n_prompts"] == 60
    means = rows.groupby("model")[["value", "difference"]].mean()
    table = tables.table(runs, "mean", None, "test", 3.0, ["clip"]).set_index("model")["value"]
    gains = tables.table(runs, "mean", "base", "test", 3.0, ["clip"]).set_index("model")["value"]
    pd.testing.assert_series_equal(means["value"].sort_index(), table.sort_index(), check_names=False)
    pd.testing.assert_series_equal(means["difference"].dropna().sort_index(), gains.sort_index(), check_names=False)
    assert seeds.render(rows, "csv").startswith("model,train_seed,prompt_set,guidance,metric,value,difference,")
    with pytest.raises(UsageError, match="--format of --stat seeds: unknown 'text'; one of csv, json"):
        seeds.render(rows, "text")


def test_defaults_differences_and_win_rates(runs: Runs) -> None:
    tidy = tables.table(runs)
    assert len(tidy) == 6 * 4 * 6  # models, settings, metrics with the judge's three main readings
    assert "judge/fade" not in set(tidy["metric"])
    assert "judge/fade" in set(tables.table(runs, metrics=["judge"])["metric"])
    gain = tables.table(runs, "mean", "sft", metrics=["judge/utility"])
    assert "SFT" not in set(gain["model"])
    assert (gain.loc[gain["model"] == "base", "value"] < 0).all()
    rate = tables.table(runs, "winrate", metrics=["judge/utility"])
    assert rate["value"].between(0, 1).all() and set(rate["against"]) == {"base"}
    assert set(tables.table(runs, metrics=["average"])["metric"]) == {"average"}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same methods trained once: clear effects, and nothing between seeds to blur them."""
    return load_runs(None, fake_runs.write_all(tmp_path_factory.mktemp("once"), count=60))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stat": "meen"}, "did you mean 'mean'"),
        ({"against": "spim"}, "did you mean"),
        ({"metrics": ["pikscore"]}, "did you mean 'pickscore'"),
        ({"prompt_set": "tset"}, "test at guidance 1"),
        ({"guidance": 7.5}, "hard at guidance 3"),
        ({"protocol": "worst"}, "one, mean, best"),
    ],
)
def test_wrong_requests_are_told_in_one_line(runs: Runs, options: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        tables.table(runs, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_formats_for_programs_are_tidy(runs: Runs) -> None:
    tidy = tables.table(runs, "median", guidance=3.0, metrics=["clip", "judge/utility"])
    read = pd.read_csv(io.StringIO(tables.render(tidy, "csv")), keep_default_na=False)
    assert read["value"].tolist() == pytest.approx(tidy["value"].tolist())
    rows = json.loads(tables.render(tidy, "json"))
    assert len(rows) == len(tidy) and rows[0]["stat"] == "median" and rows[0]["n_prompts"] == 60


@pytest.mark.parametrize("format", ["text", "md", "latex"])
def test_formats_for_people_name_their_protocol_and_set_the_judge_apart(runs: Runs, format: str) -> None:
    shown = tables.render(tables.table(runs, "winrate", guidance=3.0), format)
    for words in (
        "prompt set test",
        "prompt set hard",
        "guidance 3",
        "60 prompts",
        "3 training seeds",
        "mean over the images",
        "about methods",
        "judge, a network that reads",
        "told apart",
        "over base",
    ):
        assert words in shown
    judged = [line for line in shown.splitlines() if "utility" in line]
    assert judged and not any("PickScore" in line for line in judged)


def test_marked_is_what_none_is_told_apart_above(once: Runs) -> None:
    """By hand from the pairs themselves: in every column, in every format, and nothing else is marked."""
    metrics = ["judge/utility", "judge/fade"]
    tidy = tables.table(once, prompt_set="test", guidance=3.0, metrics=metrics)
    for column, metric in enumerate(metrics, 2):
        pairs = pd.concat(
            [
                tables.apart(once, ("test", scale), metric, "mean", "mean").pairs.assign(scale=scale)
                for scale in (1.0, 3.0)
            ]
        )
        assert len(pairs) == 2 * 15
        clear = pairs[(significance.holm(pairs["p"]) < 0.05) & (pairs["scale"] == 3)]
        higher = (clear["value"] > 0) == (metric == "judge/utility")  # of a defect less is better
        better, worse = (clear["first"].where(side, clear["second"]) for side in (higher, ~higher))
        ahead = set(better) - set(worse)
        assert 0 < len(ahead) < len(once.models)
        assert set(tidy.loc[tidy["ahead"] & (tidy["metric"] == metric), "model"]) == ahead
        lines = [line.split("|") for line in tables.render(tidy, "md").splitlines() if line.startswith("| ")][2:]
        assert {line[1].strip() for line in lines if line[column].strip().startswith("**")} == ahead
        starred = [line for line in tables.render(tidy, "text").splitlines() if "* [" in line]
        assert {line.split()[0] for line in starred} >= ahead
    assert tables.render(tidy, "latex").count(r"\textbf{") == tidy["ahead"].sum()
    assert r"\underline" not in tables.render(tidy, "latex")


def test_where_nothing_is_told_apart_nothing_is_marked(runs: Runs) -> None:
    alone = tables.table(runs, prompt_set="test", guidance=3.0, metrics=["clip"]).assign(ahead=False)
    for format, mark in (("text", "* ["), ("md", "**"), ("latex", "textbf")):
        shown = tables.render(alone, format)
        assert mark not in shown and "Nothing is marked: no two models are told apart." in shown


def test_what_rounds_to_nothing_has_no_sign_and_no_digits(runs: Runs) -> None:
    """A difference a millionth of the spread between prompts, however sure."""
    gain = tables.table(runs, "mean", "base", "test", 3.0, ["judge/utility"])
    tiny = gain.assign(value=2e-7, low=-1e-7, high=5e-7)
    assert "0.0000  [0.0000, 0.0000]" in tables.render(tiny, "text")
    assert "+0.06" in tables.render(gain, "text")


def test_programs_are_told_what_rows_speak_of(runs: Runs, once: Runs) -> None:
    for found, word in ((runs, "methods"), (once, "checkpoints")):
        tidy = tables.table(found, guidance=3.0, metrics=["judge/utility"])
        rows = json.loads(tables.render(tidy, "json"))
        assert {row["speaks_of"] for row in rows} == {word}
        assert [row["ahead"] for row in rows] == tidy["ahead"].tolist() and (found is runs or any(tidy["ahead"]))
        assert set(pd.read_csv(io.StringIO(tables.render(tidy, "csv")))["speaks_of"]) == {word}
        mixed = tidy.assign(speaks_of=["checkpoints", *["methods"] * (len(tidy) - 1)])
        assert layouts.about(mixed).endswith("about checkpoints") and layouts.about(tidy).endswith(f"about {word}")
        text = tables.render(tidy, "text")
        assert f"about {word}" in text and ("One training seed" in text) == (found is once)


def test_wide_text_is_folded_and_labels_are_escaped(runs: Runs) -> None:
    assert max(map(len, tables.render(tables.table(runs, metrics=["clip", "judge"])).splitlines())) < 200
    tidy = tables.table(runs, guidance=3.0, metrics=["clip"]).replace({"model": {"SFT": "a_b & 5% {x} | *y*"}})
    assert r"a\_b \& 5\% \{x\} $|$ *y*" in tables.render(tidy, "latex")
    assert r"a\_b & 5% {x} \| \*y\*" in tables.render(tidy, "md")


def test_summary(runs: Runs) -> None:
    text = summary(runs)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert text.count("utility (judge)") == 4 and "exact" not in text
    for model in runs.models:
        assert sum(line.startswith(f"{model} ") for line in lines) == 4
    assert "+0." in text and "[" in text


def test_without_a_judge_the_first_metric_leads(tmp_path: Path) -> None:
    metrics = {"pickscore": fake_runs.METRICS["pickscore"], "clip": fake_runs.METRICS["clip"]}
    fake_runs.write_run(tmp_path, "sft", metrics=metrics)
    text = summary(load_runs(None, tmp_path))
    assert "judge" not in text and "PickScore" in text


def test_averages_are_of_at_least_two_scores_and_say_of_which(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    several = fake_runs.write_run(tmp_path / "several", "sft")
    for metrics, said in (("average", True), ("clip", False)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["table", str(several), "--metrics", metrics])
        note = "note: Average and Mean z-score are those of PickScore, Aesthetic\n"
        assert ended.value.code == 0 and (note in capsys.readouterr().err) == said
    metrics = {"pickscore": fake_runs.METRICS["pickscore"], "clip": fake_runs.METRICS["clip"]}
    one = load_runs([fake_runs.write_run(tmp_path / "one", "sft", metrics=metrics)])
    assert tables.averaged(one) == []
    with pytest.raises(UsageError, match="average is of at least two of .*; scored were pickscore, clip"):
        tables.table(one, metrics=["average"])
