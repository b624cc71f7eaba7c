"""Failure signatures: the known ways in which alignment goes wrong, each with the number it is judged by.

The limits are conventions, stated with every verdict; they sort what to look at first and prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from bench.methods.signals import Signal
from bench.reports import stats
from bench.reports.apart import ALPHA
from bench.reports.layouts import spoken_name
from bench.reports.load import BASE, Runs
from bench.reports.pictures import picture_folder
from bench.reports.signals import declared, ranges
from bench.reports.significance import holm
from bench.reports.tables import apart, default_protocol, group_scores

LEVELS = RED, AMBER, GREY, GREEN, UNKNOWN = "red", "amber", "grey", "green", "unknown"  # grey: chance alone can do it
DIVERSITY = (0.6, 0.8)  # of the base's: red below, amber below
END = 0.2  # the last fifth of an iteration's log is how it ended
PROMPTS = 48  # whose pictures are compared, in the order of their hash
SIDE = 32  # pixels of a picture's side when pictures are compared


@dataclass(frozen=True)
class Signature:
    """One verdict. number: what was measured, as shown; reading: what it means and where the limits are."""

    name: str
    model: str
    level: str
    number: str
    reading: str


def signatures(runs: Runs, group: tuple[str, float]) -> list[Signature]:
    """All verdicts, training first, then the pictures and scores of one prompt set and guidance."""
    trained = [model for model in runs.models if model != BASE]
    found = []
    signals = declared(runs.protocols.values())
    for check in _checks(signals):
        verdicts = [verdict for model in trained if (verdict := check(_ended(runs, model), model))]
        unknown = verdicts and all(verdict.level == UNKNOWN for verdict in verdicts)
        found += [replace(verdicts[0], model="all")] if unknown else verdicts
    found += _collapse(runs, group, trained)
    found += _gaming(runs, group, trained)
    return found


def _ended(runs: Runs, model: str) -> pd.DataFrame:
    """The last fifth of what a model's own iteration had logged by then, of all training seeds."""
    result, logged = runs.models[model], runs.history
    own = (logged["method"] == result.method) & (logged["iteration"] == result.iteration)
    rows = logged[own & (logged["step"] <= result.step)]
    if rows.empty:
        return rows
    first, last = rows["step"].min(), rows["step"].max()
    return rows[rows["step"] >= last - END * (last - first)]


def _mean(rows: pd.DataFrame, signal: str) -> float:
    return float(rows[signal].mean()) if signal in rows else float("nan")


def _checks(signals: dict[str, Signal]) -> Sequence[Callable[[pd.DataFrame, str], Signature | None]]:
    """What is looked at in a training: every signal with limits, then those that also have them by timestep."""
    limited = [signal for signal in signals.values() if signal.below or signal.above]
    return [partial(_limits, signals, signal) for signal in limited] + [
        partial(_timesteps, signal) for signal in limited if signal.by_timestep and signal.above
    ]


def _limits(signals: dict[str, Signal], signal: Signal, rows: pd.DataFrame, model: str) -> Signature | None:
    """Whether a signal ended within the limits that its method declares."""
    value = _mean(rows, signal.name)
    if np.isnan(value):
        return None
    level, reading, number = GREEN, signal.fine, _number(signal, value)
    if signal.below and value < signal.below.amber:
        red = _bound(rows, signal.below.red)
        level, reading = (RED, signal.below.red_reading) if not value >= red else (AMBER, signal.below.amber_reading)
    if signal.above and value > signal.above.amber:
        red = _bound(rows, signal.above.red)
        level, reading = (RED, signal.above.red_reading) if not value <= red else (AMBER, signal.above.amber_reading)
    for limit in (signal.below, signal.above):
        if limit and isinstance(limit.red, str) and not np.isnan(other := _mean(rows, limit.red)):
            number += f", {_number(signals[limit.red], other)}"
    return Signature(signal.verdict or signal.title, model, level, number, f"{reading} ({_green(signal)})")


def _bound(rows: pd.DataFrame, red: float | str) -> float:
    return _mean(rows, red) if isinstance(red, str) else red


def _number(signal: Signal, value: float) -> str:
    """A signal that starts at 0 with its sign."""
    return f"{signal.title} {value:+.2g}" if signal.start == 0 else f"{signal.title} {value:.2f}"


def _green(signal: Signal) -> str:
    low, high = (limit and f"{limit.amber:g}" for limit in (signal.below, signal.above))
    return f"green {low} to {high}" if low and high else f"green from {low}" if low else f"green up to {high}"


def _timesteps(signal: Signal, rows: pd.DataFrame, model: str) -> Signature | None:
    """With one weight for all timesteps a few of them may do all the learning, or all the damage."""
    assert signal.above is not None
    if np.isnan(_mean(rows, signal.name)):
        return None
    name, limit = "Unweighted timesteps", signal.above.amber
    places = ranges(rows, signal.name)
    found = {column: _mean(rows, column) for column in places}
    found = {column: value for column, value in found.items() if not np.isnan(value)}
    if len(found) < 2:
        return Signature(name, model, UNKNOWN, "not recorded", f"needs the {signal.title} by timestep in the history")
    worst = max(found, key=lambda column: found[column])
    low, high = places[worst]
    over = sum(value > limit for value in found.values())
    level = GREEN if not over else RED if over > len(found) / 2 else AMBER
    reading = f"{signal.title} is above {limit:g} in {over} of {len(found)} ranges of timesteps (green: in none)"
    return Signature(name, model, level, f"{found[worst]:+.2g} at timesteps {low} to {high}", reading)


