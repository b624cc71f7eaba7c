"""The pictures of a page: the same prompts and sampling seed for every model, small and self-contained."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.metrics.columns import Column
from bench.reports.layouts import number, spoken_name
from bench.reports.load import BASE, Runs, prompt_texts
from bench.reports.tables import lead_column
from bench.storage.runs import Result

SMALL = 128  # up to here every pixel counts: kept without loss, enlarged without smoothing


@dataclass(frozen=True)
class Amount:
    """How many pictures a page carries, and how well: rows nobody chose, rows of wins and of losses for each
    metric, pixels of the longer side, quality of lossy ones."""

    rows: int
    extremes: int
    side: int
    quality: int


AMOUNTS = (
    Amount(12, 3, 256, 85),
    Amount(12, 2, 224, 75),
    Amount(8, 1, 160, 60),
    Amount(4, 1, 96, 45),
    Amount(2, 0, 64, 35),
    Amount(0, 0, 0, 0),
)  # a page that is too large takes the next
CAPTIONS = 2  # numbers under a picture; all of them stand where two models are compared


@dataclass(frozen=True)
class Score:
    """A picture's score as it is shown. change: to the base's picture of the same prompt, "" for the base itself."""

    title: str
    value: str
    change: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class Picture:
    model: str
    uri: str
    pixelated: bool
    scores: list[Score]


@dataclass(frozen=True)
class Row:
    """One prompt: a picture (or None) for each model. key: its place among the prompts of its set, as in `numbers`;
    remarks: what it was chosen for, if it was."""

    key: int
    prompt: str
    pictures: list[Picture | None]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gallery:
    """Pictures of one setting, a prompt once: those nobody chose, then those where the best model gains most over the
    base or loses most to it by some metric. numbers: of every prompt, see `_numbers`."""

    models: list[str]
    sample: list[Row]
    extremes: list[Row]
    seed: int
    train_seeds: dict[str, int]
    numbers: dict[str, Any]


def gallery(runs: Runs, group: tuple[str, float], best: str, amount: Amount = AMOUNTS[0]) -> Gallery | None:
    """Pictures of one setting, None when the runs have none or none are wanted."""
    if not amount.rows:
        return None
    rows = runs.scores
    rows = rows[(rows["prompt_set"] == group[0]) & (rows["guidance"] == group[1])]
    seeds = runs.evaluation.get("seeds") or sorted(rows["seed"].unique())
    rows = rows[rows["seed"] == seeds[0]]
    first = rows.groupby("model", observed=True)["train_seed"].min()
    rows = rows[rows["train_seed"].isna() | (rows["train_seed"] == rows["model"].map(first).astype("Int64"))]
    homes = rows.groupby("model", observed=True)["run"].first().to_dict()
    models = [model for model in runs.models if model in homes]
    folders = {m: picture_folder(runs.folders[homes[m]], group, runs.models[m]) for m in models}
    names = {m: {p.name for p in folder.iterdir()} if folder else set() for m, folder in folders.items()}
    there = [p for p in sorted(rows["prompt_id"].unique()) if any(f"{p}-{seeds[0]}.png" in names[m] for m in models)]
    if not there:
        return None
    values = rows.pivot_table("value", "prompt_id", ["metric", "model"], observed=True)
    shown = [column for column in _shown(runs) if column.name in values]
    places = {column.name: _places(values[column.name].to_numpy(), column.decimals) for column in shown}
    ids, texts = prompt_ids(runs, group[0]), prompt_texts(runs, group[0])
    remarks = _remarks(values, shown, places, best, there, amount.extremes)

    def row(prompt: str) -> Row:
        name, captions = f"{prompt}-{seeds[0]}.png", shown[:CAPTIONS]
        pictures = [
            _picture(folders[m], name, m, [_score(values, c, places[c.name], prompt, m) for c in captions], amount)
            for m in models
        ]
        told = tuple(remarks.get(prompt, ()))
        return Row(ids.index(prompt), texts.get(prompt, f"prompt {prompt}"), pictures, told)

    trained = {m: int(first[m]) for m in models if m != BASE and m in first.index}
    sample, numbers = there[: amount.rows], _numbers(values, shown, places, models, ids)
    extremes = [row(prompt) for prompt in remarks if prompt not in sample]
    return Gallery(models, [row(prompt) for prompt in sample], extremes, int(seeds[0]), trained, numbers)


def prompt_ids(runs: Runs, prompt_set: str) -> list[str]:
    """All prompts of a set, in the order of their hash."""
    rows = runs.scores
    return sorted(map(str, rows.loc[rows["prompt_set"] == prompt_set, "prompt_id"].unique()))


def prompt_list(runs: Runs, prompt_set: str) -> list[str]:
    """Their texts."""
    texts = prompt_texts(runs, prompt_set)
    return [texts.get(prompt, f"prompt {prompt}") for prompt in prompt_ids(runs, prompt_set)]


def _numbers(
    values: pd.DataFrame, shown: Sequence[Column], places: dict[str, int], models: Sequence[str], ids: Sequence[str]
) -> dict[str, Any]:
    """What the page sorts prompts by: titles, decimals and directions of the columns, scores [column][model][prompt].

    Of the pictures' seeds, rounded as shown; None where there is no score.
    """
    whole = values.reindex(ids)

    def line(metric: str, model: str) -> list[float | None]:
        if (metric, model) not in whole:
            return [None] * len(ids)
        scores = whole[(metric, model)].round(places[metric])
        return [None if score != score else score for score in scores.tolist()]

    return {
        "models": list(models),
        "columns": [{"title": spoken_name(c), "places": places[c.name], "sign": c.sign} for c in shown],
        "scores": [[line(column.name, model) for model in models] for column in shown],
    }


def picture_folder(run: Path, group: tuple[str, float], result: Result) -> Path | None:
    """Where a run keeps the pictures of one model of its own, None where it has none."""
    for scale in (f"g{group[1]:g}", f"g{group[1]}"):
        folder = run / "images" / group[0] / scale / result.name
        if folder.is_dir():
            return folder
    return None


def _shown(runs: Runs) -> list[Column]:
    """What a picture is told by: what decides who won, then every learned metric."""
    lead = lead_column(runs)
    return [lead, *(column for column in runs.columns if not (column.truth or column.detail) and column != lead)]


def _remarks(
    values: pd.DataFrame, shown: Sequence[Column], places: dict[str, int], best: str, there: Sequence[str], count: int
) -> dict[str, list[str]]:
    """Prompts with pictures where the best model gains most over the base, or loses most to it, by each column."""
    found: dict[str, list[str]] = {}
    for column in shown:
        changes = _changes(values, column, best, there)
        for what, chosen, sign in (("gain", changes[::-1][:count], 1), ("loss", changes[:count], -1)):
            for prompt, change in chosen:
                if sign * column.sign * change > 0:
                    size = number(change, places[column.name], "+")
                    found.setdefault(prompt, []).append(f"large {what} of {best} in {spoken_name(column)}, {size}")
    return found


def _changes(values: pd.DataFrame, column: Column, best: str, there: Sequence[str]) -> list[tuple[str, float]]:
    """(prompt, score of the best model minus the base's) for prompts with pictures, from the worst to the best."""
    metric = column.name
    if best == BASE or (metric, BASE) not in values or (metric, best) not in values:
        return []
    change = (values[(metric, best)] - values[(metric, BASE)]).loc[list(there)].dropna()
    change = change.sort_values(ascending=column.higher_is_better)
    return [(str(prompt), float(gain)) for prompt, gain in change.items()]


def _score(values: pd.DataFrame, column: Column, places: int, prompt: str, model: str) -> Score | None:
    """One number under a picture, None where there is none."""

    def value(of: str) -> float:
        return values[(column.name, of)].get(prompt, np.nan) if (column.name, of) in values else np.nan

    own, base = value(model), value(BASE)
    if np.isnan(own):
        return None
    if model == BASE or np.isnan(base):
        return Score(column.title, number(own, places))
    change = number(own - base, places, "+")
    better = None if not float(change) else column.sign * (own - base) > 0
    return Score(column.title, number(own, places), change, better)


def _places(values: np.ndarray, declared: int | None) -> int:
    """Decimals of a column's scores, the same under every picture: as declared, else three figures of their spread."""
    if declared is not None:
        return declared
    spread = float(np.nanstd(values))
    return min(5, max(0, 2 - math.floor(math.log10(spread)))) if spread > 0 else 3


def _picture(folder: Path | None, name: str, model: str, scores: list[Score | None], amount: Amount) -> Picture | None:
    if folder is None or not (folder / name).is_file():
        return None
    try:
        uri, small = encode(folder / name, amount.side, amount.quality)
    except OSError:
        return None  # an image cut short by a full disk must not cost the page
    return Picture(model, uri, small, [score for score in scores if score])


def encode(path: Path, side: int, quality: int) -> tuple[str, bool]:
    """A picture as a data: address (WebP), and whether it is small enough to be shown pixel by pixel."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    small = max(image.size) <= SMALL
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=small and quality >= 70, quality=min(quality, 70) if small else quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), small
