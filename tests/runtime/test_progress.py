"""Progress: one line a stage in a file, at most two bars in a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from bench.runtime import progress
from bench.runtime.progress import track


class Screen(io.StringIO):
    """Stands for stderr."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def screen_of(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Screen:
    shown = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def nested() -> list[bool]:
    """A stage with a bar in a bar in it; which of the three are drawn."""
    found = []
    with track(description="outer", total=2, unit="image") as outer:
        for _ in range(2):
            with track(description="middle", total=1) as middle:
                for _ in track(range(3), "inner"):
                    found = [not bar.disable for bar in (outer, middle)]
                with track(description="inmost", total=1) as inmost:
                    found.append(not inmost.disable)
                middle.update()
            outer.update()
    return found


def test_a_file_gets_one_line_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch, False)
    assert nested() == [True, False, False]
    assert list(track(iter("abc"), "letters", total=4, unit="letter", initial=1)) == ["a", "b", "c"]
    first, second = screen.getvalue().splitlines()
    assert first.startswith("outer: 2/2 in 00:00, ") and first.endswith("image/s")
    assert second.startswith("letters: 4/4 in 00:00, ") and "\r" not in screen.getvalue()


def test_a_stage_cut_short_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch, False)
    with pytest.raises(ValueError, match="stopped"), track(description="sampling", total=9, unit="image") as bar:
        bar.update(4)
        raise ValueError("stopped")
    assert screen.getvalue().startswith("sampling: 4/9 in ")


def test_a_long_stage_is_heard_of_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch, False)
    with track(description="training", total=9, unit="step") as bar:
        clock = bar.start_t
        monkeypatch.setattr(bar, "_time", lambda: clock)
        for minute in range(9):
            clock = bar.start_t + 300.0 * minute
            bar.update()
            bar.set_postfix(loss=0.5, refresh=False)
    lines = screen.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/9", "5/9", "7/9", "9/9", "9/9"]
    assert progress.LOG_EVERY == 600


def test_a_terminal_shows_at_most_two_bars_and_keeps_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch, True)
    assert nested() == [True, True, False]
    assert "middle" in screen.getvalue() and "inmost" not in screen.getvalue()
    assert screen.getvalue().rstrip().splitlines()[-1].count("outer: 100%") == 1


def test_within_a_measurement_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = screen_of(monkeypatch, False)
    with progress.quiet():
        assert list(track(range(3), "steps")) == [0, 1, 2]
    assert screen.getvalue() == ""
