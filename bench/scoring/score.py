"""Scores for any folder of images with prompts: what is broken is named, what was scored before is looked up."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from bench import registry
from bench.data.depth import eight_bits
from bench.data.images import IMAGE_SUFFIXES, images_in
from bench.errors import BenchError, UsageError, first_line, printable
from bench.mini import MINI_WEIGHTS
from bench.runtime.progress import track
from bench.runtime.versions import versions
from bench.scoring.named import columns_named, named
from bench.storage.digests import content_digest
from bench.storage.stages import atomic_write, fingerprint

if TYPE_CHECKING:
    from bench.scoring.evaluate import Scorers

PROMPT_COLUMNS = ("prompt", "text", "caption")  # "text" and "caption" are what metadata.jsonl files often say
PROMPT_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "prompts.csv", "prompts.txt")
DEFAULT = ("pickscore", "hpsv2", "imagereward", "aesthetic", "clip")  # of any picture; the judge knows one world only
PACKAGES = ("torch", "transformers", "tokenizers", "pillow")
CHUNK = 256  # images in memory at a time, and as many being decoded
THREADS = 8


@dataclass
class Item:
    """One row of the output; `problem` says why it has no scores."""

    file_name: str
    path: Path
    prompt: str
    problem: str = ""
    digest: str = ""


# --- which image belongs to which prompt ---


def collect(folder: Path, prompts: Path | None) -> list[Item]:
    """Pair the images of a folder with a prompts file (by default one in the folder).

    Rows with `file_name` are paired by it; a list of prompts alone belongs to the images in order of their names.
    """
    if not folder.is_dir():
        raise BenchError(f"no such folder of images: {folder}")
    prompts = prompts or next((folder / name for name in PROMPT_FILES if (folder / name).is_file()), None)
    if prompts is None:
        raise UsageError(f"--prompts is missing, and {folder} holds none of {', '.join(PROMPT_FILES)}")
    table = _read_table(prompts)
    found = images_in(folder)
    if not found and "file_name" not in table:
        raise BenchError(f"{folder}: no {', '.join(IMAGE_SUFFIXES)} files in it")
    items = _by_name(folder, table, set(found)) if "file_name" in table else _in_order(folder, found, table["prompt"])
    named = {item.file_name for item in items}
    items += [Item(name, folder / name, "", "no prompt for this image") for name in found if name not in named]
    for item in items:
        if not item.problem and not item.prompt:
            item.problem = "empty prompt"
    return items


def _by_name(folder: Path, table: pd.DataFrame, found: Container[str]) -> list[Item]:
    items, seen = [], set()
    for name, prompt in zip(table["file_name"], table["prompt"], strict=True):
        problem = "" if name in found else _problem(folder, name)
        items.append(Item(name, folder / name, prompt, "named twice" if name in seen else problem))
        seen.add(name)
    return items


def _problem(folder: Path, name: str) -> str:
    """What is wrong with a name in somebody's metadata, "" when it is that of a file in the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "outside the folder"
    try:
        return "" if (folder / name).is_file() else "no such image"
    except (OSError, ValueError):  # a name that no file can have
        return "no such image"


def _in_order(folder: Path, found: Sequence[str], prompts: Sequence[str]) -> list[Item]:
    """Image by image in order of the names; prompts left over become rows without an image."""
    items = [Item(name, folder / name, prompt) for name, prompt in zip(found, prompts, strict=False)]
    return items + [Item("", folder, prompt, "no image for this prompt") for prompt in prompts[len(found) :]]


def _read_table(path: Path) -> pd.DataFrame:
    """Columns prompt and, where the file has it, file_name; both text."""
    if not path.is_file():
        raise BenchError(f"prompts file not found: {path}")
    readers = {
        ".txt": lambda p: pd.DataFrame({"prompt": p.read_text(encoding="utf-8").splitlines()}),
        ".csv": lambda p: pd.read_csv(p, dtype=str, keep_default_na=False),
        ".parquet": pd.read_parquet,
        ".jsonl": _read_jsonl,
    }
    if path.suffix not in readers:
        raise UsageError(f"{path}: prompts are read from .txt, .csv, .jsonl or .parquet files")
    try:
        table = readers[path.suffix](path)
    except (ValueError, OSError) as error:
        raise BenchError(f"{path} cannot be read: {first_line(error)}") from error
    column = next((name for name in PROMPT_COLUMNS if name in table), None)
    if column is None:
        raise BenchError(f"{path}: no column 'prompt'; found {', '.join(map(str, table.columns))}")
    table = table.rename(columns={column: "prompt"})
    wanted = [name for name in ("file_name", "prompt") if name in table]
    return table[wanted].fillna("").astype(str).apply(lambda values: values.str.strip())


