"""Work that is either finished or not there: folders that appear whole, with a marker of what made them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKER = "stage.json"


def fingerprint(value: Any) -> str:
    """A short hash of any JSON-like value; equal values give equal hashes on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def temporary(path: Path) -> Path:
    """A hidden name beside `path` for what is not finished; it says which process on which host writes there."""
    return path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.tmp")


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    with open(unfinished, "wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, path)


class Stage:
    """One step of a run, kept in a folder of its own.

    The step counts as done when the folder holds a marker whose hash equals that of `inputs`: everything that
    decides the result (settings, and the fingerprints of earlier stages). A changed setting therefore never
    reuses a stale result, and a killed step leaves nothing that looks like one.
    """

    def __init__(self, directory: Path, inputs: dict[str, Any]):
        self.directory = Path(directory)
        self.inputs = inputs
        self.hash = fingerprint(inputs)

    @property
    def done(self) -> bool:
        try:
            return json.loads((self.directory / MARKER).read_text())["hash"] == self.hash
        except (OSError, ValueError, KeyError):
            return False

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """Yield an empty folder to fill; on success it becomes `directory`, on any failure it is removed."""
        folder = temporary(self.directory)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
            self.finish(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def unfinished(self, layout: Any) -> Path:
        """Where work is kept that goes on after a kill; `layout` is how it is divided, which must stay the same."""
        return self.directory.with_name(f".{self.directory.name}.{fingerprint([self.hash, layout])}.part")

    def finish(self, folder: Path) -> None:
        """Put the marker into a filled folder and make it `directory`."""
        marker = {"hash": self.hash, "inputs": self.inputs}
        atomic_write(folder / MARKER, json.dumps(marker, indent=1, default=str))
        if self.done:  # another run has made the same thing in the meantime, and may be reading it
            shutil.rmtree(folder)
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        os.replace(folder, self.directory)
