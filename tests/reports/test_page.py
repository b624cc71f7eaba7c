"""The page: self-contained, honest about who won, and safe from its prompts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import fake_runs
import pandas as pd
import pytest

from bench.errors import BenchError
from bench.reports import page, plots
from bench.reports.load import load_runs
from bench.storage.runs import BASE, Result

VOID = {"meta", "img", "br", "input", "link", "hr"}


class Reader(HTMLParser):
    """Collects what tests ask about, and insists on tags that close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.scripts = 0
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    runs = load_runs(None, fake_runs.write_all(folder / "runs", count=40, images=12, guidance=(3.0,)))
    runs.problems.append("somewhere: <b>left out</b>")
    return page.write(runs, folder / "out" / "report.html").read_text(encoding="utf-8")


def test_it_is_one_file_that_asks_for_nothing(text: str) -> None:
    reader = read(text)
    assert all(a.startswith(("data:image/", "#")) for a in reader.addresses)
    without_prompts = text.replace("https://evil.example", "")
    assert "http://" not in without_prompts and "https://" not in without_prompts
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(reader.ids) == len(set(reader.ids))
    assert all(a[1:] in reader.ids for a in reader.addresses if a.startswith("#"))


def test_hostile_prompts_are_text(text: str) -> None:
    """All five hostile prompts are among the pictures, and nothing of them is markup."""
    reader = read(text)
    everything = "".join(reader.texts)
    for prompt in fake_runs.HOSTILE:
        assert prompt.strip() in everything
    assert reader.scripts == 1 and reader.handlers == []
    assert "<script>fetch" not in text and "<img src=x" not in text
    assert 'dir="auto"' in text


def test_problems_are_shown_and_escaped(text: str) -> None:
    assert "&lt;b&gt;left out&lt;/b&gt;" in text


def test_first_screen_answers_the_four_questions(text: str) -> None:
    words = " ".join("".join(read(text[: text.index("<main>")] + "</body></html>").texts).split())
    for answer in (
        "What was compared",
        "of SPIN-3",
        "higher than base",
        "pairs of models told apart",
        "One training seed",
        "How sure",
        "At what cost",
        "SPIN-3",
        "40 prompts of test",
        "against base",
        "pairs seen",
        "TFLOP",
    ):
        assert answer in words
    shown = text.index("<main>")
    assert shown < text.index("What is clear, in every setting") < text.index("Score per iteration")


def test_judge_and_metrics_are_apart(text: str) -> None:
    heads = [
        re.findall(r"<th scope=\"col\"[^>]*><button[^>]*>([^<]*)", table)
        for table in re.findall(r"<table>.*?</table>", text, re.S)
    ]
    heads = [head for head in heads if head]
    assert ["model", "PickScore", "Aesthetic", "CLIP", "Average", "Mean z-score"] in heads
    assert ["model", "utility", "alignment", "aesthetics", "fade ↓"] in heads
    assert "ground truth is exact for drawn images only" in text and "exact judge" not in text.casefold()


def test_pictures_are_sharp_and_complete(text: str) -> None:
    pictures = re.findall(r'<img src="data:image/webp;base64,[^"]+"[^>]*>', text)
    assert len(pictures) >= 12 * 6
    assert all('class="pixels"' in picture for picture in pictures)
    assert 'loading="lazy"' not in text  # printed, or saved as PDF, the page holds its pictures
    assert "image-rendering: pixelated" in text


def test_plots_take_the_pages_colour(text: str) -> None:
    assert plots.INK not in text.lower()
    assert text.count('<svg role="img" aria-label="') >= 10
    assert "currentColor" in text


def test_colours_are_distinct_and_stable() -> None:
    models = {
        "base": BASE,
        "SFT": Result("sft", 1, 9, 9),
        "Mine": Result("mine", 1, 9, 9),
        "SPIN-1": Result("spin", 1, 9, 9),
        "SPIN-2@5": Result("spin", 2, 14, 5, end=False),
        "SPIN-2": Result("spin", 2, 18, 9),
    }
    found = plots.colours(models)
    assert len(set(found.values())) == 6
    assert found["SPIN-2"] == plots.HUES["spin"]


def test_the_curve_per_iteration_has_their_ends_alone() -> None:
    models = {
        "base": BASE,
        "SFT@5": Result("sft", 1, 5, 5, end=False),
        "SFT@9": Result("sft", 1, 9, 9),
        "SPIN-1": Result("spin", 1, 9, 9),
        "SPIN-2@5": Result("spin", 2, 14, 5, end=False),
        "SPIN-2": Result("spin", 2, 18, 9),
    }
    rows = pd.DataFrame(
        [(model, value, value - 1, value + 1) for value, model in enumerate(models)],
        columns=["model", "value", "low", "high"],
    )
    drawn = read(plots.iterations(rows, models, plots.colours(models), "utility"))
    assert {"base", "1", "2"} <= {text.strip() for text in drawn.texts}
    spoken = plots.iterations(rows, models, plots.colours(models), "utility").partition("aria-label=")[2][:300]
    assert all(name in spoken for name in ("base", "SFT@9", "SPIN-1", "SPIN-2 ")) and "@5" not in spoken


@pytest.mark.parametrize("metrics", [["pickscore"], ["judge/utility"]])
def test_small_comparisons_have_a_page_too(tmp_path: Path, metrics: list[str]) -> None:
    """One method, one metric, no pictures, no history, no cost."""
    chosen = {name: fake_runs.METRICS[name] for name in metrics}
    folder = fake_runs.write_run(tmp_path, "sft", guidance=(1.0,), metrics=chosen)
    (folder / "history.parquet").unlink()
    (folder / "cost.json").unlink()
    shown = page.html(load_runs(None, tmp_path))
    read(shown)
    assert "SFT" in shown and "Not recorded" in shown


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    runs = load_runs([fake_runs.write_run(tmp_path, "sft", guidance=(1.0,))])
    with pytest.raises(BenchError, match="is a folder"):
        page.write(runs, tmp_path)


def test_a_page_keeps_to_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_runs.write_run(tmp_path / "runs", "sft", guidance=(3.0,), images=12)
    runs = load_runs([root])
    shown = page.context(runs)
    monkeypatch.setattr(page, "context", lambda runs: shown)
    whole = len(page.html(runs, 100).encode())
    small = page.html(runs, 0.8 * whole / 1e6)
    assert len(small.encode()) <= 0.8 * whole
    assert "to keep the page under" in small and "data:image/webp" in small
    assert f"{len(small.encode()) / 1e6:.1f} MB" in small
    with pytest.raises(BenchError, match="even without pictures, more than --max-mb 0.01"):
        page.write(runs, tmp_path / "report.html", 0.01)


def test_every_section_is_there(text: str) -> None:
    for heading in (
        "Failure signatures",
        "The paper's tables",
        "largest gain",
        "largest loss",
        "Win rate over base",
        "Win rate over Diffusion-DPO",
        "Metrics at a glance",
        "Do the metrics agree?",
        "prompt by prompt",
        "against pairs seen",
        "against seconds of compute",
        "needs more than one sampling seed",
        "6.25",
    ):
        assert heading in text.replace("&#39;", "'"), heading
    assert "@SIZE@" not in text
