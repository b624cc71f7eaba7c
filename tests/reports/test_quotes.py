"""Measured numbers in prose are those of results/measured/, to the last digit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.reports import quotes

COMPARISON = """model,prompt_set,guidance,metric,value,low,high,n_prompts,n_seeds,stat,against,protocol
base,test,1,judge/utility,0.67,0.66,0.68,500,1,mean,,one
SFT,test,1,judge/utility,0.7604,0.75,0.77,500,8,mean,,one
SFT,test,1,judge/utility,0.0904,0.0791,0.1016,500,8,mean,base,one
SPIN-1,test,1,judge/utility,-0.02,-0.04,-0.001,500,8,mean,base,one
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mini_comparison.csv").write_text(COMPARISON)
    return tmp_path


def test_every_text_is_what_the_files_say() -> None:
    for path, text in quotes.texts().items():
        assert path.read_text("utf-8") == text, f"{path.name}: run `make quotes`"


def test_a_text_follows_the_file(folder: Path) -> None:
    template = folder / "text.j2"
    asked = ("value('base')", "difference('SFT')", "clear('SFT')", "clear('SPIN-1')", "best(1)", "seeds()")
    template.write_text(", ".join(f"{{{{ q.{question} }}}}" for question in asked))
    assert quotes.render(template, folder) == "0.670, +0.090 [0.079, 0.102], 1, -1, SFT, 8"
    changed = COMPARISON.replace("0.0904", "0.0914")
    (folder / "mini_comparison.csv").write_text(changed)
    assert "+0.091" in quotes.render(template, folder)


def test_a_question_without_one_answer_is_refused(folder: Path) -> None:
    said = (
        "mini_comparison.csv has 0 rows with stat 'mean', metric 'judge/utility', model 'DPO', against 'base', "
        "guidance 1;"
    )
    with pytest.raises(BenchError, match=said):
        quotes.Quotes(folder).row("DPO", "base")


def test_readme_types_no_measured_number() -> None:
    """Outside the block that is written, README has no number with two decimals or with a percent sign but 95 %."""
    text = (quotes.ROOT / "README.md").read_text("utf-8")
    outside = text[: text.index(quotes.BEGIN)] + text[text.index(quotes.END) :]
    known = {"95 %", "2311.12908", "2402.10210", "3.10"}  # papers, Python
    assert set(re.findall(r"\d+\.\d\d+|\d+ %", outside)) <= known
