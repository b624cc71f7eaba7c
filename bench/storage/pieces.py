"""Stages made piece by piece: divided among the processes, kept when killed, and equal however they were made.

A piece is a whole batch, or several. Which rows share a batch can change the last bits of a result, so batches are
laid out first and then handed out whole: the same batches, and so the same numbers, for any number of processes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.runtime.processes import Processes
from bench.runtime.progress import track
from bench.storage import integrity
from bench.storage.integrity import new_array, read_array
from bench.storage.meter import metered, write_spent
from bench.storage.stages import Stage, atomic_write, temporary

FOLDER = "pieces"
Make = Callable[[int, Path], Sequence[Path]]
"""Makes piece n in a folder, and returns the files it wrote there."""


def divided(
    stage: Stage,
    processes: Processes,
    name: str,
    pieces: Sequence[Sized],
    prepare: Callable[[], Make],
    join: Callable[[Path], None] = lambda folder: None,
    description: str = "",
    **counts: int,
) -> None:
    """Make a stage that is not done yet out of `pieces`, each a number of images.

    `prepare` loads what is needed and returns a function that makes piece n in the stage's folder, its files whole
    (`atomic_write`); those of the piece alone go under `path(folder, n, suffix)`. When all are there, `join` makes
    of them what stays. A killed process loses the piece it was at; the next launch goes on from there, with any
    number of processes, and makes a piece again whose files are not what was written. Of two runs that need the same
    stage at the same time, the second waits for the first, and takes over should that one be killed.
    """
    if processes.once(lambda: not stage.whole):
        with stage.held() if processes.main else nullcontext():
            if processes.once(lambda: not stage.ready()):  # unless it was made while this run waited
                _divided(stage, processes, name, pieces, prepare, join, description, **counts)
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
    **counts: int,
) -> None:
    """Make what is missing of a stage, all processes of one launch together, and put it in place."""
    folder = stage.unfinished([len(piece) for piece in pieces])
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


def join_arrays(folder: Path, file: str, shape: Sequence[int], places: Sequence[Sequence[int]]) -> None:
    """Put the arrays of all pieces, piece n at the rows `places[n]`, into one fp32 .npy file that appears whole.

    They go to a file of this process's own first: opened where another one has published it, it would be emptied.
    """
    unfinished = temporary(folder / file)
    joined = new_array(unfinished, np.float32, shape)
    for number, rows in enumerate(places):
        joined[rows] = read_array(path(folder, number, ".npy"))
    joined.flush()
    os.replace(unfinished, folder / file)


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
            integrity.listed(marker)
            there[number] = float(marker["seconds"])
    return there


def _whole(folder: Path, count: int) -> dict[int, float]:
    """The same, of those whose files are what was written; others are named, and count as missing."""
    there = finished(folder, count)
    for number in list(there):
        if found := integrity.damage(folder, integrity.listed(_marker(folder, number))):
            integrity.say(found, "made again")
            path(folder, number, ".json").unlink()
            del there[number]
    return there


def _marker(folder: Path, number: int) -> dict[str, Any]:
    return json.loads(path(folder, number, ".json").read_text())


def batches(count: int, size: int) -> list[range]:
    """Rows 0..count-1 in whole batches; the last one may be smaller."""
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
            files = integrity.entries(folder, make(number, folder))
            seconds = (time.perf_counter() - began) / processes.count
            atomic_write(marker, json.dumps({"seconds": seconds, "files": files}))
            bar.update(len(pieces[number]))


@contextmanager
def _unless_done(stage: Stage) -> Iterator[None]:
    """What is missing may be so because another run has finished the stage, and taken the folder with it."""
    try:
        yield
    except FileNotFoundError:
        if not stage.done:
            raise
