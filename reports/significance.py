"""Tests beside the intervals: is a difference real, and how small a one could have been seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from reports import stats

POWER = 0.8
DETECT = (1.959964 + 0.841621) / (2 * 1.959964)  # interval widths that 80 % power at 5 %, two-sided, asks for


def wilcoxon(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on per-prompt differences; zeros split between the sides."""
    from scipy.stats import wilcoxon as test

    differences = differences[np.isfinite(differences)]
    return float(test(differences, zero_method="zsplit").pvalue) if np.any(differences) else 1.0


def sign(differences: np.ndarray) -> float:
    """Two-sided p of the sign test, which asks only how often a model wins; ties are left out."""
    from scipy.stats import binomtest

    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: the adjusted p-values, in the order given."""
    values = np.asarray(p, float)
    order = values.argsort(kind="stable")
    adjusted = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    found = np.empty_like(values)
    found[order] = adjusted
    return found


def detectable(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The smallest true difference that a comparison this precise finds with 80 % power at the 5 % level.

    2.80 standard errors, the standard error read off the 95 % interval (3.92 of them), so that training seeds
    count exactly as they do in the interval.
    """
    return DETECT * (np.asarray(high) - np.asarray(low))


def annotate(
    tidy: pd.DataFrame, scores: stats.Scores, stat: str, against: str, protocol: str
) -> pd.DataFrame:
    """A setting's tidy rows of differences or win rates with columns p, p_holm and detectable.

    p: the sign test for win rates, else Wilcoxon's, over prompts, each prompt's difference averaged over
    training seeds (so it speaks of these seeds; the interval also of new ones). p_holm: corrected over the
    metrics of a model; the averages, which repeat other metrics, are not in that family and have none.
    """
    data = stats.per_prompt(scores, protocol)
    test = sign if stat == "winrate" else wilcoxon
    where = scores.models.index(against)

    def p(model: str, metric: str) -> float:
        column = data[..., scores.metrics.index(metric)]
        seeds = np.isfinite(column[[scores.models.index(model), where]]).any(axis=2).all(axis=0)
        return test((column[scores.models.index(model)] - column[where])[seeds].mean(axis=0))

    found = tidy.assign(
        p=[p(row.model, row.metric) for row in tidy.itertuples()],
        p_holm=np.nan,
        detectable=detectable(tidy["low"], tidy["high"]),
    )
    family = ~found["metric"].isin(stats.AVERAGES)
    for _, rows in found[family].groupby("model", sort=False):
        found.loc[rows.index, "p_holm"] = holm(rows["p"])
    return found
