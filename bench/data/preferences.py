"""What people prefer: pictures of one prompt with their ranks, read from the schemas that such sets are published in.

    world[:SPLIT]             the drawn world's noisy people, who choose by its exact utility; split test
    pickapic:SOURCE[#SPLIT]   parquet shards in a folder or on the hub (OWNER/NAME), split test_unique: caption, jpg_0,
                              jpg_1, label_0 (1: the first won, 0: the second, 0.5: a tie) and has_label
    hpdv2:SOURCE              test.json: prompt, image_path, rank; or train.json: prompt, file_path, human_preference
                              (1: preferred); or a data set on the hub with test.json and test.tar.gz
    imagereward:FILE          data/test.json of THUDM/ImageReward: prompt, generations, ranking

The pictures of the json files lie in a folder beside them, or in the archive in which they are published.
"""

from __future__ import annotations

import json
import math
import os
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bench.data import PreferenceData, drawings, pickapic
from bench.data.depth import eight_bits
from bench.data.parquet import RowGroups, Shards, split_source
from bench.errors import BenchError, UsageError, did_you_mean, first_line
from bench.runtime.hub import is_hub_id
from bench.storage.digests import digest
from bench.storage.stages import Stage, fingerprint

WORLD_PAIRS, WORLD_SEED = 500, 0
WORLD_SPLITS = ("test", "validation", "train")
LISTED = {
    "hpdv2": (("prompt", "image_path", "rank"), ("prompt", "file_path", "human_preference")),
    "imagereward": (("prompt", "generations", "ranking"),),
}
"""The columns of prompt, pictures and ranks, by schema."""
PROBED = 10  # judgements by whose pictures their folder is found
ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
FORMS = {
    "world": "world[:SPLIT]",
    "pickapic": "pickapic:SOURCE[#SPLIT]",
    "hpdv2": "hpdv2:SOURCE",
    "imagereward": "imagereward:FILE",
}
"""How a preference set is named, by schema."""


class Judgement(NamedTuple):
    """Pictures of a prompt by people's ranks [K >= 2]: the smaller the better, equal where they saw no difference."""

    prompt: str
    ranks: tuple[float, ...]


class Preferences(ABC):
    """A preference set. judgements: what can be used of it; left_out: how many others, by reason."""

    schema: str
    spec: str
    judgements: list[Judgement]
    left_out: Counter[str]

    @abstractmethod
    def pictures(self, rows: Sequence[int]) -> list[list[Image.Image] | str]:
        """The pictures of some judgements in their own mode and size, or why those of one cannot be read."""

    def truth(self, row: int) -> tuple[float, ...] | None:
        """What the pictures of a judgement are worth, where that is known exactly."""
        return None


class World(Preferences):
    """Pairs of drawings that people choose between with probability sigmoid(difference of utility / 0.04)."""

    schema = "world"

    def __init__(self, split: str, limit: int | None):
        if split not in WORLD_SPLITS:
            raise UsageError(
                f"world:{split}: no such split{did_you_mean(split, WORLD_SPLITS)}; {', '.join(WORLD_SPLITS)}"
            )
        self.spec, self.left_out = f"world:{split}", Counter()
        self.pairs = PreferenceData(limit or WORLD_PAIRS, WORLD_SEED, split).pairs
        self.judgements = [Judgement(pair.winner.caption, (1.0, 2.0)) for pair in self.pairs]

    def pictures(self, rows: Sequence[int]) -> list[list[Image.Image] | str]:
        drawn = drawings.render(drawing for row in rows for drawing in (self.pairs[row].winner, self.pairs[row].loser))
        return [[Image.fromarray(image) for image in pair] for pair in drawn.reshape(len(rows), 2, *drawn.shape[1:])]

    def truth(self, row: int) -> tuple[float, ...]:
        return self.pairs[row].winner.utility, self.pairs[row].loser.utility


class _Files(Preferences):
    """Pictures that are files: read one judgement after the other, decoded in threads."""

    @abstractmethod
    def _contents(self, row: int) -> list[bytes | None]:
        """The files of a judgement; ValueError or OSError says what is wrong with them."""

    def pictures(self, rows: Sequence[int]) -> list[list[Image.Image] | str]:
        contents = [self._read(row) for row in rows]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return list(threads.map(_decoded, contents))

    def _read(self, row: int) -> list[bytes | None] | str:
        try:
            return self._contents(row)
        except (ValueError, OSError) as error:
            return first_line(error)


