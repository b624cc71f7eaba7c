"""Which models are told apart: all pairs of them, tested together.

Two models are told apart by a metric when the p-value of their paired difference, after Holm's correction over all
pairs of models at all guidance scales of the prompt set, is below 0.05, and the difference is more than a rounding
error, that is, at least a hundredth of the metric's standard deviation between prompts. The family is what one headline
speaks of: of equal models it says in 95 of 100 cases that none is told apart, however many models and scales there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd

from bench.reports import stats
from bench.reports.significance import holm

ALPHA = 0.05
NEGLIGIBLE = 0.01  # standard deviations between prompts; a twentieth of what is called a small effect (Cohen 1988)
CHECKPOINTS, METHODS = "checkpoints", "methods"
RULE = (
    f"Told apart: p < {ALPHA:g} after Holm over all pairs of models at all guidance scales of the prompt set, and a "
    f"difference of at least {NEGLIGIBLE:g} standard deviations between prompts."
)


@dataclass(frozen=True)
class Apart:
    """The pairs of one setting by one metric and statistic.

    models: those with a value, in the order of every table. pairs: one row each, with first, second, value (first
    against second), low, high, n_seeds, p, p_holm and better (the name, "" where the two are not told apart).
    n_seeds: the fewest training seeds that any pair shares. spread: standard deviation of the metric between prompts.
    """

    models: tuple[str, ...]
    pairs: pd.DataFrame
    n_seeds: int
    spread: float

    @property
    def speaks_of(self) -> str:
        """What sentences are about: one training seed shows these checkpoints, several show their methods."""
        return METHODS if self.n_seeds > 1 else CHECKPOINTS

    @cached_property
    def beats(self) -> dict[str, frozenset[str]]:
        """Model -> the models it is told apart above."""
        found: dict[str, set[str]] = {model: set() for model in self.models}
        for row in self.pairs[self.pairs["better"] != ""].itertuples():
            found[row.better].add(row.second if row.better == row.first else row.first)
        return {model: frozenset(others) for model, others in found.items()}

    @cached_property
    def ahead(self) -> list[str]:
        """Models that no model is told apart above and that are told apart above at least one: what a table marks."""
        beaten = frozenset().union(*self.beats.values())
        return [model for model in self.models if self.beats[model] and model not in beaten]

    def alike(self, order: Sequence[str]) -> list[list[str]]:
        """The largest groups within which no two models are told apart, as in a compact letter display.

        Two models that are in no group together are told apart. order: of models in a group, and of groups.
        """
        import networkx

        unclear = networkx.Graph()
        unclear.add_edges_from(
            (a, b) for a, b in combinations(self.models, 2) if b not in self.beats[a] and a not in self.beats[b]
        )
        groups = [sorted(group, key=order.index) for group in networkx.find_cliques(unclear)]
        return sorted(groups, key=lambda group: [order.index(model) for model in group])


def told_apart(settings: Sequence[stats.Scores], metric: str, stat: str, protocol: str) -> list[Apart]:
    """One `Apart` a setting, its pairs corrected over all of `settings`; winrate: first over second, even at 0.5."""
    every = pd.concat(
        [_pairs(scores, metric, stat, protocol).assign(setting=i) for i, scores in enumerate(settings)],
        ignore_index=True,
    )
    known = every["p"].notna()
    every.loc[known, "p_holm"] = holm(every.loc[known, "p"])
    clear = (every["p_holm"] < ALPHA) & (every["size"] >= NEGLIGIBLE)
    # a win rate knows which way is better already
    upwards = stat == "winrate" or all(s.column(metric).higher_is_better for s in settings if metric in s.metrics)
    higher = (every["value"] > _even(stat)) == upwards
    every["better"] = every["first"].where(higher, every["second"]).where(clear, "")
    found = []
    for i, scores in enumerate(settings):
        pairs = every[every["setting"] == i].drop(columns=["setting", "size"]).reset_index(drop=True)
        data = _data(scores, metric, protocol)
        there = tuple(m for m, part in zip(scores.models, data, strict=True) if np.isfinite(part).any())
        seeds = int(pairs["n_seeds"].min()) if len(pairs) else len(scores.train_seeds)
        found.append(Apart(there, pairs, seeds, _spread(data)))
    return found


def _even(stat: str) -> float:
    return 0.5 if stat == "winrate" else 0.0


def _data(scores: stats.Scores, metric: str, protocol: str) -> np.ndarray:
    """[models, training seeds, prompts], empty where the setting lacks the metric."""
    if metric not in scores.metrics:
        return np.empty((len(scores.models), 0, 0))
    return stats.per_prompt(scores, protocol)[..., scores.metrics.index(metric)]


def _spread(data: np.ndarray) -> float:
    """Standard deviation between prompts within a model, mean over models and training seeds."""
    if not data.size:
        return float("nan")
    return float(np.ma.filled(np.ma.masked_invalid(data).std(axis=2).mean(), np.nan))


def _pairs(scores: stats.Scores, metric: str, stat: str, protocol: str) -> pd.DataFrame:
    """Every pair once, the later model against the earlier: its estimate, p, and size in standard deviations."""
    columns = ["first", "second", "value", "low", "high", "n_seeds", "p", "p_holm", "size"]
    found = [pd.DataFrame(columns=columns).astype(dict.fromkeys(columns[2:], float))]
    data = _data(scores, metric, protocol)
    spread = _spread(data)
    for place, second in enumerate(scores.models[:-1] if data.size else ()):
        rows = stats.compare(scores, metric, stat, second, protocol).rename(columns={"model": "first"})
        rows = rows[rows["first"].isin(scores.models[place + 1 :])]
        if rows.empty:
            continue
        size = rows["value"].abs()
        if stat == "winrate":  # says how often, never by how much
            size = pd.Series([_typical(data[scores.models.index(m)], data[place]) for m in rows["first"]], rows.index)
        size = size / spread if spread > 0 else np.sign(size) * np.inf
        found.append(rows.assign(second=second, p_holm=np.nan, size=size)[columns])
    return pd.concat(found[1:] or found, ignore_index=True)


def _typical(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square of the differences, prompt by prompt."""
    return float(np.sqrt((np.ma.masked_invalid(first - second) ** 2).mean()))
