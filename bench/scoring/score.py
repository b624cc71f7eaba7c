"""Scores for any folder of images with prompts: what is broken is named, what was scored before is looked up."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from bench import registry
from bench.data.depth import eight_bits
from bench.errors import BenchError, UsageError, first_line, printable
from bench.runtime.progress import track
from bench.runtime.versions import versions
from bench.scoring.named import columns_named, named
from bench.scoring.pairing import Item
from bench.scoring.stored import Scores, identity
from bench.storage.stages import atomic_write, fingerprint

if TYPE_CHECKING:
    from bench.scoring.evaluate import Scorers

DEFAULT = ("pickscore", "hpsv2", "imagereward", "aesthetic", "clip")  # of any picture; the judge knows one world only
PACKAGES = ("torch", "transformers", "tokenizers", "pillow")
CHUNK = 256  # images in memory at a time, and as many being decoded
THREADS = 8


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
