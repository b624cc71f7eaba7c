"""An array on disk that several processes fill in place, each its own rows."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bench.storage.integrity import Damage, new_array
from bench.storage.stages import temporary


class Written(NamedTuple):
    """Written that were written, and the sha256 of what they hold, in the order of `rows`."""

    file: Path
    rows: list[int]
    digest: str


def begin(file: Path, shape: Sequence[int]) -> bool:
    """An fp32 .npy file of zeros for `place` to fill, unless there is one; whether there was none.

    Of two launches on a file system without locks the second takes what the first has begun: a link, unlike a rename,
    replaces nothing.
    """
    if _fits(file, shape):
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    unfinished = temporary(file)
    new_array(unfinished, np.float32, shape).flush()
    try:
        os.link(unfinished, file)
    except FileExistsError:
        pass
    except OSError:  # no such thing as links here; then locks keep a second launch out
        os.replace(unfinished, file)
    unfinished.unlink(missing_ok=True)
    return True


def place(file: Path, rows: Sequence[int], values: np.ndarray) -> Written:
    """Write `values` [len(rows), ...] at the rows of an array that was begun; they are on disk when it returns.

    By position and not through a memory map: rows of two hosts may share a page, and each would write the page as it
    has it.
    """
    with open(file, "r+b") as handle:
        shape, dtype = _header(handle)
        if values.shape != (len(rows), *shape[1:]) or values.dtype != dtype:
            raise ValueError(f"{values.dtype} {values.shape} for {len(rows)} rows of {dtype} {shape}")
        contents = [value.tobytes() for value in values]
        for place, content in zip(_places(handle, rows, shape, dtype), contents, strict=True):
            handle.seek(place)
            handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    return Written(file, list(rows), hashlib.sha256(b"".join(contents)).hexdigest())


def damage(written: Written) -> list[Damage]:
    """What is wrong with rows that were written, nothing where they hold what they held."""
    digest = hashlib.sha256()
    try:
        with open(written.file, "rb") as handle:
            shape, dtype = _header(handle)
            for place in list(_places(handle, written.rows, shape, dtype)):
                handle.seek(place)
                digest.update(handle.read(_size(shape, dtype)))
    except (OSError, ValueError) as error:
        return [Damage(written.file, f"cannot be read ({error})")]
    if digest.hexdigest() == written.digest:
        return []
    return [Damage(written.file, f"does not hold in row {written.rows[0]} and others what was written")]


def _fits(file: Path, shape: Sequence[int]) -> bool:
    with suppress(OSError, ValueError), open(file, "rb") as handle:
        found, dtype = _header(handle)
        return found == tuple(shape) and file.stat().st_size == handle.tell() + shape[0] * _size(found, dtype)
    return False


def _header(handle: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype; leaves the handle at the first row."""
    np.lib.format.read_magic(handle)
    shape, _, dtype = np.lib.format.read_array_header_1_0(handle)
    return shape, dtype


def _size(shape: Sequence[int], dtype: np.dtype) -> int:
    """Bytes of one row."""
    return dtype.itemsize * math.prod(shape[1:])


def _places(handle: BinaryIO, rows: Sequence[int], shape: Sequence[int], dtype: np.dtype) -> Iterator[int]:
    """Where rows begin in a file of which the header was just read."""
    start = handle.tell()
    return (start + row * _size(shape, dtype) for row in rows)