class Choices(_Files):
    """Pick-a-Pic: captions, two pictures, and which won; ties are kept, rows without a label are not."""

    schema = "pickapic"

    def __init__(self, source: str, split: str, limit: int | None):
        self.spec = f"pickapic:{source}#{split}"
        self.shards = Shards(source, split)
        found = self.shards.expect(pickapic.COLUMNS)
        self.groups = RowGroups(self.shards, pickapic.IMAGE_COLUMNS)
        rows = pickapic.read_rows(self.shards, [name for name in ("caption", "label_0", "has_label") if name in found])
        problem = np.where(pickapic.problems(rows) == "tie", "", pickapic.problems(rows))
        if "has_label" in rows:
            problem = np.where(rows["has_label"].eq(False), "no label", problem)
        self.left_out = Counter(problem[problem != ""].tolist())
        self.index = rows[problem == ""].head(limit).reset_index(drop=True)
        self.judgements = [
            Judgement(caption.strip(), (1 - label, label))
            for caption, label in zip(self.index["caption"], self.index["label_0"], strict=True)
        ]

    def _contents(self, row: int) -> list[bytes | None]:
        where = self.index.iloc[row]
        return pickapic.image_pair(self.groups.read(int(where["shard"]), int(where["group"])), int(where["place"]))


class Rankings(_Files):
    """HPDv2 and ImageReward: a list of prompts, each with names of pictures and their ranks.

    images: the folder or archive of the pictures; by default found beside the file.
    """

    def __init__(self, schema: str, source: str, images: Path | None, cache: Path, limit: int | None):
        self.schema, self.spec = schema, f"{schema}:{source}"
        path = Path(source).expanduser()
        if schema == "hpdv2" and not path.exists() and is_hub_id(source.partition("@")[0]):
            path, archive = _from_hub(source)
            images = images or archive
        entries, columns = _entries(path, schema)
        self.left_out, self.judgements, self.names = Counter(), [], []
        for entry in entries:
            prompt, names, ranks = (entry.get(column) for column in columns)
            if reason := _problem(prompt, names, ranks):
                self.left_out[reason] += 1
                continue
            preferred = columns[2] == "human_preference"  # 1 for the better one, where a rank of 1 is the best
            self.judgements.append(
                Judgement(prompt.strip(), tuple(-float(r) if preferred else float(r) for r in ranks))
            )
            self.names.append(names)
        self.judgements, self.names = self.judgements[:limit], self.names[:limit]
        if self.names:
            self.root = _root(path, images, [name for names in self.names[:PROBED] for name in names], cache)

    def _contents(self, row: int) -> list[bytes | None]:
        for name in self.names[row]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError("picture outside the folder")
            if not (self.root / name).is_file():
                raise ValueError("missing picture")
        return [(self.root / name).read_bytes() for name in self.names[row]]


def load_preferences(spec: str, *, limit: int | None = None, images: Path | None = None, cache: Path) -> Preferences:
    """Open a preference set, see the top of this file.

    limit: only the first judgements. images: where the pictures of json files are. cache: where archives are unpacked.

    Raises BenchError, in one line, where a file is not in the schema named or nothing of it can be used.
    """
    kind, _, rest = spec.partition(":")
    if images and kind not in LISTED:
        raise UsageError(f"--images goes with {' and '.join(LISTED)}; the pictures of {spec} are not files in a folder")
    if kind == "world":
        found: Preferences = World(rest or WORLD_SPLITS[0], limit)
    elif kind == "pickapic" and rest:
        found = Choices(*split_source(rest, "test_unique"), limit)
    elif kind in LISTED and rest:
        found = Rankings(kind, rest, images, cache, limit)
    else:
        hint = "name its schema before it" if Path(spec).expanduser().exists() else "no such preference set"
        raise UsageError(f"{spec}: {hint}{did_you_mean(kind, FORMS)}; one of {', '.join(FORMS.values())}")
    if not found.judgements:
        reasons = ", ".join(f"{reason} {count}" for reason, count in found.left_out.items())
        raise BenchError(f"{spec}: no usable judgement; left out: {reasons or 'nothing, it is empty'}")
    return found


def _decoded(contents: list[bytes | None] | str) -> list[Image.Image] | str:
    """All pictures of a judgement, or what is wrong with one."""
    if isinstance(contents, str):
        return contents
    try:
        return [_decode(content) for content in contents]
    except Exception as error:  # Pillow raises errors of many kinds for broken files
        return str(error) if isinstance(error, ValueError) else "undecodable picture"