def _collapse(runs: Runs, group: tuple[str, float], trained: list[str]) -> list[Signature]:
    """Diversity of a prompt's pictures over sampling seeds, against the base model's."""
    name = "Mode collapse"
    if len(group_scores(runs, group).image_seeds) < 2:
        return [Signature(name, "all", UNKNOWN, "one picture a prompt", "needs more than one sampling seed")]
    base = diversity(runs, group, BASE) if BASE in runs.models else {}
    found, chances = [], []
    for model in trained:
        own = diversity(runs, group, model) if base else {}
        both = [prompt for prompt in own if prompt in base and base[prompt] > 0]
        if not both:
            found.append(Signature(name, model, UNKNOWN, "no pictures", "needs pictures of several sampling seeds"))
            continue
        verdict, p = _narrowed(name, model, *(np.array([of[prompt] for prompt in both]) for of in (own, base)))
        found.append(verdict)
        chances.append(p)
    corrected = iter(holm(np.nan_to_num(chances, nan=1.0)))
    return [one if one.level == UNKNOWN else _unless_chance(one, next(corrected)) for one in found]


def _narrowed(name: str, model: str, own: np.ndarray, base: np.ndarray) -> tuple[Signature, float]:
    """The verdict on diversities [prompts] of a model and the base, and the p of their paired difference."""
    ratio = own.mean() / base.mean()
    _, (low,), (high,), (p,), _ = stats.estimates(((own - base) / base.mean())[None, None])
    level = GREEN if ratio >= DIVERSITY[1] else RED if ratio < DIVERSITY[0] else AMBER
    number = f"{ratio:.0%} [{1 + low:.0%}, {1 + high:.0%}] of the base's diversity"
    reading = (
        f"mean distance of pixels between a prompt's pictures, {len(own)} prompts "
        f"(green from {DIVERSITY[1]:.0%}, red below {DIVERSITY[0]:.0%})"
    )
    return Signature(name, model, level, number, reading), p


def _unless_chance(one: Signature, p: float) -> Signature:
    """Grey where a loss of diversity is not told from none, corrected for the number of models."""
    if one.level == GREEN or p < ALPHA:
        return one
    return replace(one, level=GREY, reading=f"not told apart from the base's, p {p:.2g} after Holm: {one.reading}")


def diversity(runs: Runs, group: tuple[str, float], model: str) -> dict[str, float]:
    """Prompt id -> root mean square difference, in [0, 1], between its pictures of different sampling seeds."""
    rows = runs.scores
    run = rows.loc[(rows["model"] == model) & (rows["prompt_set"] == group[0]), "run"]
    folder = picture_folder(runs.folders[run.iloc[0]], group, runs.models[model]) if len(run) else None
    if folder is None:
        return {}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")):
        found.setdefault(path.stem.rpartition("-")[0], []).append(path)
    several = [(prompt, paths) for prompt, paths in found.items() if len(paths) > 1][:PROMPTS]
    return {prompt: _spread(paths) for prompt, paths in several}


def _spread(paths: list[Path]) -> float:
    from PIL import Image

    pictures = []
    for path in paths:
        with Image.open(path) as opened:
            small = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
            pictures.append(np.asarray(small, np.float64) / 255)
    # the mean squared difference of all pairs is twice the unbiased variance
    return float(np.sqrt(2 * np.var(pictures, axis=0, ddof=1).mean()))


def _gaming(runs: Runs, group: tuple[str, float], trained: list[str]) -> list[Signature]:
    """A rewarded metric rises while one that was not rewarded, or the truth, falls."""
    scores, protocol = group_scores(runs, group), default_protocol(runs)
    if BASE not in scores.models:
        return []
    found = []
    for up, down in (("pickscore", "clip"), ("pickscore", "judge/utility")):
        if up not in scores.metrics or down not in scores.metrics:
            continue
        names = [spoken_name(scores.column(metric)) for metric in (up, down)]
        gains = [stats.compare(scores, metric, "mean", BASE, protocol).set_index("model") for metric in (up, down)]
        rewarded, other = (apart(runs, group, metric, "mean", protocol).beats for metric in (up, down))
        found += [
            _gamed(model, names, *(rows.loc[model] for rows in gains), BASE in rewarded[model], model in other[BASE])
            for model in trained
            if all(model in rows.index for rows in gains)
        ]
    return found


def _gamed(
    model: str, names: Sequence[str], rewarded: pd.Series, other: pd.Series, rises: bool, falls: bool
) -> Signature:
    """names: of what was rewarded, and of the other; rises, falls: whether they are told apart from the base so."""
    level, reading = GREEN, f"{names[1]} does not fall while {names[0]} rises"
    if rewarded["value"] > 0 > other["value"]:
        level, reading = RED if rises else AMBER, f"{names[0]} rises while {names[1]} falls"
        reading += "" if rises else ", the rise not told from chance"
        if not falls:
            level, reading = GREY, f"the fall of {names[1]} is not told from chance"
    number = ", ".join(
        f"{name} {row['value']:+.2g} [{row['low']:+.2g}, {row['high']:+.2g}]"
        for name, row in zip(names, (rewarded, other), strict=True)
    )
    return Signature(f"Metric gaming: {names[0]} against {names[1]}", model, level, number, f"{reading} (to base)")


def matrix(found: Sequence[Signature], models: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(signature, level for each model, "" where it does not apply), the worst first."""
    names = dict.fromkeys(one.name for one in found)
    level = {(one.name, one.model): one.level for one in found}
    rows = [(name, [level.get((name, m), level.get((name, "all"), "")) for m in models]) for name in names]
    return sorted(rows, key=lambda row: [-row[1].count(one) for one in LEVELS])


def worst_first(found: Sequence[Signature]) -> list[Signature]:
    return sorted(found, key=lambda one: LEVELS.index(one.level))
