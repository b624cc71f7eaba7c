"""Work that is either finished or not there: folders that appear whole, with a marker of what made them."""

from __future__ import annotations

import filecmp
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.storage import integrity, locks
from bench.storage.integrity import Damage

if TYPE_CHECKING:
    import pandas as pd

MARKER = "stage.json"
_checked: dict[Path, integrity.Seen] = {}  # folders whose every byte this process has written or looked at


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
    try:
        with open(unfinished, "wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # unlike opening, writing does not say where it failed
        raise


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_tree(source: Path, target: Path, names: Sequence[str]) -> None:
    """Put files of one folder into another without copying them where the file system allows it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (target / name).exists():
            if filecmp.cmp(source / name, target / name, shallow=False):
                continue
            (target / name).unlink()  # the source was made again since
        link(source / name, target / name)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a parquet file that appears whole."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    atomic_write(path, buffer.getvalue())


class Stage:
    """One step of a run, kept in a folder of its own.

    The step counts as done when the folder holds a marker whose hash equals that of `inputs`: everything that
    decides the result (settings, and the fingerprints of earlier stages). A changed setting therefore never
    reuses a stale result, and a killed step leaves nothing that looks like one. The marker also holds size and hash
    of every file, so that what was changed, swapped or cut since is not used. (Markers of older versions hold none:
    such a stage is used unverified.)
    """

    def __init__(self, directory: Path, inputs: dict[str, Any]):
        self.directory = Path(directory)
        self.inputs = inputs
        self.hash = fingerprint(inputs)

    @property
    def done(self) -> bool:
        """Whether the marker is there and every file in its size; cheap, and changes nothing."""
        marker = self._marker()
        return marker is not None and integrity.missing(self.directory, integrity.listed(marker)) is None

    @property
    def whole(self) -> bool:
        """Whether the result may be used: done, and byte for byte what was written. What this process wrote itself
        or has looked at is looked at again only when the file system says that it changed."""
        return self.done and not self.damage()

    def ready(self) -> bool:
        """`whole`, for whoever makes the stage otherwise, and has the right to: a damaged result is named and set
        aside (`<name>.damaged-N`)."""
        if found := self.damage():
            self._set_aside(found)
        return self.done

    def make(self, fill: Callable[[Path], None]) -> None:
        """Let `fill` fill an empty folder, unless the result is there. One process at a time: others wait, and take
        over should that one be killed."""
        if self.whole:
            return
        with self.held():
            if not self.ready():
                with self.fresh() as folder:
                    fill(folder)

    def damage(self) -> list[Damage]:
        """Every file of a result of these inputs that is not what was written."""
        try:
            marker = self._read_marker()
        except OSError:
            return []
        except ValueError:
            return [Damage(self.directory / MARKER, "is no marker that can be read")]
        files = integrity.listed(marker or {})
        if (lost := integrity.missing(self.directory, files)) is not None:
            return [lost]
        seen = integrity.seen(self.directory, files)
        found = [] if seen == _checked.get(self.directory.absolute()) else integrity.damage(self.directory, files)
        if not found:
            _checked[self.directory.absolute()] = seen
        return found

    def held(self) -> AbstractContextManager[None]:
        """The right to make this stage; waits for a process that has it."""
        return locks.held(self.directory.with_name(f".{self.directory.name}.lock"), str(self.directory), wait=True)

    def _marker(self) -> dict[str, Any] | None:
        """The marker, if it is one of these inputs."""
        try:
            return self._read_marker()
        except (OSError, ValueError):
            return None

    def _read_marker(self) -> dict[str, Any] | None:
        """The same; raises OSError where there is none, ValueError where it cannot be read."""
        marker = json.loads((self.directory / MARKER).read_text())
        integrity.listed(marker)
        return marker if marker.get("hash") == self.hash else None

    def _set_aside(self, found: list[Damage]) -> None:
        aside = integrity.set_aside(self.directory)
        integrity.say(found, f"set aside as {aside}, and made again (`bench verify` names what was made from it)")

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

    def finish(self, folder: Path, leave_out: str = "") -> None:
        """Put the marker into a filled folder and make it `directory`; its subfolder `leave_out` is no result."""
        files = integrity.manifest(
            folder, lambda name: name == MARKER or bool(leave_out) and name.startswith(f"{leave_out}/")
        )
        marker = {"hash": self.hash, "inputs": self.inputs, "files": files}
        atomic_write(folder / MARKER, json.dumps(marker, indent=1, default=str))
        if self.ready():  # another run has made the same thing in the meantime, and may be reading it
            shutil.rmtree(folder)
            return
        shutil.rmtree(self.directory, ignore_errors=True)
        os.replace(folder, self.directory)
        _checked[self.directory.absolute()] = integrity.seen(self.directory, files)
