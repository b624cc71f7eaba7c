"""What a finished folder holds, file by file, and whether it still does."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.errors import BenchError, first_line

Files = dict[str, list]  # name relative to the folder -> [bytes, sha256]
DAMAGED = ".damaged-"  # between a name and a number: what was set aside because it is not what was written
Seen = tuple[tuple[str, int, int, int, int], ...]


class Damage(NamedTuple):
    """A file that is not what was written."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


def sha256(path: Path) -> str:
    """The hash of a file's content, 64 digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest(folder: Path, leave_out: Callable[[str], bool] = lambda name: False) -> Files:
    """Size and hash of every file below a folder, but for hidden ones and those whose names `leave_out` knows."""
    return entries(folder, [path for name, path in _files(folder) if not leave_out(name)])


def entries(folder: Path, paths: Iterable[Path]) -> Files:
    """Size and hash of some files below a folder."""
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in paths}


def listed(marker: Any) -> Files:
    """The files that a marker names: none where an older version wrote it. ValueError where it is no marker."""
    files = marker.get("files", {}) if isinstance(marker, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, list) and list(map(type, entry)) == [int, str] for entry in files.values()
    ):
        raise ValueError("no size and hash for every file")
    return files


def missing(folder: Path, files: Files) -> Damage | None:
    """The cheap check: the first file that is not there in its size."""
    for name, (size, _) in files.items():
        path = folder / name
        try:
            found = path.stat().st_size
        except OSError:
            return Damage(path, "is missing")
        if found != size:
            return Damage(path, f"holds {found} bytes, not {size}")
    return None


def damage(folder: Path, files: Files) -> list[Damage]:
    """The full check: every file that does not hold, byte for byte, what was written."""
    found = []
    for name, entry in files.items():
        problem = missing(folder, {name: entry})
        try:
            if problem is None and sha256(folder / name) != entry[1]:
                problem = Damage(folder / name, "does not hold what was written")
        except OSError as error:
            problem = Damage(folder / name, f"cannot be read ({error.strerror})")
        found += [problem] if problem else []
    return found


def set_aside(path: Path) -> str:
    """Rename a damaged file or folder to `<name>.damaged-N`; the new name. Nothing is done where nothing is left."""
    number = 1
    while (aside := path.with_name(f"{path.name}{DAMAGED}{number}")).exists():
        number += 1
    if path.exists():
        os.replace(path, aside)
    return aside.name


def say(found: Sequence[Damage], done: str) -> None:
    """Name what is damaged, and what was done about it, on stderr."""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    print(f"bench: {found[0]}{more}: {done}", file=sys.stderr, flush=True)


def seen(folder: Path, files: Files) -> Seen:
    """What the file system says of the files; as long as that stays, a check need not be made twice."""
    stats = ((name, (folder / name).stat()) for name in files)
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats)


@contextmanager
def expecting(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file of a finished folder is read: which file it was, and what to do about it.

    A file that is gone stays FileNotFoundError: another process may have finished the work, and taken it away.
    """
    try:
        yield
    except (BenchError, FileNotFoundError):
        raise
    except Exception as error:  # the libraries that read a format raise errors of many kinds
        raise BenchError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}): remove {path.parent}, and "
            "what was in it is made again"
        ) from error


def new_array(path: Path, dtype: np.dtype | type, shape: Sequence[int]) -> np.memmap:
    """An array in a new .npy file, to be filled; its room is taken at once, since a disk that is full later would end
    the process without a word (SIGBUS)."""
    array = np.lib.format.open_memmap(path, "w+", dtype, tuple(shape))
    with open(path, "r+b") as file, suppress(AttributeError):  # macOS has no posix_fallocate
        os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
    return array


def read_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """An array in a .npy file, as `np.load` reads it."""
    with expecting(path):
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, below, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield (inside / name).as_posix(), Path(place, name)
