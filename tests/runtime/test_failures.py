"""When the machine gives out or says stop: one line with cause and remedy, and the exit status of what happened."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import shared
from bench.commands import cli
from bench.runtime.failures import explained
from bench.storage import integrity, runs

FULL = "the disk is full"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "results/x"), "the disk is full (results/x): make room"),
        (OSError(errno.ENOSPC, "Error writing bytes to file"), FULL),  # pyarrow's
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), FULL),  # torch.save's
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL),  # safetensors'
        (PermissionError(errno.EACCES, "Permission denied", "results/y"), "results/y cannot be written or read"),
        (OSError(errno.EROFS, "Read-only file system", "results"), "results cannot be written or read"),
        (OSError(errno.EIO, "Input/output error", "results/z"), "results/z cannot be written or read"),
        (MemoryError("Unable to allocate 8.00 PiB"), "out of memory: take a smaller train.micro_batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: take a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), "out of memory"),
    ],
)
def test_what_gave_out_is_named_with_a_remedy(error, said, monkeypatch, capsys):
    assert explained(error).startswith(said)

    def fails(name):
        raise error

    monkeypatch.setattr(runs, "load", fails)
    with pytest.raises(SystemExit, match="^1$"):
        cli.main(["run", "--resume", "x"])
    assert capsys.readouterr().err.startswith(f"bench: {said}")


def test_other_errors_are_left_as_they_are():
    assert explained(ValueError("no such thing")) is None and explained(FileNotFoundError(2, "x", "y")) is None


def test_an_array_takes_its_room_before_it_is_filled(tmp_path, monkeypatch):
    """A sparse file on a full disk ends the process with SIGBUS at the first page that has no room."""
    array = integrity.new_array(tmp_path / "a.npy", np.float32, (1000, 1000))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        integrity.new_array(tmp_path / "b.npy", np.float32, (10, 10))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (
            signal.SIGTERM,
            "bench: stopped by SIGTERM (from the batch system, or from the launcher because another process ",
        ),
        (signal.SIGINT, "bench: interrupted before a run was started"),
    ],
)
def test_a_signal_before_the_run_begins_is_said(tmp_path, monkeypatch, sent, said):
    """While models are loaded and data encoded, which may take hours."""
    monkeypatch.chdir(tmp_path)
    process = os.fork()
    if not process:
        sys.stderr = open("said", "w")  # noqa: SIM115, the process ends with it

        def encode(*arguments):
            Path("encoding").touch()
            time.sleep(60)

        shared.Shared.__init__ = encode
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            cli.main(["run", "--method", "sft"])
        except SystemExit as exit_:
            os._exit(exit_.code)
        os._exit(99)
    while not Path("encoding").exists():
        time.sleep(0.01)
    os.kill(process, sent)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    text = Path("said").read_text()
    assert text.startswith(said) and text.endswith("what was encoded is kept, to go on: the same command\n")