def _decode(content: bytes | None) -> Image.Image:
    """As the scorers' authors open a file: neither turned upright nor resized."""
    if not content:
        raise ValueError("missing picture")
    image = Image.open(BytesIO(content))
    image.load()
    return eight_bits(image)


def _entries(path: Path, schema: str) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The entries of a file, and which of their keys are prompt, pictures and ranks."""
    if not path.is_file():
        raise BenchError(f"{path}: no such file of preferences")
    try:
        if path.suffix == ".parquet":
            entries = pq.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, pa.ArrowInvalid) as error:
        raise BenchError(f"{path} cannot be read: {first_line(error)}") from error
    first = entries[0] if isinstance(entries, list) and entries else {}
    keys = set(first) if isinstance(first, dict) else set()
    columns = next((columns for columns in LISTED[schema] if keys.issuperset(columns)), None)
    if columns is None or not all(isinstance(entry, dict) for entry in entries):
        wanted = ", or ".join(", ".join(columns) for columns in LISTED[schema])
        found = ", ".join(sorted(map(str, keys))) or type(entries).__name__
        raise BenchError(f"{path}: expected a list of entries with {wanted}; found {found}")
    return entries, columns


def _problem(prompt: Any, names: Any, ranks: Any) -> str:
    """Why an entry is left out, "" where it is not."""
    if not isinstance(prompt, str) or not prompt.strip():
        return "no prompt"
    if not isinstance(names, list) or not isinstance(ranks, list) or len(names) != len(ranks):
        return "not one rank a picture"
    if len(names) < 2:
        return "fewer than two pictures"
    if not all(isinstance(name, str) and name and "\0" not in name for name in names):
        return "no name of a picture"
    return "" if all(isinstance(rank, (int, float)) and math.isfinite(rank) for rank in ranks) else "no rank"


def _root(path: Path, images: Path | None, names: Sequence[str], cache: Path) -> Path:
    """The folder in which some of these pictures lie: `images`, or what lies beside the file; archives unpacked."""
    beside = [path.parent, *(path.with_name(stem) for stem in (path.stem, f"{path.stem}_images", "images"))]
    packed = [
        path.with_name(f"{stem}{end}") for stem in (path.stem, f"{path.stem}_images") for end in (".zip", ".tar.gz")
    ]
    places = [images.expanduser()] if images else [*beside, *packed]
    for place in places:
        if place.is_file() and place.suffix in ARCHIVES:
            unpacked = _unpacked(place, cache)
            inside = [unpacked, *sorted(folder for folder in unpacked.iterdir() if folder.is_dir())]
        else:
            inside = [place, place / path.stem] if images else [place]
        for folder in inside:
            if any((folder / name).is_file() for name in names):
                return folder
    raise BenchError(
        f"{path}: its pictures were not found: no {names[0]} in {', '.join(map(str, places))}; name their folder or "
        "archive with --images"
    )


def _unpacked(archive: Path, cache: Path) -> Path:
    """The content of an archive, unpacked once."""
    inputs = {"kind": "pictures", "archive": digest(archive)}
    stage = Stage(cache / f"pictures-{fingerprint(inputs)}", inputs)

    def fill(folder: Path) -> None:
        try:
            if archive.suffix == ".zip":
                with zipfile.ZipFile(archive) as packed:
                    packed.extractall(folder)
            else:
                with tarfile.open(archive) as packed:
                    packed.extractall(folder, filter="data")  # nothing outside the folder, no devices
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise BenchError(f"{archive} cannot be unpacked: {first_line(error)}") from error

    stage.make(fill)
    return stage.directory


def _from_hub(source: str) -> tuple[Path, Path]:
    """test.json and test.tar.gz of a data set on the hub, OWNER/NAME[@REVISION], from its cache or downloaded."""
    from huggingface_hub import hf_hub_download

    name, _, revision = source.partition("@")
    try:
        files = [
            hf_hub_download(name, file, repo_type="dataset", revision=revision or None)
            for file in ("test.json", "test.tar.gz")
        ]
    except Exception as error:  # the hub's client raises errors of several libraries
        raise BenchError(
            f"hpdv2:{source}: no such file, and the hub failed: {first_line(error)} (a test.json with its pictures "
            "beside it works without the hub)"
        ) from error
    return Path(files[0]), Path(files[1])
