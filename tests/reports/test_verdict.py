"""Verdicts: what page and terminal say first, on runs whose answer is known."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import fake_runs
import numpy as np
import pytest
from test_apart import given

from bench.commands import run
from bench.reports import page, tables
from bench.reports.columns import of_before
from bench.reports.load import Runs, load_runs
from bench.reports.stats import Estimate
from bench.reports.summary import summary
from bench.reports.verdict import Verdict, headline, verdict, verdicts

LEAD = "judge/utility"


def methods(root: Path, seeds: tuple[int, ...] = (0,), count: int = 60) -> Path:
    """SFT and Diffusion-DPO, one iteration each, at guidance 1 and 3."""
    for method in ("sft", "diffusion_dpo"):
        for seed in seeds:
            fake_runs.write_run(root, method, seed, count=count, metrics={LEAD: fake_runs.METRICS[LEAD]})
    return root


def with_gains(root: Path, gains: dict[tuple[str, float], float], noise: float) -> Runs:
    """The runs under `root`, their scores replaced: base + gain (0 if not given) + noise of the model's own."""
    runs = load_runs(None, root)
    for (model, scale), rows in runs.scores.groupby(["model", "guidance"], observed=True):
        shared = np.random.default_rng(round(scale)).standard_normal(rows["prompt_id"].nunique())
        own = np.random.default_rng([round(scale), len(model)])
        for _, part in rows.groupby(rows["train_seed"].fillna(0)):
            new = shared + gains.get((model, scale), 0.0) + noise * own.standard_normal(len(part)) * (model != "base")
            runs.scores.loc[part.sort_values("prompt_id").index, "value"] = new
    return runs


def first_lines(runs: Runs, html: str | None = None) -> tuple[str, str, str]:
    """Headline and sentence below it on the page, and the first paragraph of the terminal."""
    html = html or page.html(runs)
    h1, lede = (re.search(pattern, html, re.S)[1] for pattern in (r"<h1>(.*?)</h1>", r'<p class="lede">(.*?)</p>'))
    words = [" ".join(unescape(re.sub(r"<[^>]+>", "", text)).replace("\u2212", "-").split()) for text in (h1, lede)]
    return words[0], words[1], " ".join(summary(runs).split("\n\n")[0].split()).rstrip(".")


def test_methods_that_learned_nothing_do_not_lead(tmp_path: Path) -> None:
    """One step at lr 1e-8: every prompt a little better, by less than a millionth of the spread; the interval knows."""
    runs = with_gains(methods(tmp_path), {("SFT", 3.0): 4e-6, ("SFT", 1.0): 4e-6, ("Diffusion-DPO", 3.0): 2e-6}, 1e-6)
    gain = tables.table(runs, "mean", "base", metrics=[LEAD]).set_index(["model", "guidance"])
    assert gain.loc[("SFT", 3.0), "low"] > 0  # what "SFT leads" stood above
    head, lede, terminal = first_lines(runs)
    assert head == terminal == "At every guidance scale no checkpoint is told apart from base"
    assert not re.search(r"\b(leads?|wins?|better|higher)\b", f"{head} {lede} {terminal}")
    assert "0.000 [0.000, 0.000] against base" in lede
    assert not tables.table(runs)["ahead"].any() and not tables.table(runs, "winrate")["ahead"].any()


def test_one_model_that_is_best_at_both_scales_but_clear_at_one(tmp_path: Path) -> None:
    """ "No method is clearly better than the base model" once stood above a gain of 1.13 at guidance 1."""
    gains = {("SFT", 1.0): 1.13, ("SFT", 3.0): 0.05, ("Diffusion-DPO", 1.0): -0.2}
    runs = with_gains(methods(tmp_path), gains, 1.0)
    found = verdicts(runs)
    assert [one.best for one in found] == ["SFT", "SFT"] and found[0].group[1] == 3
    head, _, terminal = first_lines(runs)
    assert (
        head
        == terminal
        == (
            "At guidance 3 no checkpoint is told apart from base; at guidance 1 this checkpoint "
            "of SFT scores higher than base and all others"
        )
    )


def test_two_training_seeds_speak_of_methods(tmp_path: Path) -> None:
    gains = {(model, scale): 2.0 for model in ("SFT", "Diffusion-DPO") for scale in (1.0, 3.0)}
    for seeds, word, other in (((0,), "checkpoints", "methods"), ((0, 1, 2), "methods", "checkpoints")):
        runs = with_gains(methods(tmp_path / word, seeds), gains, 0.1)
        html = page.html(runs)
        head, lede, terminal = first_lines(runs, html)
        verb = "are better" if word == "methods" else "score higher"
        assert head == terminal and f" {verb} than base" in head
        assert ("checkpoint" in head) == ("One training seed" in lede) == (word == "checkpoints")
        assert f"about {word}" in summary(runs) and f"about {other}" not in summary(runs)
        assert f"about {word}" in html and f"about {other}" not in html.replace("about these checkpoints", "")
        told = [one.as_dict() for one in verdicts(runs)]
        assert {one["speaks_of"] for one in told} == {word}
        assert json.loads(json.dumps(told))[0]["above_base"] == verdicts(runs)[0].order[:-1]


def said(better: list[tuple[str, str]], order: list[str], seeds: int = 2, lead: str = LEAD) -> Verdict:
    """A verdict in which exactly these (better, worse) pairs are told apart."""
    found = given(better, tuple(order))
    apart = type(found)(found.models, found.pairs, seeds, 1.0)
    above = [a for a in order if (a, "base") in better]
    below = [a for a in order if ("base", a) in better]
    column, value = of_before(lead), Estimate(1, 0, 2)
    return Verdict(("test", 3.0), column, apart, order, value, None, above, below, apart.alike(order))


