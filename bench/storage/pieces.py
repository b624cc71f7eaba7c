"""Stages made piece by piece: divided among the processes, kept when killed, and equal however they were made.

A piece is a whole batch, or several. Which rows share a batch can change the last bits of a result, so batches are
laid out first and then handed out whole: the same batches, and so the same numbers, for any number of processes.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.runtime.processes import Processes
from bench.runtime.progress import track
from bench.storage import arrays, integrity
from bench.storage.arrays import Written
from bench.storage.meter import metered, write_spent
from bench.storage.stages import Stage, atomic_write

FOLDER = "pieces"
Make = Callable[[int, Path], Sequence[Path | Written]]
"""Makes piece n in a folder, and returns what it wrote there: files, and rows of arrays."""


def divided(
    stage: Stage,
    processes: Processes,
    name: str,
    pieces: Sequence[Sized],
    prepare: Callable[[], Make],
    join: Callable[[Path], None] = lambda folder: None,
    description: str = "",
    begin: Callable[[Path], None] = lambda folder: None,
    **counts: int,
) -> None:
    """Make a stage that is not done yet out of `pieces`, each a number of images.

    `prepare` loads what is needed and returns a function that makes piece n in the stage's folder: whole files
    (`atomic_write`) or rows of an array (`arrays.place`), and what is of the piece alone under
    `path(folder, n, suffix)`. `begin` is called with the folder before the first; `join` makes of all of them what
    stays. A killed process loses the piece it was at; the next launch goes on from there, with any number of processes,
    and makes a piece again that is not what was written. Of two runs that need the same stage at the same time, the
    second waits for the first, and takes over should that one be killed.
    """
    if processes.once(lambda: not stage.whole):
        with stage.held() if processes.main else nullcontext():
            if processes.once(lambda: not stage.ready()):  # unless it was made while this run waited
                _divided(stage, processes, name, pieces, prepare, join, description, begin, **counts)
    if processes.main:
        shutil.rmtree(stage.directory / FOLDER, ignore_errors=True)


def _divided(
    stage: Stage,
    processes: Processes,
    name: str,
    pieces: Sequence[Sized],
    prepare: Callable[[], Make],
    join: Callable[[Path], None],
    description: str,
    begin: Callable[[Path], None],
    **counts: int,
) -> None:
    """Make what is missing of a stage, all processes of one launch together, and put it in place."""
    folder = stage.unfinished([len(piece) for piece in pieces])
    processes.once(lambda: begin(folder))
    earlier = processes.once(lambda: _whole(folder, len(pieces)))
    missing = [number for number in range(len(pieces)) if number not in earlier]
    with metered() as spent:
        _make(stage, folder, processes, pieces, processes.share(missing), prepare, description)
        processes.wait()
    if processes.main:
        processes.expect(lambda: stage.done or len(finished(folder, len(pieces))) == len(pieces), folder)
        with _unless_done(stage):
            join(folder)
            write_spent(folder, name, spent, sum(earlier.values()), **counts)
            stage.finish(folder, leave_out=FOLDER)
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait()
    processes.expect(lambda: stage.done, stage.directory)


def path(folder: Path, number: int, suffix: str) -> Path:
    """Where a piece keeps what is not part of the finished stage."""
    return folder / FOLDER / f"{number:06d}{suffix}"


def begin_array(folder: Path, file: str, shape: Sequence[int]) -> None:
    """An fp32 array in a stage's folder for pieces to write their rows into; for `begin` of `divided`. Pieces that were
    made before it, in files of their own or in an array that is gone, are made again."""
    if arrays.begin(folder / file, shape):
        for marker in (folder / FOLDER).glob("*.json"):
            marker.unlink(missing_ok=True)


def write_array(file: Path, array: np.ndarray) -> None:
    """Write a .npy file that appears whole."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    atomic_write(file, buffer.getvalue())


def finished(folder: Path, count: int) -> dict[int, float]:
    """The pieces that are there, with the seconds by which each delayed the stage."""
    there = {}
    for number in range(count):
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged one is made again
            marker = _marker(folder, number)
            _named(folder, marker)
            there[number] = float(marker["seconds"])
    return there


def _whole(folder: Path, count: int) -> dict[int, float]:
    """The same, of those that are what was written; others are named, and count as missing."""
    there = finished(folder, count)
    for number in list(there):
        files, rows = _named(folder, _marker(folder, number))
        if found := integrity.damage(folder, files) + [one for part in rows for one in arrays.damage(part)]:
            integrity.say(found, "made again")
            path(folder, number, ".json").unlink()
            del there[number]
    return there


def _marker(folder: Path, number: int) -> dict[str, Any]:
    return json.loads(path(folder, number, ".json").read_text())


def _named(folder: Path, marker: dict[str, Any]) -> tuple[integrity.Files, list[Written]]:
    """The files and the rows of arrays that a marker names; ValueError where it is no marker."""
    files = integrity.listed(marker)
    return files, [Written(folder / name, list(rows), str(digest)) for name, rows, digest in marker.get("rows", [])]


def batches(count: int, size: int) -> list[range]:
    """Written 0..count-1 in whole batches; the last one may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _make(
    stage: Stage,
    folder: Path,
    processes: Processes,
    pieces: Sequence[Sized],
    own: Sequence[int],
    prepare: Callable[[], Make],
    description: str,
) -> None:
    """Make this process's pieces; a piece counts once its marker is there, which is written last."""
    if not own:
        return
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    make = prepare()
    if processes.count > 1:
        description = f"{description}, 1 of {processes.count} processes"
    total = sum(len(pieces[number]) for number in own)
    with track(description=description, total=total, unit="image") as bar, _unless_done(stage):
        for number in own:
            marker = path(folder, number, ".json")
            began = time.perf_counter()
            made = make(number, folder)
            rows = [one for one in made if isinstance(one, Written)]
            files = integrity.entries(folder, [one for one in made if not isinstance(one, Written)])
            seconds = (time.perf_counter() - began) / processes.count
            written = [[one.file.relative_to(folder).as_posix(), one.rows, one.digest] for one in rows]
            atomic_write(marker, json.dumps({"seconds": seconds, "files": files, "rows": written}))
            bar.update(len(pieces[number]))


@contextmanager
def _unless_done(stage: Stage) -> Iterator[None]:
    """What is missing may be so because another run has finished the stage, and taken the folder with it."""
    try:
        yield
    except FileNotFoundError:
        if not stage.done:
            raise
