"""sacred's record of a run: what it does when it cannot be written."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from bench.storage import tracking
from bench.storage.stages import atomic_write

CONFIG = {"seed": 0}


def fail_at(monkeypatch, name: str, number: int = 1) -> None:
    """Let putting a file in place fail, from the `number`-th time on."""
    replace, left = os.replace, [number]

    def failing(source, target):
        left[0] -= Path(target).name == name
        if Path(target).name == name and left[0] <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)


@pytest.mark.parametrize(("name", "number"), [("run.json", 2), ("cout.txt", 1), ("metrics.json", 1)])
def test_a_record_that_cannot_be_written_fails_the_run(tmp_path, monkeypatch, name, number):
    """sacred goes on without an observer that failed, and the run ended well, RUNNING for ever."""
    fail_at(monkeypatch, name, number)
    with pytest.raises(OSError, match=f"{tmp_path}/{name}"):
        tracking.record(tmp_path, CONFIG, lambda log: log("loss", 1.0, 1))


def test_a_failure_while_recording_a_failure_shows_no_stack_trace(tmp_path, monkeypatch, capfd):
    fail_at(monkeypatch, "run.json", 2)
    monkeypatch.setattr(logging.getLogger("bench.sacred"), "handlers", [])  # its handler keeps the stderr of before

    def body(log: tracking.LogScalar) -> None:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        tracking.record(tmp_path, CONFIG, body)
    said = capfd.readouterr().err
    assert "Input/output error" in said and "Traceback" not in said
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "RUNNING"


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """Of opening the system says which file failed, of syncing it does not."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"{tmp_path}/a.json"):
        atomic_write(tmp_path / "a.json", "{}")
