"""Arrays in shards: filled shard by shard, so that a killed run goes on; read memory-mapped, row by row."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bench.errors import BenchError
from bench.runtime.progress import track
from bench.storage.integrity import expecting, new_array, read_array
from bench.storage.stages import Stage, atomic_write, fingerprint

SHARD = 4096  # rows: 128 MB of SD-1.5 latents in fp16; a multiple of the usual batch sizes
Item, Result = TypeVar("Item"), TypeVar("Result")


class BrokenRows(Exception):
    """Some of the rows asked for cannot be read; `problems` says why, by row. The others can."""

    def __init__(self, problems: Mapping[int, str]):
        super().__init__(f"{len(problems)} broken row(s)")
        self.problems = dict(problems)


class Share(NamedTuple):
    """Which part of common work is this process's, and how it waits for the other ones."""

    process: int = 0
    processes: int = 1
    wait: Callable[[], object] = lambda: None


ALONE = Share()


class Rows:
    """Rows stored in shards; indexing copies those asked for into an array `[n, ...]`.

    `rows[positions]` takes a slice or integers `[n]`; further indices `[n]` choose along the next axes, as
    NumPy's do. `broken` holds, by stored row, why a row could not be made (its values are NaN).
    """

    def __init__(
        self, shards: Sequence[np.ndarray], broken: Mapping[int, str] | None = None, chosen: np.ndarray | None = None
    ):
        self.shards, self.broken = shards, dict(broken or {})
        self.chosen = np.arange(sum(map(len, shards))) if chosen is None else chosen
        self.shape = (len(self.chosen), *shards[0].shape[1:])
        self.ndim, self.dtype = len(self.shape), shards[0].dtype

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Any) -> np.ndarray:
        positions, *inner = key if isinstance(key, tuple) else (key,)
        stored = np.atleast_1d(self.chosen[positions])
        shard, row = np.divmod(stored, SHARD)
        out = np.empty((len(stored), *self.shape[1 + len(inner) :]), self.dtype)
        for number in np.unique(shard):
            here = np.flatnonzero(shard == number)
            out[here] = self.shards[number][(row[here], *(np.asarray(index)[here] for index in inner))]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def select(self, positions: np.ndarray) -> Rows:
        """The rows at these positions, still where they are stored."""
        return Rows(self.shards, self.broken, self.chosen[positions])


class Store:
    """A folder of shards, each a finished stage of its own; `made_from` names all that decides the content.

    `shape` is that of one row. The folder's name holds the hash of `made_from`, so that two suites share a
    cache without evicting each other.
    """

    def __init__(
        self, root: Path, kind: str, made_from: Mapping[str, Any], count: int, shape: Sequence[int], dtype: type | str
    ):
        self.inputs = {
            "kind": kind,
            "count": count,
            "shape": list(shape),
            "dtype": np.dtype(dtype).name,
            "shard": SHARD,
            **made_from,
        }
        self.folder = Path(root) / f"{kind}-{fingerprint(self.inputs)}"
        self.kind, self.count, self.shape, self.dtype = kind, count, tuple(shape), np.dtype(dtype)

    def stages(self) -> list[Stage]:
        return [
            Stage(self.folder / f"{start // SHARD:05d}", {**self.inputs, "first": start})
            for start in range(0, self.count, SHARD)
        ]

    def fill(
        self,
        fetch: Callable[[Sequence[int]], Item],
        make: Callable[[Item], np.ndarray],
        batch_size: int,
        description: str,
        share: Share = ALONE,
    ) -> None:
        """Make the missing rows: `make(fetch(rows))` for batches of consecutive rows.

        The next batch is fetched while one is made. Several processes each make their share of the shards and
        leave together. Refuses, before anything is written, what does not fit on the disk.
        """
        missing = [stage for stage in self.stages()[share.process :: share.processes] if not stage.whole]
        if missing:
            self._make(missing, fetch, make, batch_size, description)
        share.wait()

    def _make(
        self, missing: Sequence[Stage], fetch: Callable, make: Callable, batch_size: int, description: str
    ) -> None:
        spans = [range(stage.inputs["first"], min(stage.inputs["first"] + SHARD, self.count)) for stage in missing]
        rows = sum(map(len, spans))
        size = self._expect_room(rows)
        with track(description=f"{description} ({size})", total=rows) as bar:
            for stage, span in zip(missing, spans, strict=True):
                stage.make(partial(self._fill, span, fetch, make, batch_size, bar))

    def _fill(self, span: range, fetch: Callable, make: Callable, batch_size: int, bar: Any, folder: Path) -> None:
        """One shard: rows.npy, and broken.json with the reasons of the rows that could not be fetched."""
        out = new_array(folder / "rows.npy", self.dtype, (len(span), *self.shape))
        broken: dict[int, str] = {}
        batches = [span[start : start + batch_size] for start in range(0, len(span), batch_size)]
        for batch, (whole, fetched, problems) in zip(
            batches, ahead(lambda rows: _whole(fetch, rows), batches), strict=True
        ):
            if whole:
                out[np.array(whole) - span.start] = make(fetched)
            for row, reason in problems.items():
                out[row - span.start] = np.nan
                broken[row] = reason
            bar.update(len(batch))
        out.flush()
        atomic_write(folder / "broken.json", json.dumps(broken))

    def read(self) -> Rows:
        """All rows, memory-mapped and read-only."""
        stages = self.stages()
        unfinished = [stage.directory.name for stage in stages if not stage.done]
        if unfinished:
            raise BenchError(
                f"{self.folder}: {len(unfinished)} of {len(stages)} shards are not there yet, first {unfinished[0]}"
            )
        broken: dict[int, str] = {}
        for stage in stages:
            with expecting(stage.directory / "broken.json"):
                found = json.loads((stage.directory / "broken.json").read_text())
                broken |= {int(row): reason for row, reason in found.items()}
        return Rows([read_array(stage.directory / "rows.npy", mmap_mode="r") for stage in stages], broken)

    def _expect_room(self, rows: int) -> str:
        """The size of so many rows, for people; BenchError when the disk has less."""
        needed = rows * math.prod(self.shape) * self.dtype.itemsize
        place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise BenchError(
                f"{self.kind}: {rows} rows need {readable(needed)} in {self.folder.parent}, but "
                f"{readable(free)} are free; use a smaller data.size, data.precision=fp16, or put "
                f"{self.folder.parent} on a larger disk"
            )
        return readable(needed)


def ahead(call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, with the next result already being made in a thread while the caller works on the last."""
    with ThreadPoolExecutor(1) as thread:
        pending = None
        for item in items:
            following = thread.submit(call, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def readable(size: float) -> str:
    """Bytes as people say them: 27.9 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _whole(
    fetch: Callable[[Sequence[int]], Item], rows: Sequence[int]
) -> tuple[list[int], Item | None, dict[int, str]]:
    """What can be fetched of some rows: which, the result, and what is wrong with the others."""
    try:
        return list(rows), fetch(rows), {}
    except BrokenRows as broken:
        whole = [row for row in rows if row not in broken.problems]
        return whole, fetch(whole) if whole else None, broken.problems
