"""One process at a time: the second says who holds a run, waits for a stage, takes over from a killed one."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from bench.errors import BenchError
from bench.runtime.processes import Processes
from bench.storage import arrays, locks, pieces
from bench.storage.stages import Stage

BATCHES = pieces.batches(8, 1)


def child(body, *arguments) -> int:
    """Run `body` in a process of its own, whose errors go to this one's stderr; its id."""
    process = os.fork()
    if process:
        return process
    try:
        body(*arguments)
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hold(lock: Path, until: Path) -> None:
    with locks.held(lock, "run x", wait=False):
        lock.with_name("held").touch()
        wait_for(until)


def test_the_second_process_says_who_holds_a_run_since_when_and_leaves(tmp_path):
    lock, until = tmp_path / ".lock", tmp_path / "until"
    first = child(hold, lock, until)
    wait_for(tmp_path / "held")
    said = rf"run x is in the hands of process {first}@\S+ since \d{{4}}-\d\d-\d\d .*--wait"
    with pytest.raises(BenchError, match=said), locks.held(lock, "run x", wait=False):
        pass
    until.touch()
    assert status(first) == 0
    with locks.held(lock, "run x", wait=False):
        pass
    assert not lock.exists()


def test_waiting_is_said_and_ends_with_the_holder(tmp_path, capsys):
    lock, until = tmp_path / ".lock", tmp_path / "until"
    first = child(hold, lock, until)
    wait_for(tmp_path / "held")
    second = child(lambda: (time.sleep(0.3), until.touch()))
    with locks.held(lock, "run x", wait=True):
        assert until.exists()
    assert f"bench: waiting for process {first}@" in capsys.readouterr().err
    assert status(first) == status(second) == 0


def test_a_killed_process_holds_nothing(tmp_path, capsys):
    lock = tmp_path / ".lock"
    first = child(hold, lock, tmp_path / "never")
    wait_for(tmp_path / "held")
    os.kill(first, signal.SIGKILL)
    assert status(first) == -signal.SIGKILL and lock.exists()
    with locks.held(lock, "run x", wait=False):
        pass
    assert capsys.readouterr().err == ""


def test_a_record_of_another_host_under_a_free_lock_is_told(tmp_path, capsys):
    """Killed there, or at work behind a file system that does not pass locks on: nobody can tell from here."""
    lock = tmp_path / ".lock"
    lock.write_text("12@elsewhere since 2026-01-01 00:00:00")
    with locks.held(lock, "run x", wait=False):
        pass
    assert "run x was in the hands of process 12@elsewhere" in capsys.readouterr().err


def test_a_file_system_without_locks_is_told_and_work_goes_on(tmp_path, capsys, monkeypatch):
    def refuse(self, **options):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with locks.held(tmp_path / ".lock", "run x", wait=False):
        pass
    assert "keeps no locks" in capsys.readouterr().err


def make(stage: Stage, processes: Processes) -> None:
    """A stage of eight rows, of ones; the array is open, and empty, for a while before it can be filled."""

    def draw(number: int, folder: Path) -> list[arrays.Written]:
        return [arrays.place(folder / "all.npy", BATCHES[number], np.ones((1, 3), np.float32))]

    pieces.divided(
        stage,
        processes,
        "test",
        BATCHES,
        lambda: draw,
        begin=lambda folder: pieces.begin_array(folder, "all.npy", (8, 3)),
    )


@pytest.fixture
def slow_array(monkeypatch):
    opened = np.lib.format.open_memmap

    def slowly(*arguments, **options):
        array = opened(*arguments, **options)
        time.sleep(0.05)
        return array

    monkeypatch.setattr(np.lib.format, "open_memmap", slowly)


@pytest.mark.parametrize("locked", [True, False])
def test_pairs_of_processes_that_make_one_stage_leave_it_whole(tmp_path, accelerator, monkeypatch, slow_array, locked):
    """Without locks, as some file systems are, what one publishes the other may find changed, and set aside with a
    message; it is never half of something."""
    if not locked:
        monkeypatch.setattr(Stage, "held", lambda self: nullcontext())
    for number in range(10):
        stage = Stage(tmp_path / f"stage{number}", {})
        pair = [child(make, stage, Processes(accelerator)) for _ in range(2)]
        codes = [status(process) for process in pair]
        if locked or stage.whole:
            np.testing.assert_array_equal(np.load(stage.directory / "all.npy"), np.ones((8, 3)))
        if locked:
            assert codes == [0, 0] and stage.whole
            assert [path.name for path in tmp_path.rglob(".*")] == []


def test_the_second_takes_over_from_a_killed_one_and_keeps_its_pieces(tmp_path, accelerator):
    stage, made = Stage(tmp_path / "stage", {}), []

    def draw(number: int, folder: Path, deadly: bool) -> list[Path]:
        made.append(number)
        pieces.write_array(pieces.path(folder, number, ".npy"), np.ones((1, 3), np.float32))
        if deadly and number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return [pieces.path(folder, number, ".npy")]

    def work(deadly: bool) -> None:
        def make(number: int, folder: Path) -> list[Path]:
            return draw(number, folder, deadly)

        pieces.divided(stage, Processes(accelerator), "test", BATCHES, lambda: make)

    assert status(child(work, True)) == -signal.SIGKILL
    work(False)
    assert made == [5, 6, 7] and stage.whole