def _read_jsonl(path: Path) -> pd.DataFrame:
    """Without pandas' guesses: a prompt that looks like a number or a date stays as it was written."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return pd.DataFrame([json.loads(line) for line in lines if line.strip()])


# --- scores of before ---


class Scores:
    """Scores by (image, prompt, scorer, protocol), and what scorers said of themselves, in one small database."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(path, timeout=60)
        for table, kind in (("scores", "REAL"), ("truncated", "INTEGER"), ("scorers", "TEXT")):
            self.database.execute(f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, value {kind})")

    def close(self) -> None:
        self.database.close()

    def get(self, table: str, keys: Sequence[str]) -> list[Any]:
        """The value of each key, None where there is none."""
        query = (
            f"SELECT {table}.value FROM json_each(?) AS asked LEFT JOIN {table} ON {table}.key = asked.value "
            "ORDER BY asked.key"
        )
        return [value for (value,) in self.database.execute(query, (json.dumps(list(keys)),))]

    def put(self, table: str, values: Mapping[str, Any]) -> None:
        with self.database:
            self.database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", values.items())


def identity(name: str, options: Mapping[str, Any], made_with: Mapping[str, str]) -> str:
    """What a scorer's numbers depend on, as far as can be told without loading it.

    Whatever option names a file or folder, weights or backbone, counts by its content; what lies in BENCH_WEIGHTS, of
    which only a part may be read, by name, size and time. Weights that are in none of the folders come from the hub's
    cache and count as their name.
    """
    named = [value for value in {"weights": "mini", **options}.values() if isinstance(value, str)]
    roots = [MINI_WEIGHTS if value == "mini" else Path(value).expanduser() for value in named]
    content = content_digest(file for root in roots if root.exists() for file in _files(root))
    beside = Path(os.environ.get("BENCH_WEIGHTS") or os.devnull).expanduser()
    state = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(beside))
    return fingerprint([name, dict(options), content, state, made_with])


def _files(root: Path) -> list[Path]:
    return [path for path in ([root] if root.is_file() else root.glob("**/*")) if path.is_file()]


# --- scoring ---


