"""Statistics over prompts: protocols, means, medians, win rates, differences, all with intervals.

The unit of everything is the prompt: models are compared on the same prompts (and the same sampling seeds),
so differences and win rates are taken per prompt before anything is averaged. Training seeds are a second, crossed
factor; how sure a number is says `bench.reports.uncertainty`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.metrics.columns import Column
from bench.reports import columns as described
from bench.reports.uncertainty import estimates

BOOTSTRAP_SEED = 20240216
PROTOCOLS = ("one", "mean", "best")
STATS = ("mean", "median", "winrate")
AVERAGE, ZSCORE = AVERAGES = tuple(column.name for column in described.AVERAGES)


class Estimate(NamedTuple):
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """All scores of one prompt set at one guidance, as an array.

    values: [models, training seeds, prompts, sampling seeds, columns], NaN where there is none. A model that
    is not trained (the base) has its scores under every training seed and counts as one seed.
    """

    models: tuple[str, ...]
    train_seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    image_seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    untrained: frozenset[str]
    values: np.ndarray

    @property
    def metrics(self) -> tuple[str, ...]:
        """The columns' names."""
        return tuple(column.name for column in self.columns)

    def column(self, metric: str) -> Column:
        return self.columns[self.metrics.index(metric)]


def gather(
    rows: pd.DataFrame, models: Sequence[str], columns: Sequence[Column], image_seeds: Sequence[int] = ()
) -> Scores:
    """Long rows (model, train_seed, prompt_id, seed, metric, value), in any order, as an array.

    train_seed is NA for untrained models. `columns` describes what the rows may have in metric, in the order of tables.
    `image_seeds` gives the order of the sampling seeds ("one" is the first). The last columns are the scale-free mean
    z-score and the paper's "Average" of the raw scores, where there are scores to average, see `columns.averaged`.
    """
    present = set(rows["model"].unique())
    models = [model for model in models if model in present]
    train_seeds = sorted(int(seed) for seed in rows["train_seed"].dropna().unique()) or [0]
    prompts = sorted(rows["prompt_id"].unique())
    known = {int(seed) for seed in rows["seed"].unique()}
    seeds = [s for s in image_seeds if s in known] + sorted(known - set(image_seeds))
    there = set(rows["metric"].unique())
    columns = [column for column in columns if column.name in there]
    metrics = [column.name for column in columns]
    values = np.full((len(models), len(train_seeds), len(prompts), len(seeds), len(metrics)), np.nan)
    seed_at = pd.Index(train_seeds).get_indexer(rows["train_seed"].fillna(train_seeds[0]).astype("int64"))
    values[
        _positions(rows["model"], models),
        seed_at,
        _positions(rows["prompt_id"], prompts),
        _positions(rows["seed"], seeds),
        _positions(rows["metric"], metrics),
    ] = rows["value"].to_numpy()
    untrained = frozenset(rows.loc[rows["train_seed"].isna(), "model"].unique())
    for index, model in enumerate(models):
        if model in untrained:
            values[index] = values[index, :1]
    if of := [columns.index(column) for column in described.averaged(columns)]:
        averages = [_standardised(values[..., of]).mean(axis=-1), values[..., of].mean(axis=-1)]
        values = np.concatenate([values, np.stack(averages, axis=-1)], axis=-1)
        columns += [described.ZSCORE, described.AVERAGE]
    return Scores(tuple(models), tuple(train_seeds), tuple(prompts), tuple(seeds), tuple(columns), untrained, values)


def _positions(column: pd.Series, values: Sequence) -> np.ndarray:
    return pd.Index(values).get_indexer(column)


def _standardised(values: np.ndarray) -> np.ndarray:
    """Scores as distances from the first model's (the base's) mean over images, in its standard deviations."""
    first = np.ma.masked_invalid(values[0].reshape(-1, values.shape[-1]))
    spread = first.std(axis=0).filled(np.nan)
    return (values - first.mean(axis=0).filled(np.nan)) / np.where(spread > 0, spread, np.nan)


