"""What was found: the best setting of an iteration, how far it is ahead, and the table of everything tried."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial
from scipy import stats

from bench.reports.uncertainty import LEVEL, estimates
from bench.search import grids
from bench.search.grids import Setting
from bench.search.queue import Cell

FIRST = ["entry", "iteration"]
LAST = ["seed", "pairs", "utility", "gain"]
END = ["after", "identity"]


class Gap(NamedTuple):
    """The difference of the means of two settings, with its interval."""

    low: float
    high: float
    value: float
    over: str


@dataclass(frozen=True)
class Choice:
    """The best setting of an iteration by its mean over seeds, beside the next best."""

    best: Setting
    utility: float
    gain: float  # over the base model
    runner_up: Setting | None  # None where no other setting was trained to its end with every seed
    gap: Gap | None
    edges: dict[str, grids.Edge]  # where the grid must grow before this may be called chosen


def best(tried: Sequence[Setting], seeds: Sequence[int], done: Mapping[Cell, FrozenTrial]) -> list[Setting]:
    """The settings that every seed has tried, best first; of equal ones that which the grid names first."""
    whole = [setting for setting in tried if all(Cell(grids.text(setting), seed) in done for seed in seeds)]
    return sorted(whole, key=lambda setting: -_mean(trials_of(setting, seeds, done)))


def trials_of(setting: Setting, seeds: Sequence[int], done: Mapping[Cell, FrozenTrial]) -> list[FrozenTrial]:
    return [done[Cell(grids.text(setting), seed)] for seed in seeds]


def _mean(trials: Sequence[FrozenTrial]) -> float:
    return float(np.mean([trial.value for trial in trials]))


def choose(
    tried: Sequence[Setting],
    seeds: Sequence[int],
    done: Mapping[Cell, FrozenTrial],
    grid: Mapping[str, Sequence[Any]],
    ends: Mapping[str, grids.Side],
) -> Choice | None:
    """The choice among settings; None while one of them is not done with every seed."""
    ranked = best(tried, seeds, done)
    if len(ranked) < len(tried):
        return None
    first, second = trials_of(ranked[0], seeds, done), [trials_of(setting, seeds, done) for setting in ranked[1:2]]
    rival = next((trials for trials in second if np.isfinite(_mean(trials))), None)
    return Choice(
        ranked[0],
        _mean(first),
        float(np.mean([trial.user_attrs["gain"] for trial in first])),
        ranked[1] if rival else None,
        gap(first, rival) if rival else None,
        grids.edges(grid, ranked[0], ends),
    )


def gap(mine: Sequence[FrozenTrial], theirs: Sequence[FrozenTrial]) -> Gap:
    """How far one setting is ahead of another, each the trials of the same seeds: paired over prompts and seeds.

    Trials that came without scores of prompts leave a t interval over the differences of the seeds.
    """
    scores = [[trial.user_attrs.get("prompts") for trial in trials] for trials in (mine, theirs)]
    if None not in scores[0] + scores[1]:
        found = estimates((np.array(scores[0]) - np.array(scores[1]))[None])
        return Gap(float(found.low[0]), float(found.high[0]), float(found.value[0]), "prompts and seeds")
    differences = np.array([a.value - b.value for a, b in zip(mine, theirs, strict=True)])
    with warnings.catch_warnings():  # equal differences have no spread, and this interval no width
        warnings.simplefilter("ignore")
        found = stats.ttest_1samp(differences, 0).confidence_interval(LEVEL)
    value = float(differences.mean())
    low, high = (value if np.isnan(end) else float(end) for end in found)
    return Gap(low, high, value, "seeds alone")


def verdict(place: str, choice: Choice, metric: str, count: str) -> str:
    """One iteration's choice in one line, with what is not known about it."""
    chosen = "best so far" if choice.edges else "chosen"
    line = (
        f"{place}: {chosen} {grids.text(choice.best)}: {metric} {choice.utility:.4f}, {choice.gain:+.4f} over the "
        f"base; {count}"
    )
    if choice.gap is not None:
        low, high, value, over = choice.gap
        line += (
            f"; ahead of {grids.text(choice.runner_up)} by {value:.4f} [{low:.4f}, {high:.4f}] (over {over})"
            f"{'' if low > 0 else ', not told apart from this runner-up'}"
        )
    return line + (f"; NOT CHOSEN: {widening(choice)}" if choice.edges else "")


def widening(choice: Choice) -> str:
    """What to add to a grid whose best setting lies at an end of it."""
    return "the best lies at the edge of its grid, " + " and ".join(
        f"{name}={grids.digits(choice.best[name])} is the {edge.side}est (add {grids.digits(edge.further)})"
        for name, edge in choice.edges.items()
    )


def yaml_lines(chosen: Mapping[str, Sequence[Setting]]) -> str:
    """The lines that put what was chosen into the suite."""
    lines = ["methods:"]
    for entry, settings in chosen.items():
        lines += [f"  {entry}:", "    iterations:", *(f"      - {grids.flow(setting)}" for setting in settings)]
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Everything tried, a row each: where it belongs, its settings, its seed, what came of it, and what it followed."""
    names = list(dict.fromkeys(name for row in rows for name in row["setting"]))
    gains = list(dict.fromkeys(name for row in rows for name in row if name.startswith("gain_g")))
    flat = [{**row, **row["setting"]} for row in rows]
    return pd.DataFrame(flat, columns=[*FIRST, *names, *LAST, *gains, *END, "prompts"])


def settings_in(row: Mapping[str, Any]) -> Setting:
    """The setting in a row of such a table."""
    fixed = {*FIRST, *LAST, *END, "prompts", "chosen"}
    return {
        name: value
        for name, value in row.items()
        if name not in fixed and not name.startswith("gain_g") and not pd.isna(value)
    }
