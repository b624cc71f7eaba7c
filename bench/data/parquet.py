"""Parquet shards of a data set, in a folder or on the Hugging Face hub; read by column and row group."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bench.errors import BenchError, first_line
from bench.runtime.hub import is_hub_id, outlast
from bench.storage.stages import fingerprint

SPLITS = ("train", "validation", "test", "validation_unique", "test_unique")  # Pick-a-Pic's


class Shards:
    """The parquet files of one split, in order of their names.

    `source` is a folder, one parquet file, or a data set on the hub (OWNER/NAME, or OWNER/NAME@REVISION). On
    the hub only the bytes of the columns asked for travel, and nothing but them is kept.
    """

    def __init__(self, source: str, split: str):
        self.source, self.split = source, split
        path = Path(source).expanduser()
        self.on_hub = not path.exists() and is_hub_id(source)
        if path.exists():
            self.files: Any = fsspec.filesystem("file")
            found = {file.relative_to(path).as_posix(): str(file) for file in sorted(path.rglob("*.parquet"))}
            self.paths = [str(path)] if path.is_file() else _of_split(source, split, found)
        elif self.on_hub:
            self.files, found = _on_the_hub(source)
            self.paths = _of_split(source, split, found)
        else:
            raise BenchError(f"{source}: no such folder of parquet files (nor a hub data set, OWNER/NAME)")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, sizes and footers, which hold sizes and statistics of every column chunk."""
        return fingerprint([self._footer(path) for path in self.paths])

    def _footer(self, path: str) -> list[str | int]:
        """Name, size and hash of the footer; a hub path holds the commit, so there the path says it all."""
        if "@" in path and path.startswith("datasets/"):
            return [path]
        with self.files.open(path, "rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - 8))
            length = int.from_bytes(handle.read(4), "little")
            handle.seek(max(0, size - 8 - length))
            return [PurePosixPath(path).name, size, hashlib.sha256(handle.read(length)).hexdigest()]

    def name(self, shard: int) -> str:
        return PurePosixPath(self.paths[shard]).name

    def open(self, shard: int) -> pq.ParquetFile:
        with self.reading(shard):
            return pq.ParquetFile(self._handle(shard), pre_buffer=True)

    @contextmanager
    def reading(self, shard: int) -> Iterator[None]:
        """Whatever goes wrong while a shard is read: which one it was. A broken page shows only when it is decoded."""
        try:
            yield
        except (pa.ArrowException, ValueError, OSError) as error:
            raise BenchError(f"{self.source}: shard {self.name(shard)} cannot be read: {first_line(error)}") from error

    def _handle(self, shard: int) -> Any:
        path = self.paths[shard]
        return HubFile(self.files, path, self.name(shard)) if self.on_hub else self.files.open(path, "rb")

    def expect(self, columns: Sequence[str]) -> list[str]:
        """The columns of the first shard, among which these must be."""
        found = list(self.open(0).schema_arrow.names)
        missing = [name for name in columns if name not in found]
        if missing:
            raise BenchError(
                f"{self.source}: expected the columns {', '.join(columns)}, found no "
                f"{', '.join(missing)} in {self.name(0)}, which has {', '.join(found)}"
            )
        return found

    def column(self, name: str) -> list[Any]:
        """All values of one small column."""
        values: list[Any] = []
        for shard in range(len(self.paths)):
            file = self.open(shard)
            with self.reading(shard):
                values += file.read([name])[name].to_pylist()
        return values


class RowGroups:
    """Some columns of shards, a row group at a time; the last one is kept, since rows are read in order."""

    def __init__(self, shards: Shards, columns: Sequence[str]):
        self.shards, self.columns = shards, list(columns)
        self._file: tuple[int, pq.ParquetFile] | None = None
        self._group: tuple[tuple[int, int], pa.Table] | None = None

    def read(self, shard: int, group: int) -> pa.Table:
        if self._group is None or self._group[0] != (shard, group):
            self._group = None  # frees the last one before the next is read
            if self._file is None or self._file[0] != shard:
                self._file = shard, self.shards.open(shard)
            with self.shards.reading(shard):
                self._group = (shard, group), self._file[1].read_row_group(group, columns=self.columns)
        return self._group[1]


class HubFile(io.RawIOBase):
    """A file on the hub whose reads outlast an outage, each from where it was begun."""

    def __init__(self, files: Any, path: str, name: str):
        self.name = name
        self.handle = outlast(lambda: files.open(path, "rb"), name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.handle.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.handle.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        start = self.handle.tell()

        def once() -> bytes:
            self.handle.seek(start)
            return self.handle.read(size)

        return outlast(once, self.name)

    def close(self) -> None:
        self.handle.close()
        super().close()


def split_source(spec: str, default: str = "train") -> tuple[str, str]:
    """SOURCE or SOURCE#SPLIT."""
    source, _, split = spec.partition("#")
    return source, split or default


def _of_split(source: str, split: str, found: dict[str, str]) -> list[str]:
    """The files of one split: `train-00000-of-00645.parquet` or `train/0000.parquet`; all when none is named."""
    if not found:
        raise BenchError(f"{source}: expected parquet files, found none")
    splits = {name: _split_of(name) for name in found}
    if set(splits.values()) == {None}:
        return list(found.values())
    paths = [found[name] for name, belongs in splits.items() if belongs == split]
    if not paths:
        raise BenchError(
            f"{source}: no split '{split}'; it has {', '.join(sorted(filter(None, set(splits.values()))))}"
        )
    return paths


def _split_of(name: str) -> str | None:
    named = re.match(r"(.+)-\d+-of-\d+", PurePosixPath(name).name)
    folder = PurePosixPath(name).parent.name.removeprefix("partial-")
    return named[1] if named else folder if folder in SPLITS else None


@lru_cache(maxsize=8)
def _on_the_hub(source: str) -> tuple[Any, dict[str, str]]:
    """The hub as a file system, and name -> path of every parquet file at the revision's present commit."""
    from huggingface_hub import HfApi, HfFileSystem

    name, _, revision = source.partition("@")
    try:
        info = HfApi().dataset_info(name, revision=revision or None)
        names = sorted(file.rfilename for file in info.siblings if file.rfilename.endswith(".parquet"))
        return HfFileSystem(), {file: f"datasets/{name}@{info.sha}/{file}" for file in names}
    except Exception as error:  # the client raises errors of several libraries
        cause = first_line(error)
        raise BenchError(
            f"{source}: no such folder, and the hub failed: {cause} (a mirror is named the same way, "
            "OWNER/NAME; a folder of parquet shards works without the hub)"
        ) from error