def per_prompt(scores: Scores, protocol: str) -> np.ndarray:
    """Reduce the images of a prompt to one value: [models, training seeds, prompts, metrics].

    one: the first sampling seed. mean: the mean over sampling seeds. best: all scores of the image with the
    highest average of raw scores (the paper's best of 5), or, where there is none, best first score; NaN
    where no image of the prompt has what is selected by.
    """
    values = scores.values
    if protocol == "one" or values.shape[3] == 1:
        return values[:, :, :, 0]
    if protocol == "mean":
        return values.mean(axis=3)
    chosen = scores.metrics.index(AVERAGE) if AVERAGE in scores.metrics else 0
    key = scores.columns[chosen].sign * values[..., chosen]
    best = np.where(np.isnan(key), -np.inf, key).argmax(axis=3)
    found = np.take_along_axis(values, best[..., None, None], axis=3)[:, :, :, 0]
    return np.where(np.isnan(key).all(axis=3)[..., None], np.nan, found)


def wins(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 where a beats b, 0 where it loses, 0.5 for a tie."""
    return (a > b) + 0.5 * (a == b)


@lru_cache(maxsize=8)
def resample_counts(n: int, resamples: int) -> np.ndarray:
    """How often each prompt is in each resample, float32 [n, resamples].

    The same for every model and metric of n prompts, which is what makes `agreement`'s intervals paired; and a
    resampled mean is then one matrix product.
    """
    rng = np.random.default_rng([BOOTSTRAP_SEED, n])
    draws = (rng.integers(0, n, n, dtype=np.int32) for _ in range(resamples))
    return np.stack([np.bincount(draw, minlength=n).astype(np.float32) for draw in draws], axis=1)


def compare(
    scores: Scores, metric: str, stat: str = "mean", against: str | None = None, protocol: str = "mean"
) -> pd.DataFrame:
    """One metric of every model: model, value, low, high, n_prompts, n_seeds, p, detectable.

    mean, median: of the scores, or with `against` of the per-prompt differences to that model. winrate: share of
    prompts on which a model beats `against`, ties half; where less is better, by less. Trained models are paired on
    equal training seeds, and only prompts that every model has count. p and detectable (see `Estimates`) are NaN
    without `against`.
    """
    data = per_prompt(scores, protocol)[..., scores.metrics.index(metric)]
    sign = scores.column(metric).sign
    present = np.isfinite(data).any(axis=2)
    complete = (np.isfinite(data) | ~present[:, :, None]).all(axis=(0, 1))
    found = []
    for index, model in enumerate(scores.models):
        seeds = present[index]
        if against is not None:
            if model == against:
                continue
            other = scores.models.index(against)
            seeds = seeds & present[other]
        if model in scores.untrained and (against is None or against in scores.untrained):
            seeds = seeds & (np.arange(len(seeds)) == 0)
        series = data[index][seeds][:, complete]
        if not series.size:
            continue
        if against is not None:
            reference = data[other][seeds][:, complete]
            series = wins(sign * series, sign * reference) if stat == "winrate" else series - reference
        found.append((model, series))
    columns = ["model", "value", "low", "high", "n_prompts", "n_seeds", "p", "detectable"]
    rows = pd.DataFrame(_grouped(found, stat), columns=columns)
    return rows if against is not None else rows.assign(p=np.nan, detectable=np.nan)


def _grouped(found: list[tuple[str, np.ndarray]], stat: str) -> list[tuple]:
    """Rows of `compare`, models with equally many training seeds estimated together."""
    rows: dict[str, tuple] = {}
    for shape in {series.shape for _, series in found}:
        same = [(model, series) for model, series in found if series.shape == shape]
        estimated = estimates(np.stack([series for _, series in same]), stat)
        for (model, _), *numbers in zip(same, *estimated, strict=True):
            rows[model] = (model, *numbers[:3], shape[1], shape[0], *numbers[3:])
    return [rows[model] for model, _ in found]
