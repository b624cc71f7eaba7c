"""Pick-a-Pic: captions, two images and a human choice, in parquet shards of the published schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from bench.data.images import READING, read_images
from bench.data.parquet import RowGroups, Shards, split_source
from bench.errors import BenchError
from bench.runtime.progress import track
from bench.storage.stages import Stage, fingerprint

COLUMNS = ("caption", "label_0", "jpg_0", "jpg_1")
IMAGE_COLUMNS = ["jpg_0", "jpg_1"]
UIDS = ("image_0_uid", "image_1_uid")
LAYOUT = 1  # of the index; raise when its meaning changes
SCANNERS = 8  # shards scanned at a time; over a network most of a scan is waiting
TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary, pa.types.is_null)
EXAMPLES = 20  # rows set aside that are named in the protocol


class PickAPic:
    """Labelled pairs, streamed by row group from a folder of shards or from the hub.

    label_0 is 1 where the first image won, 0 where the second did, 0.5 for a tie. Ties and rows without a
    caption or a label are left out when the captions and labels are scanned (once, kept under `cache`); rows
    whose images cannot be decoded show when they are encoded.

    size: only the first pairs. deduplicate: of equal "prompt"s or equal "winner" images (by uid) the first.
    """

    paired = True

    def __init__(
        self, spec: str, *, resolution: int, cache: Path, size: int | None = None, deduplicate: str | None = None
    ):
        source, split = split_source(spec)
        self.spec, self.resolution, self.deduplicate = f"pickapic:{source}#{split}", resolution, deduplicate
        self.shards = Shards(source, split)
        columns = self.shards.expect((*COLUMNS, *(UIDS if deduplicate == "winner" else ())))
        whole, self.counts, self.examples = _index(self.shards, columns, cache)
        self.index = self._without_copies(whole).head(size).reset_index(drop=True)
        if self.index.empty:
            raise BenchError(
                f"{self.spec}: no usable pair in {self.counts['rows']} rows; left out: "
                f"{json.dumps(self.counts['left_out'])}"
            )
        self.groups = RowGroups(self.shards, IMAGE_COLUMNS)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def prompts(self) -> list[str]:
        return self.index["caption"].tolist()

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(["pickapic", self.shards.fingerprint, len(self), self.deduplicate, self.resolution, READING])

    def name(self, row: int) -> str:
        pair = self.index.iloc[row]
        return _place(self.shards, pair["shard"], pair["group"], pair["place"])

    def record(self) -> dict[str, Any]:
        """Where the pairs come from and what was left out, for the protocol."""
        return {
            "source": self.spec,
            "pairs": len(self),
            "resolution": self.resolution,
            "images": READING,
            **self.counts,
            "examples": self.examples,
        }

    def winners(self, rows: Sequence[int]) -> np.ndarray:
        """The preferred images, uint8 [n, R, R, 3]; BrokenRows when either image of a pair is broken."""
        return self._images(rows, loser_first=False)

    def losers(self, rows: Sequence[int]) -> np.ndarray:
        """The rejected images; as `winners`."""
        return self._images(rows, loser_first=True)

    def _images(self, rows: Sequence[int], loser_first: bool) -> np.ndarray:
        groups = {}
        chosen = self.index.iloc[list(rows)]
        for row, shard, group, place, winner in zip(
            rows, chosen["shard"], chosen["group"], chosen["place"], chosen["winner"], strict=True
        ):
            pair = image_pair(self.groups.read(int(shard), int(group)), int(place))
            groups[int(row)] = pair[::-1] if bool(winner) != loser_first else pair
        return read_images(groups, self.resolution)

    def _without_copies(self, index: pd.DataFrame) -> pd.DataFrame:
        if self.deduplicate is None:
            return index
        kept = index.drop_duplicates({"prompt": "caption", "winner": "winner_uid"}[self.deduplicate])
        self.counts["left_out"][f"same {self.deduplicate} again"] = len(index) - len(kept)
        return kept


def captions(spec: str) -> list[str]:
    """The prompts of a split, SOURCE#SPLIT; only the caption column is read."""
    shards = Shards(*split_source(spec))
    shards.expect(["caption"])
    return [str(caption or "").strip() for caption in shards.column("caption")]


