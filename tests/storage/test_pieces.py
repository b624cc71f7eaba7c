"""Stages made in pieces: nothing is made twice, whoever makes it, and nothing half made is taken for whole."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from bench.runtime.processes import Processes
from bench.storage import arrays, pieces, runs
from bench.storage.stages import Stage, temporary

BATCHES = pieces.batches(10, 3)


@pytest.fixture
def processes(accelerator) -> Processes:
    return Processes(accelerator)


def work(stage: Stage, processes: Processes, stop: int | None = None) -> list[int]:
    """Make the stage, an array of row numbers, and return which pieces were made; it breaks down at `stop`."""
    made = []

    def prepare() -> pieces.Make:
        def make(number: int, folder: Path) -> list[Path]:
            pieces.write_array(pieces.path(folder, number, ".npy"), np.array(BATCHES[number]))
            if number == stop:
                raise RuntimeError
            made.append(number)
            return [pieces.path(folder, number, ".npy")]

        return make

    def join(folder: Path) -> None:
        np.save(
            folder / "all.npy",
            np.concatenate([np.load(pieces.path(folder, number, ".npy")) for number in range(len(BATCHES))]),
        )

    pieces.divided(stage, processes, "test", BATCHES, prepare, join, images=10)
    return made


def test_work_goes_on_where_it_stopped(tmp_path, processes):
    stage = Stage(tmp_path / "stage", {})
    with pytest.raises(RuntimeError):
        work(stage, processes, stop=2)
    assert not stage.done
    assert work(stage, processes) == [2, 3]
    assert np.load(stage.directory / "all.npy").tolist() == list(range(10))
    assert json.loads((stage.directory / "cost.json").read_text())["images"] == 10
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["all.npy", "cost.json", "stage", "stage.json"]
    assert work(stage, processes) == []


def test_pieces_of_other_inputs_or_of_another_layout_are_not_used(tmp_path, processes, monkeypatch):
    with pytest.raises(RuntimeError):
        work(Stage(tmp_path / "stage", {"lr": 1}), processes, stop=2)
    assert work(Stage(tmp_path / "stage", {"lr": 2}), processes) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError):
        work(Stage(tmp_path / "stage", {"lr": 3}), processes, stop=2)
    monkeypatch.setattr("test_pieces.BATCHES", pieces.batches(10, 5))
    assert work(Stage(tmp_path / "stage", {"lr": 3}), processes) == [0, 1]


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")]
)
def test_a_damaged_piece_is_named_and_made_again(tmp_path, processes, capsys, damage):
    stage = Stage(tmp_path / "stage", {})
    with pytest.raises(RuntimeError):
        work(stage, processes, stop=2)
    (piece,) = tmp_path.rglob("000001.npy")
    damage(piece)
    assert work(stage, processes) == [1, 2, 3]
    assert f"{piece} " in (said := capsys.readouterr().err) and "made again" in said
    assert np.load(stage.directory / "all.npy").tolist() == list(range(10))


@pytest.mark.parametrize("marker", ["", "[1]", "{}", '{"seconds": "soon"}', '{"seconds": 1, "files": 3}'])
def test_a_marker_that_says_nothing_is_none(tmp_path, processes, marker):
    stage = Stage(tmp_path / "stage", {})
    with pytest.raises(RuntimeError):
        work(stage, processes, stop=2)
    next(tmp_path.rglob("000001.json")).write_text(marker)
    assert work(stage, processes) == [1, 2, 3]


def test_a_run_that_is_late_takes_what_another_one_has_finished(tmp_path, processes, monkeypatch):
    """The other run finishes the stage, and takes the folder away, while this one is at its first piece; that takes a
    file system that keeps no locks."""
    monkeypatch.setattr(Stage, "held", lambda self: nullcontext())
    stage = Stage(tmp_path / "stage", {})

    def prepare() -> pieces.Make:
        work(stage, processes)
        return lambda number, folder: (folder / "late").write_text("")

    pieces.divided(stage, processes, "test", BATCHES, prepare)
    assert stage.done and np.load(stage.directory / "all.npy").tolist() == list(range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


SHAPE = (10, 2, 3)
PLACES = [[7, 0, 1], [2, 9], [3, 4, 5], [8, 6]]  # rows of a piece need not be side by side


def fill(stage: Stage, processes: Processes, stop: int | None = None, seen: list | None = None) -> list[int]:
    """As `work`, each piece into its rows of one array; it breaks down when the rows of `stop` are half written."""
    made = []

    def rows(number: int) -> np.ndarray:
        return np.stack([np.full(SHAPE[1:], row, np.float32) for row in PLACES[number]])

    def make(number: int, folder: Path) -> list[arrays.Written]:
        if number == stop:
            arrays.place(folder / "all.npy", PLACES[number][:1], rows(number)[:1] + 100)
            raise RuntimeError
        made.append(number)
        if seen is not None:
            seen.append(sorted(path.name for path in folder.rglob("*.np?")))
        return [arrays.place(folder / "all.npy", PLACES[number], rows(number))]

    def begin(folder: Path) -> None:
        pieces.begin_array(folder, "all.npy", SHAPE)

    pieces.divided(stage, processes, "test", PLACES, lambda: make, begin=begin, images=10)
    return made


EXPECTED = np.broadcast_to(np.arange(10, dtype=np.float32)[:, None, None], SHAPE)


def test_pieces_are_written_where_they_stay(tmp_path, processes):
    """Half written and begun again, in any order of rows; and there is never a second copy of any."""
    stage, seen = Stage(tmp_path / "stage", {}), []
    with pytest.raises(RuntimeError):
        fill(stage, processes, stop=2)
    assert not stage.done
    assert fill(stage, processes, seen=seen) == [2, 3] and seen == [["all.npy"]] * 2
    found = np.load(stage.directory / "all.npy")
    assert found.dtype == np.float32 and np.array_equal(found, EXPECTED)
    np.save(tmp_path / "plain.npy", np.ascontiguousarray(EXPECTED))
    assert (stage.directory / "all.npy").read_bytes() == (tmp_path / "plain.npy").read_bytes()
    assert not list(stage.directory.rglob(".*"))


@pytest.mark.parametrize(
    ("damage", "made"),
    [
        (lambda array: array.unlink(), [0, 1, 2, 3]),
        (lambda array: array.write_bytes(array.read_bytes()[:-1]), [0, 1, 2, 3]),
        (lambda array: array.write_bytes(b"x" + array.read_bytes()[1:]), [0, 1, 2, 3]),
        (lambda array: array.write_bytes(array.read_bytes().replace(b"\x00\x00\x10A", b"\x00\x00\x20A", 1)), [1, 2, 3]),
    ],
    ids=["gone", "cut", "header", "row 9"],
)
def test_rows_that_are_not_what_was_written_are_made_again(tmp_path, processes, damage, made):
    """Markers of a version that kept pieces in files of their own say nothing of this array either."""
    stage = Stage(tmp_path / "stage", {})
    with pytest.raises(RuntimeError):
        fill(stage, processes, stop=2)
    (array,) = tmp_path.rglob("all.npy")
    before = array.read_bytes()
    damage(array)
    assert not array.exists() or array.read_bytes() != before
    assert fill(stage, processes) == made
    assert np.array_equal(np.load(stage.directory / "all.npy"), EXPECTED)


def test_an_array_is_begun_once_and_takes_only_its_own_rows(tmp_path, monkeypatch):
    """Of two that find none, the second must not replace what the first may be filling; where there are no links, the
    lock is what sees to that."""
    file, link = tmp_path / "all.npy", os.link

    def late(source, target):
        """The other one comes first, and has written a row, when this one has its array."""
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", link)
            patch.setattr(arrays, "temporary", lambda path: tmp_path / "others")
            assert arrays.begin(file, SHAPE)
        arrays.place(file, [3], np.ones((1, 2, 3), np.float32))
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", late)
        arrays.begin(file, SHAPE)
    assert np.load(file)[3].sum() == 6 and list(tmp_path.iterdir()) == [file]
    assert not arrays.begin(file, SHAPE)
    for wrong in (np.ones((2, 2, 3), np.float32), np.ones((1, 2, 3)), np.ones((1, 3, 2), np.float32)):
        with pytest.raises(ValueError, match=r"for 1 rows of float32 \(10, 2, 3\)"):
            arrays.place(file, [3], wrong)
    with pytest.raises(FileNotFoundError):
        arrays.place(tmp_path / "none.npy", [0], np.ones((1, 2, 3), np.float32))

    def refuse(*paths):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    assert arrays.begin(tmp_path / "other.npy", SHAPE)
    assert np.load(tmp_path / "other.npy").shape == SHAPE


def test_every_process_has_its_share_of_whole_pieces(processes):
    shares = []
    for processes.index in range(3):
        processes.count = 3
        shares.append(list(processes.share(BATCHES)))
    assert sorted((piece for share in shares for piece in share), key=list) == BATCHES
    assert [len(share) for share in shares] == [2, 1, 1]


def test_leftovers_of_another_host_are_removed_when_they_are_old(tmp_path, monkeypatch):
    mine = temporary(tmp_path / "mine")
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        new, old = temporary(tmp_path / "new"), temporary(tmp_path / "old")
    for path in (mine, new, old):
        path.mkdir()
    os.utime(old, (time.time() - 2 * runs.FORGOTTEN,) * 2)
    runs.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, new])
