"""The pictures of a page: the same prompts and sampling seed for every model, small and self-contained."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.metrics.columns import Column
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


@dataclass(frozen=True)
class Picture:
    model: str
    uri: str
    pixelated: bool
    scores: list[tuple[str, str]]


@dataclass(frozen=True)
class Row:
    """One prompt: a picture (or None) for each model."""

    prompt: str
    pictures: list[Picture | None]
    change: float | None = None


@dataclass(frozen=True)
class Gallery:
    """Pictures of one setting: prompts nobody chose, then for each metric (name, wins, losses) the best
    model's largest changes to the base."""

    models: list[str]
    sample: list[Row]
    extremes: list[tuple[str, list[Row], list[Row]]]
    seed: int
    train_seeds: dict[str, int]


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
    texts = prompt_texts(runs, group[0])

    def row(prompt: str, change: float | None = None) -> Row:
        shown = [
            _picture(folders[m], f"{prompt}-{seeds[0]}.png", m, _captions(runs, values, prompt, m), amount)
            for m in models
        ]
        return Row(texts.get(prompt, f"prompt {prompt}"), shown, change)

    extremes = []
    for column in _shown(runs):
        changes = _changes(values, column, best, there)
        wins = [row(p, c) for p, c in changes[::-1][: amount.extremes] if column.sign * c > 0]
        losses = [row(p, c) for p, c in changes[: amount.extremes] if column.sign * c < 0]
        if wins or losses:
            extremes.append((column.name, wins, losses))
    trained = {m: int(first[m]) for m in models if m != BASE and m in first.index}
    return Gallery(models, [row(p) for p in there[: amount.rows]], extremes, int(seeds[0]), trained)


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


def _changes(values, column: Column, best: str, there: Sequence[str]) -> list[tuple[str, float]]:
    """(prompt, score of the best model minus the base's) for prompts with pictures, from the worst to the best."""
    metric = column.name
    if best == BASE or (metric, BASE) not in values or (metric, best) not in values:
        return []
    change = (values[(metric, best)] - values[(metric, BASE)]).loc[list(there)].dropna()
    change = change.sort_values(ascending=column.higher_is_better)
    return [(str(prompt), float(gain)) for prompt, gain in change.items()]


def _captions(runs: Runs, values, prompt: str, model: str) -> list[tuple[str, str]]:
    """What stands under a picture: the judge's utility, then the metrics."""
    found = []
    for column in _shown(runs):
        if (column.name, model) not in values:
            continue
        value = values[(column.name, model)].get(prompt)
        if value == value and value is not None:
            found.append((column.name, _written(value, column.decimals)))
    return found


def _written(value: float, decimals: int | None) -> str:
    """With the decimals that its metric declares, else three digits, or two decimals from 10 on."""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:#.3g}" if abs(value) < 10 else f"{value:.2f}"


def _picture(
    folder: Path | None, name: str, model: str, scores: list[tuple[str, str]], amount: Amount
) -> Picture | None:
    if folder is None or not (folder / name).is_file():
        return None
    try:
        uri, small = encode(folder / name, amount.side, amount.quality)
    except OSError:
        return None  # an image cut short by a full disk must not cost the page
    return Picture(model, uri, small, scores)


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