def _place(shards: Shards, shard: int, group: int, place: int) -> str:
    return f"{shards.name(int(shard))}, row group {group}, row {place}"


def image_pair(group: pa.Table, place: int) -> list[bytes | None]:
    """Both files of a row, of a row group's image columns: raw bytes, or of the {bytes, path} some mirrors store."""
    values = [group[column][place].as_py() for column in IMAGE_COLUMNS]
    return [value.get("bytes") if isinstance(value, dict) else value for value in values]


def _index(shards: Shards, columns: Sequence[str], cache: Path) -> tuple[pd.DataFrame, dict[str, Any], list[str]]:
    """Usable pairs, counts, and examples of rows set aside: one row a pair, in the order of the files.

    Columns: shard, group, place (of the row in its row group), winner (0 or 1: which image), caption, and
    winner_uid where the shards have uids.
    """
    inputs = {"kind": "pickapic", "layout": LAYOUT, "shards": shards.fingerprint}
    stage = Stage(Path(cache) / f"pairs-{fingerprint(inputs)}", inputs)

    def fill(folder: Path) -> None:
        index, counts, examples = _scan(shards, columns)
        index.to_parquet(folder / "index.parquet", index=False)
        (folder / "counts.json").write_text(json.dumps({"counts": counts, "examples": examples}))

    stage.make(fill)
    stored = json.loads((stage.directory / "counts.json").read_text())
    return pd.read_parquet(stage.directory / "index.parquet"), stored["counts"], stored["examples"]


def _scan(shards: Shards, columns: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any], list[str]]:
    """Read captions and labels of all shards, and say what is left out and why."""
    rows = read_rows(shards, [name for name in ("caption", "label_0", *UIDS) if name in columns])
    rows["problem"] = problems(rows)
    left_out = {str(reason): int(count) for reason, count in rows["problem"].value_counts().items() if reason}
    broken = rows[~rows["problem"].isin(["", "tie"])].head(EXAMPLES)
    examples = [f"{_place(shards, row.shard, row.group, row.place)}: {row.problem}" for row in broken.itertuples()]
    kept = rows[rows["problem"] == ""].copy()
    kept["winner"] = (kept["label_0"] == 0).astype(np.int8)
    if all(name in kept for name in UIDS):
        kept["winner_uid"] = kept[UIDS[0]].where(kept["winner"] == 0, kept[UIDS[1]])
    kept["caption"] = kept["caption"].str.strip()
    counts = {"rows": len(rows), "left_out": left_out}
    return kept.drop(columns=["problem", "label_0", *UIDS], errors="ignore"), counts, examples


def read_rows(shards: Shards, columns: Sequence[str]) -> pd.DataFrame:
    """Small columns of all shards, several shards at a time; shard, group and place say where each row is."""
    with ThreadPoolExecutor(SCANNERS) as threads:
        tables = list(
            track(
                threads.map(lambda shard: _scan_shard(shards, shard, columns), range(len(shards.paths))),
                "reading captions and labels",
                total=len(shards.paths),
                unit="shard",
            )
        )
    return pd.concat(tables, ignore_index=True)


def _scan_shard(shards: Shards, shard: int, columns: Sequence[str]) -> pd.DataFrame:
    file = shards.open(shard)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise BenchError(
            f"{shards.source}: shard {shards.name(shard)} has no column {', '.join(missing)}, which "
            f"{shards.name(0)} has"
        )
    kind = file.schema_arrow.field("caption").type
    if not any(test(kind) for test in TEXT):
        raise BenchError(f"{shards.source}: column caption of shard {shards.name(shard)} holds {kind}, not text")
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    with shards.reading(shard):
        table = file.read(columns).to_pandas()
    table.insert(0, "shard", np.int32(shard))
    table.insert(1, "group", np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    table.insert(2, "place", np.concatenate([np.arange(size, dtype=np.int32) for size in (*sizes, 0)]))
    return table


def problems(rows: pd.DataFrame) -> np.ndarray:
    """Why a row is left out, "" where it is not."""
    label = rows["label_0"]
    empty = rows["caption"].isna() | (rows["caption"].astype(str).str.strip() == "")
    return np.select([label == 0.5, ~label.isin([0, 1]), empty], ["tie", "no label", "no caption"], "")
