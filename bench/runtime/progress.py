"""One look for progress: what is being done, how far, how fast, and when it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from bench.runtime import processes

T = TypeVar("T")
BARS = 2  # that move at the same time, one within the other; more jump about
LOG_EVERY = 600.0  # seconds between two lines of one stage where there is no terminal
LINE = "{desc}: {n_fmt}/{total_fmt} in {elapsed}, {rate_fmt}{postfix}"
_silent = False


@contextmanager
def quiet() -> Iterator[None]:
    """No progress within the block: for measurements, which drawing it would disturb."""
    global _silent
    outer, _silent = _silent, True
    try:
        yield
    finally:
        _silent = outer


def track(
    iterable: Iterable[T] | None = None,
    description: str = "",
    total: int | None = None,
    unit: str = "it",
    initial: int = 0,
) -> tqdm:
    """Wrap an iterable in a progress bar on stderr (with ETA); without one, the caller advances the bar.
    `initial` counts what an earlier, interrupted call had done.

    At most `BARS` move at a time. Where stderr is not a terminal a stage leaves one line, written when it ends, and
    what goes on inside it none. Of several processes only the main one draws.
    """
    terminal = sys.stderr.isatty()
    within = len(getattr(tqdm, "_instances", ()))  # the bars that are open; those that are disabled are not among them
    looks: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.2, "leave": not within}
    if not terminal:
        looks = {
            "bar_format": LINE,
            "smoothing": 0,
            "miniters": 1,
            **dict.fromkeys(("delay", "mininterval", "maxinterval"), LOG_EVERY),
        }
    return (tqdm if terminal else Line)(
        iterable,
        desc=description,
        total=total,
        unit=unit,
        initial=initial,
        disable=_silent or processes.index() > 0 or within >= (BARS if terminal else 1),
        **looks,
    )


class Line(tqdm):
    """What stands in a file instead of a bar: a line at the end, and one every `LOG_EVERY` seconds until then."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.fp.write(f"{self if msg is None else msg}\n")
        self.fp.flush()

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.delay = float("inf")  # nothing was drawn that would have to be wiped away
        super().close()
