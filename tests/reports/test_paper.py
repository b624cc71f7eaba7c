"""The paper's tables: its layout, measured numbers, and published ones only where they are verified."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import fake_runs
import pandas as pd
import pytest

from bench.errors import UsageError
from bench.reports import paper, stats, tables
from bench.reports.load import Runs, load_runs
from bench.reports.published import FILE, published

SEEDS = (5775709, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    metrics = {**fake_runs.METRICS, "hpsv2": (0.27, 0.02, 0.01, 0.1), "imagereward": (0.2, 0.9, 0.3, 5.0)}
    options = {"prompt_sets": ("test", "parts"), "guidance": (1.0, 7.5), "image_seeds": SEEDS}
    return load_runs(None, fake_runs.write_all(root, metrics=metrics, count=30, **options))


def test_published_cells_are_those_of_the_file() -> None:
    found = published()
    assert len(found) == sum(line.startswith("SPIN-Diffusion (arXiv") for line in FILE.read_text().splitlines())
    assert found[1, "SPIN-Diffusion-Iter3", "pickscore"].value == 22.0
    assert found[1, "SD-1.5", "pickscore"].kind == "derived"
    assert (2, "SD-1.5", "pickscore") not in found and (7, "SPIN-Diffusion-Iter2", "average") in found


def test_layout_and_rows_are_the_papers(runs: Runs) -> None:
    header, rows = paper.grid(paper.build(runs, 1).tidy)
    assert header == ["HPS", "Aesthetic", "ImageReward", "PickScore", "Average"]
    assert [(row, label) for row, label, _ in rows] == [
        ("SD-1.5", "base"),
        ("SFT (reproduced)", "SFT"),
        ("Diffusion-DPO", ""),
        ("Diffusion-DPO (reproduced)", "Diffusion-DPO"),
        *((f"SPIN-Diffusion-Iter{k}", f"SPIN-{k}") for k in (1, 2, 3)),
    ]
    cells = {row: dict(zip(header, line, strict=True)) for row, _, line in rows}
    assert [c[3] for c in rows[-1][2]] == ["", "6.25", "", "22.0", ""]
    assert cells["SD-1.5"]["PickScore"][3] == "21.2†"
    assert cells["Diffusion-DPO"]["Aesthetic"] == ("", "", 0, "5.86")


def test_numbers_are_best_of_five_over_the_prompts(runs: Runs) -> None:
    built = paper.build(runs, 1)
    scores = tables.group_scores(runs, ("test", 7.5))
    expected = stats.compare(scores, "pickscore", "mean", None, "best").set_index("model")
    row = built.tidy.query("row == 'SPIN-Diffusion-Iter2' and metric == 'pickscore'").iloc[0]
    assert row["value"] == pytest.approx(expected.loc["SPIN-2", "value"])
    assert (row["guidance"], row["protocol"], row["n_prompts"]) == (7.5, "best", 30)
    one = paper.build(runs, 1, guidance=1.0, protocol="one").tidy
    assert set(one["protocol"]) == {"one"} and set(one["guidance"]) == {1.0}


def test_marked_is_what_no_model_of_the_setting_is_told_apart_above(runs: Runs) -> None:
    """Not the highest number, and never a published one."""
    for number, stat in ((1, "mean"), (3, "winrate")):
        built = paper.build(runs, number)
        for metric, rows in built.tidy.groupby("metric"):
            ahead = tables.apart(runs, ("test", 7.5), metric, stat, "best").ahead
            assert set(rows.loc[rows["ahead"], "model"]) == set(ahead) - ({"base"} if number == 3 else set())
        assert paper.render(built, "latex").count(r"\textbf{") == built.tidy["ahead"].sum() > 5
        assert "One training seed" in paper.render(built, "text") and "about checkpoints" in " ".join(built.notes)
    unmarked = paper.PaperTable(1, "t", built.tidy.assign(ahead=False), [])
    assert "*" not in paper.render(unmarked, "text") and "**" not in paper.render(unmarked, "md").split("\n", 1)[1]


@pytest.mark.parametrize("number", paper.TABLES)
def test_without_runs_there_are_the_published_cells_and_no_others(number: int) -> None:
    built = paper.published_only(number)
    shown = {(number, row.row, row.metric): row.published for row in built.tidy.dropna(subset="published").itertuples()}
    assert shown == {key: cell.value for key, cell in published().items() if key[0] == number}
    assert built.tidy["value"].isna().all() and not built.tidy["ahead"].any() and "there is no run" in built.notes[0]
    for format in tables.FORMATS:
        rendered = paper.render(built, format)
        assert all(cell.text in rendered for key, cell in published().items() if key[0] == number)


def test_tables_have_the_same_columns_with_and_without_runs(runs: Runs) -> None:
    assert list(paper.published_only(1).tidy) == list(paper.build(runs, 1).tidy)


def test_win_rates_leave_their_baseline_out(runs: Runs) -> None:
    for number, gone in ((3, "SD-1.5"), (4, "Diffusion-DPO (reproduced)")):
        tidy = paper.build(runs, number).tidy
        assert gone not in set(tidy["row"]) and tidy["value"].dropna().between(0, 100).all()
    assert paper.build(runs, 4).tidy.query("row == 'SPIN-Diffusion-Iter3' and metric == 'average'")[
        "published"
    ].tolist() == [70.2]


def test_prompt_sets_that_take_a_place_are_named(runs: Runs, tmp_path: Path) -> None:
    assert paper.available(runs) == [1, 2, 3, 4, 7, 8]
    assert "prompt set parts (in the place of PartiPrompts)" in paper.build(runs, 8).title
    with pytest.raises(UsageError, match="takes the place of HPSv2; there is test, parts"):
        paper.build(runs, 9)
    sets = ("hpsv2", "pickapic_test")
    real = load_runs([fake_runs.write_run(tmp_path, "sft", prompt_sets=sets, guidance=(7.5,))])
    assert paper.available(real) == [1, 2, 3, 9, 10]
    assert "place" not in paper.build(real, 9).title


def test_notes_say_what_may_not_be_compared(runs: Runs, tmp_path: Path) -> None:
    notes = " ".join(paper.build(runs, 1).notes)
    assert "base model mini, not SD-1.5" in notes and "other prompts (test)" in notes
    assert "guidance 7.5, not" not in notes and "best of 5, seed 5775709, guidance 7.5" in notes
    assert "could be verified" in " ".join(paper.build(runs, 2).notes)
    fake_runs.write_run(tmp_path, "sft")
    notes = " ".join(paper.build(load_runs(None, tmp_path), 1).notes)
    assert "Not measured: HPS, ImageReward; Average is that of Aesthetic and PickScore alone" in notes
    assert "one of 1, not best of 5" in notes


def test_a_cell_whose_row_was_inferred_is_not_called_verbatim() -> None:
    cells = pd.read_csv(FILE, keep_default_na=False, dtype=str)
    assert set(cells["kind"]) <= {"verbatim", "verbatim (second hand)", "derived"}
    inferred = cells[cells["source"].str.contains("not named|inferred")]
    assert len(inferred) and set(inferred["kind"]) == {"derived"}


@pytest.mark.parametrize("format", tables.FORMATS)
def test_every_format_marks_and_explains(runs: Runs, format: str) -> None:
    shown = paper.render(paper.build(runs, 3), format)
    assert "91.6" in shown and "SPIN-Diffusion-Iter3" in shown
    if format == "json":
        assert {"title", "notes", "rows"} == set(json.loads(shown))
    if format in ("text", "md", "latex"):
        assert "Table 3 of the paper" in shown and "best of 5" in shown and "ties half" in shown


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex (Debian: texlive-latex-base) is not installed")
def test_latex_compiles(runs: Runs, tmp_path: Path) -> None:
    tidy = tables.table(runs, "mean", "base").replace({"model": {"SFT": "a_b & 5% {x} <|> ~^\\ 模型 🎨"}})
    body = [paper.render(paper.build(runs, n), "latex") for n in paper.available(runs)]
    body.append(tables.render(tidy, "latex"))
    document = ["\\documentclass{article}", "\\begin{document}", *body, "\\end{document}", ""]
    (tmp_path / "tables.tex").write_text("\n".join(document), encoding="utf-8")
    made = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "tables.log").read_text(errors="replace")


def test_wrong_requests_are_told_in_one_line(runs: Runs) -> None:
    wrong = {(5,): "there are 1, 2, 3", (1, 3.0): "sampled at 1, 7.5, not 3", (1, None, "bset"): "mean"}
    for options, said in wrong.items():
        with pytest.raises(UsageError, match=said):
            paper.build(runs, *options)


def test_one_score_has_no_average(tmp_path: Path) -> None:
    metrics = {"pickscore": fake_runs.METRICS["pickscore"]}
    fake_runs.write_run(tmp_path, "sft", metrics=metrics, image_seeds=SEEDS)
    built = paper.build(load_runs(None, tmp_path), 1)
    assert built.tidy.query("metric == 'average'")["value"].isna().all()
    assert "so there is no Average" in " ".join(built.notes)
    assert "with the highest PickScore" in " ".join(built.notes)
