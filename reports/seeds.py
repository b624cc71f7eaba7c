"""The mean of every training seed by itself: what intervals over trainings are made of, for whoever counts again."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.reports import stats, tables
from bench.reports.load import BASE, Runs

STAT = "seeds"
FORMATS = ("csv", "json")
COLUMNS = ["model", "train_seed", "prompt_set", "guidance", "metric", "value", "difference", "n_prompts", "protocol"]


def table(
    runs: Runs,
    prompt_set: str | None = None,
    guidance: float | None = None,
    metrics: Sequence[str] | None = None,
    protocol: str | None = None,
) -> pd.DataFrame:
    """One row for each model, training seed (none of the base), prompt set, guidance and metric.

    value: the mean over the prompts that all models have. difference: the mean of the paired differences to the base.
    The other arguments are those of `tables.table`.
    """
    protocol = protocol or tables.default_protocol(runs)
    tables.one_of(protocol, stats.PROTOCOLS, "protocol")
    chosen, rows = tables.chosen_metrics(runs, metrics), []
    for group in tables.chosen_groups(runs, prompt_set, guidance):
        scores = tables.group_scores(runs, group)
        data = stats.per_prompt(scores, protocol)
        for metric in (metric for metric in chosen if metric in scores.metrics):
            values = data[..., scores.metrics.index(metric)]
            there = np.isfinite(values).any(axis=2)
            prompts = (np.isfinite(values) | ~there[:, :, None]).all(axis=(0, 1))
            means = values[:, :, prompts].mean(axis=2)
            base = means[scores.models.index(BASE)] if BASE in scores.models else np.full(means.shape[1], np.nan)
            for model, seed in np.argwhere(there):
                untrained = scores.models[model] in scores.untrained
                if untrained and seed:
                    continue
                rows.append(
                    (
                        scores.models[model],
                        pd.NA if untrained else scores.train_seeds[seed],
                        *group,
                        metric,
                        means[model, seed],
                        np.nan if scores.models[model] == BASE else means[model, seed] - base[seed],
                        int(prompts.sum()),
                        protocol,
                    )
                )
    return pd.DataFrame(rows, columns=COLUMNS).astype({"train_seed": "Int64"})


def render(tidy: pd.DataFrame, format: str) -> str:
    """CSV or JSON rows: of so many numbers a person reads the intervals."""
    tables.one_of(format, FORMATS, f"--format of --stat {STAT}")
    if format == "csv":
        return tidy.to_csv(index=False, lineterminator="\n", float_format="%.8g")
    return json.dumps(json.loads(tidy.to_json(orient="records")), indent=1)