@pytest.mark.parametrize(
    ("better", "order", "methods", "checkpoints"),
    [
        ([], ["A", "base"], "no method is told apart from base", "no checkpoint is told apart from base"),
        ([("A", "base")], ["A", "base"], "A is better than base", "this checkpoint of A scores higher than base"),
        (
            [("A", "base")],
            ["A", "B", "base"],
            "A is better than base, not told apart from B",
            "this checkpoint of A scores higher than base, not told apart from B",
        ),
        (
            [("A", "base"), ("A", "B")],
            ["A", "B", "base"],
            "A is better than base and all others",
            "this checkpoint of A scores higher than base and all others",
        ),
        (
            [("A", "base"), ("B", "base")],
            ["A", "B", "base"],
            "A and B are better than base, A highest, not told apart from B",
            "these checkpoints of A and B score higher than base, A highest, not told apart from B",
        ),
        (
            [("A", "base"), ("B", "base"), ("A", "B")],
            ["A", "B", "base"],
            "A and B are better than base, A above all others",
            "these checkpoints of A and B score higher than base, A above all others",
        ),
        # the highest mean is too uncertain to be told apart from anything, the second is not
        (
            [("B", "base")],
            ["A", "B", "base"],
            "B is better than base, A highest, not told apart from B and base",
            "this checkpoint of B scores higher than base, A highest, not told apart from B and base",
        ),
        (
            [("base", "B")],
            ["base", "A", "B"],
            "no method is told apart above base, B is worse",
            "no checkpoint is told apart above base, this checkpoint of B scores lower",
        ),
        (
            [(m, "base") for m in "ABCD"],
            [*"ABCDE", "base"],
            "4 of 5 methods are better than base, A highest, not told apart from 4 others",
            "4 of 5 checkpoints score higher than base, A highest, not told apart from 4 others",
        ),
        ([("A", "B")], ["A", "B"], "A is better than all others", "this checkpoint of A scores higher than all others"),
        ([], ["A", "B"], "A highest, not told apart from B", "A highest, not told apart from B"),
        ([], ["base"], "only base was scored", "only base was scored"),
    ],
)
def test_statements_by_hand(better: list, order: list, methods: str, checkpoints: str) -> None:
    assert said(better, order).statement == methods
    assert said(better, order, seeds=1).statement == checkpoints


def test_where_less_is_better_the_best_is_the_lowest() -> None:
    better = [("A", "base"), ("B", "base")]
    found = said(better, ["A", "B", "base"], seeds=1, lead="judge/fade")
    assert found.statement == "these checkpoints of A and B score lower than base, A lowest, not told apart from B"
    assert said([("base", "A")], ["base", "A"], 1, "judge/fade").statement == (
        "no checkpoint is told apart above base, this checkpoint of A scores higher"
    )


def test_the_listing_holds_everything_that_is_clear() -> None:
    found = said([("A", "base"), ("A", "C"), ("B", "C"), ("base", "C")], ["A", "B", "base", "C"])
    assert found.listing == {"above base": "A", "below base": "C", "not told apart": "A, B; B, base"}
    assert found.told == 4
    assert said([("A", "base")], ["A", "base"]).listing["not told apart"] == "none, every pair is"
    assert list(said([], ["A", "B"]).listing) == ["not told apart"]


def test_the_headline_keeps_to_the_first_prompt_set_and_names_every_scale() -> None:
    def at(prompt_set: str, scale: float, better: list) -> Verdict:
        found = said(better, ["spin-g3", "base"])
        return Verdict((prompt_set, scale), *(getattr(found, name) for name in list(vars(found))[1:]))

    clear, unclear = [("spin-g3", "base")], []
    assert headline([at("test", 3, clear), at("hard", 3, unclear)]) == "spin-g3 is better than base"
    assert headline([at("test", 3, clear), at("test", 1, clear), at("hard", 3, unclear)]) == (
        "At every guidance scale spin-g3 is better than base"
    )
    assert headline([at("test", 5, clear), at("test", 3, unclear), at("test", 1, clear)]) == (
        "At guidance 5 and 1 spin-g3 is better than base; at guidance 3 no method is told apart from base"
    )


def test_a_run_tells_programs_what_is_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Path(folder) for folder in methods(tmp_path / "runs").iterdir()]
    loaded = load_runs(folders)
    monkeypatch.setattr("bench.storage.runs.comparable", lambda run: [type("Run", (), {"folder": f}) for f in folders])
    run.compare([type("Run", (), {"id": "one"})], "json")
    told = json.loads(capsys.readouterr().out)
    assert told["headline"] == headline(verdicts(loaded)) and Path(told["page"]).exists()
    assert [(one["prompt_set"], one["guidance"]) for one in told["verdicts"]] == [("test", 3.0), ("test", 1.0)]
    pair = told["verdicts"][0]["pairs"][0]
    assert pair["first"] != pair["second"] == "base" and pair["low"] <= pair["value"] <= pair["high"]
    assert pair["better"] in (pair["first"], "") and 0 <= pair["p_holm"] <= 1
    assert {row["speaks_of"] for row in told["table"]} == {"checkpoints"}


def test_values_are_those_of_the_table(tmp_path: Path) -> None:
    runs = load_runs(None, methods(tmp_path))
    found = verdict(runs, ("test", 3.0))
    rows = tables.table(runs, "mean", None, "test", 3.0, [LEAD]).set_index("model")["value"]
    assert found.order == list(rows.sort_values(ascending=False).index)
    gain = tables.table(runs, "mean", "base", "test", 3.0, [LEAD]).set_index("model").loc[found.best]
    assert found.gain == tuple(gain[["value", "low", "high"]])