def metric_options(names: Sequence[str], weights: str, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of each metric's `load`: the weights, and METRIC.KEY=VALUE settings (values as YAML)."""
    import yaml

    options: dict[str, dict[str, Any]] = {name: {"weights": weights} for name in names}
    for setting in settings:
        key, _, value = setting.partition("=")
        name, _, option = key.partition(".")
        if name not in options or not option or not value:
            raise UsageError(f"--set {setting}: expected METRIC.KEY=VALUE with a metric of {', '.join(names)}")
        options[name][option] = yaml.safe_load(value)
    return options


def score_folder(
    items: list[Item], metrics: Sequence[str], options: Mapping[str, Mapping[str, Any]], device: str, cache: Path
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """One row an item (file_name, prompt, every column of every metric, problem), and the protocol.

    Models are loaded only when a score is missing from the cache.
    """
    usable = _hashed(items)
    given = {name: {"device": device, **options.get(name, {})} for name in metrics}
    made_with = versions(PACKAGES)
    who = {name: identity(name, given[name], made_with) for name in metrics}
    with closing(Scores(cache)) as known:
        about = [fingerprint([item.digest, item.prompt]) for item in usable]
        names = _columns(metrics, known.get("scorers", [who[name] for name in metrics]))
        keys = {
            column: [_key(who[name], item, column.partition("/")[2]) for item in about]
            for name in metrics
            for column in names[name]
        }
        values = {column: known.get("scores", keys[column]) for column in keys}
        missing = [name for name in metrics if any(None in values[column] for column in names[name])]
        if missing:
            _fill(usable, {name: names[name] for name in missing}, given, device, who, keys, values, known)
        infos = dict(zip(metrics, known.get("scorers", [who[name] for name in metrics]), strict=True))
        prompts = [fingerprint(item.prompt) for item in usable]
        cut = {
            name: sum(filter(None, known.get("truncated", [_key(who[name], prompt) for prompt in prompts])))
            for name in metrics
        }
    table = pd.DataFrame(
        {"file_name": [_text(item.file_name) for item in items], "prompt": [_text(item.prompt) for item in items]}
    )
    place = {id(item): row for row, item in enumerate(items)}
    for name, found in values.items():
        column = np.full(len(items), np.nan, np.float32)
        for item, value in zip(usable, found, strict=True):
            column[place[id(item)]] = np.nan if value is None else value
        table[name] = column
    table["problem"] = [item.problem for item in items]
    protocol = {
        "metrics": {name: {**json.loads(infos[name] or "{}"), "truncated_prompts": cut[name]} for name in metrics},
        "device": device,
        "versions": made_with,
        "images": len(items),
        "scored": sum(not item.problem for item in items),
    }
    return table, protocol


def _text(text: str) -> str:
    """A file's name that is no UTF-8 as text that files and terminals take."""
    return text.encode("utf-8", "backslashreplace").decode()


def _key(scorer: str, scored: str, column: str = "") -> str:
    """Where the database keeps what a scorer says of an image with its prompt, column by column, or of a prompt."""
    return f"{scorer}:{scored}" + (f":{column}" if column else "")


def _columns(metrics: Sequence[str], infos: Sequence[str | None]) -> dict[str, list[str]]:
    """The columns of each metric, as it said of itself when it was last loaded: a look-up need not import it."""
    said = {
        name: json.loads(info)["columns"]
        for name, info in zip(metrics, infos, strict=True)
        if info and "columns" in json.loads(info)
    }
    return {
        name: [column["name"] for column in said[name]]
        if name in said
        else [column.name for column in registry.metric(name).table_columns()]
        for name in metrics
    }


def _fill(
    usable: Sequence[Item],
    names: Mapping[str, Sequence[str]],
    given: Mapping[str, Mapping[str, Any]],
    device: str,
    who: Mapping[str, str],
    keys: Mapping[str, list[str]],
    values: Mapping[str, list[Any]],
    known: Scores,
) -> None:
    """Score what is missing chunk by chunk, and remember each chunk; models are loaded for the first whole image."""
    scorers = None
    columns = [column for own in names.values() for column in own]
    rows = [row for row in range(len(usable)) if any(values[column][row] is None for column in columns)]
    for chunk, images in _decoded(usable, rows):
        whole = [(row, image) for row, image in zip(chunk, images, strict=True) if image is not None]
        if not whole:
            continue
        scorers = scorers or _loaded(names, given, device, who, known)
        prompts = [usable[row].prompt for row, _ in whole]
        scores = scorers.score([image for _, image in whole], prompts)
        for column in columns:
            for (row, _), value in zip(whole, scores[column], strict=True):
                values[column][row] = float(value)
            known.put("scores", {keys[column][row]: values[column][row] for row, _ in whole})
        for name, metric in scorers.metrics.items():
            known.put(
                "truncated",
                {_key(who[name], fingerprint(prompt)): metric.count_truncated([prompt]) for prompt in set(prompts)},
            )


def _loaded(
    names: Mapping[str, Sequence[str]],
    given: Mapping[str, Mapping[str, Any]],
    device: str,
    who: Mapping[str, str],
    known: Scores,
) -> Scorers:
    """The scorers; what they say of themselves is remembered, so that a later look-up need not load them."""
    from bench.scoring.evaluate import Scorers  # only here: looking up old scores needs no models

    scorers = Scorers.load(list(names), options=given, device=device)
    if [column.name for column in scorers.columns] != [column for own in names.values() for column in own]:
        raise BenchError(
            f"{', '.join(names)}: other columns than in the scores of before; delete {known.path}, which is made anew"
        )
    known.put("scorers", {who[name]: json.dumps(info) for name, info in scorers.protocol().items()})
    return scorers


def _hashed(items: Sequence[Item]) -> list[Item]:
    """The items without a problem so far, with the hash of their files."""
    candidates = [item for item in items if not item.problem]

    def digest(item: Item) -> None:
        if not item.path.is_file():  # a pipe would be waited for
            item.problem = "no file (a link to nothing, a pipe or the like)"
            return
        try:
            item.digest = hashlib.sha256(item.path.read_bytes()).hexdigest()
        except OSError as error:
            item.problem = f"cannot be read: {error.strerror}"

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(digest, candidates))
    return [item for item in candidates if not item.problem]


def _decoded(usable: Sequence[Item], rows: Sequence[int]) -> Iterator[tuple[list[int], list[Image.Image | None]]]:
    """Chunks of decoded images; the next chunk is decoded while the current one is scored."""
    chunks = [list(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        ahead = [pool.submit(_decode, usable[row]) for row in chunks[0]] if chunks else []
        for number, chunk in enumerate(track(chunks, "scoring", total=len(chunks), unit="chunk")):
            current = ahead
            following = chunks[number + 1] if number + 1 < len(chunks) else []
            ahead = [pool.submit(_decode, usable[row]) for row in following]
            yield chunk, [job.result() for job in current]


def _decode(item: Item) -> Image.Image | None:
    """The image in its own mode, or None with the problem noted."""
    try:
        image = Image.open(io.BytesIO(item.path.read_bytes()))
        image.load()
        return eight_bits(image)
    except Exception as error:  # Pillow raises errors of many kinds for broken files
        item.problem = f"broken image: {first_line(error)}"
        return None


# --- output ---


def write(table: pd.DataFrame, protocol: Mapping[str, Any], path: Path) -> None:
    """Parquet with the protocol in the file's metadata (key "bench.protocol"), or CSV with it in a first comment.

    In a CSV's header the checkpoint stands beside every name, "pickscore (mini)".
    """
    if path.suffix == ".csv":
        shown = table.rename(columns=columns_named(protocol["metrics"], by="name"))
        atomic_write(path, f"# bench.protocol: {json.dumps(protocol)}\n{shown.to_csv(index=False)}")
        return
    if path.suffix != ".parquet":
        raise UsageError(f"-o {path}: scores are written as .parquet or .csv")
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = pa.Table.from_pandas(table, preserve_index=False)
    extended = {**(arrow.schema.metadata or {}), b"bench.protocol": json.dumps(protocol).encode()}
    arrow = arrow.replace_schema_metadata(extended)
    sink = io.BytesIO()
    pq.write_table(arrow, sink)
    atomic_write(path, sink.getvalue())


def truncation(protocol: Mapping[str, Any]) -> str:
    """How many of the prompts each scorer read the beginning of only: "imagereward (mini) 40 (after 35 tokens)"."""
    cut = [
        f"{named(name, info)} {info['truncated_prompts']} ({info.get('truncates', '?').removeprefix('prompts ')})"
        for name, info in protocol["metrics"].items()
        if info["truncated_prompts"]
    ]
    return f"prompts truncated, of {protocol['scored']}: {', '.join(cut) if cut else 'none by any scorer'}"


def summary(table: pd.DataFrame, metrics: Sequence[str], protocol: Mapping[str, Any]) -> str:
    """Means and what was cut, then every problem on a line of its own."""
    lines = [f"{protocol['scored']} of {len(table)} images scored"]
    shown = columns_named(protocol["metrics"])
    width = max(map(len, shown.values()), default=0)
    for name in metrics:
        cut = protocol["metrics"].get(name, {}).get("truncated_prompts", 0)
        for column in (column for column in table if column == name or str(column).startswith(f"{name}/")):
            found = table[column].dropna()
            title = shown.get(column, str(column))
            lines.append(
                f"  {title:<{width}}  mean {found.mean():.4f}  sd {found.std():.4f}  ({cut} prompts truncated)"
            )
    troubled = table[table["problem"] != ""]
    lines += [
        f"  {printable(row.file_name) or '(no image)'}: {printable(row.problem)}" for row in troubled.itertuples()
    ]
    return "\n".join(lines)
