"""One look for every progress bar: what is being done, how far, how fast, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from bench.runtime import processes

T = TypeVar("T")
_silent = False


@contextmanager
def quiet() -> Iterator[None]:
    """No bars within the block: for measurements, which drawing them would disturb."""
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

    Where stderr is not a terminal the bar is redrawn rarely, so that log files stay short. Of several processes
    only the main one draws.
    """
    bar = tqdm(
        iterable,
        desc=description,
        total=total,
        unit=unit,
        initial=initial,
        dynamic_ncols=True,
        mininterval=0.2,
        disable=_silent or processes.index() > 0,
    )
    if not bar.disable and not bar.fp.isatty():
        bar.mininterval = 10.0
    return bar
