"""Several tests at once: p-values, which come from the model behind the intervals, corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.reports import stats


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction: the adjusted p-values, in the order given."""
    values = np.asarray(p, float)
    order = values.argsort(kind="stable")
    adjusted = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    found = np.empty_like(values)
    found[order] = adjusted
    return found


def annotate(rows: pd.DataFrame) -> pd.DataFrame:
    """A setting's rows of `stats.compare` for several metrics, with a column p_holm.

    Corrected over the metrics of a model that have a p; the averages, which repeat other metrics, are not in that
    family and have none.
    """
    found = rows.assign(p_holm=np.nan)
    family = ~found["metric"].isin(stats.AVERAGES) & found["p"].notna()
    for _, part in found[family].groupby("model", sort=False):
        found.loc[part.index, "p_holm"] = holm(part["p"])
    return found
