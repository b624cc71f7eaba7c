"""Tables: tidy rows from runs, and their layouts for people, papers and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from bench.errors import UsageError, did_you_mean
from bench.metrics.columns import Column
from bench.reports import columns, layouts, significance, stats
from bench.reports.apart import Apart, told_apart
from bench.reports.load import BASE, Runs

FORMATS = ("text", "csv", "md", "latex", "json")
COLUMNS = [
    "model",
    "prompt_set",
    "guidance",
    "metric",
    "value",
    "low",
    "high",
    "n_prompts",
    "n_seeds",
    "stat",
    "against",
    "protocol",
]
TESTED = ["p", "p_holm", "detectable"]
TOLD = ["spread", "speaks_of", "ahead"]
DESCRIBED = ["title", "unit", "higher_is_better", "decimals", "truth"]


def table(
    runs: Runs,
    stat: str = "mean",
    against: str | None = None,
    prompt_set: str | None = None,
    guidance: float | None = None,
    metrics: Sequence[str] | None = None,
    protocol: str | None = None,
) -> pd.DataFrame:
    """One row for each model, prompt set, guidance and metric, with a paired 95 % interval.

    stat: mean or median of the scores, or, with `against`, of the per-prompt differences to that model;
    winrate over `against` (default base) in [0, 1]. metrics: names of columns; that of a metric stands for all of its
    columns, "average" for the paper's mean of raw scores, "average_z" for its scale-free variant; default all columns
    but details. protocol: one, mean or best image of a prompt; default the suite's.
    With `against` there are values in p, p_holm (corrected over a model's metrics) and detectable, see `significance`.
    spread: the metric's standard deviation between prompts (none for win rates). speaks_of:
    "checkpoints" with one training seed, else "methods". ahead: whether to mark the model, see `Apart.ahead`.
    DESCRIBED: of the metric's column, see `Column`.
    """
    one_of(stat, stats.STATS, "--stat")
    protocol = protocol or default_protocol(runs)
    one_of(protocol, stats.PROTOCOLS, "protocol")
    if stat == "winrate":
        against = against or BASE
    against = runs.resolve(against) if against else None
    groups = chosen_groups(runs, prompt_set, guidance)
    chosen = chosen_metrics(runs, metrics)
    parts = []
    for group in groups:
        scores, setting = group_scores(runs, group), []
        for metric in chosen:
            if metric not in scores.metrics or (against and against not in scores.models):
                continue
            part = stats.compare(scores, metric, stat, against, protocol)
            told = apart(runs, group, metric, stat, protocol)
            setting.append(
                part.assign(
                    prompt_set=group[0],
                    guidance=group[1],
                    metric=metric,
                    speaks_of=told.speaks_of,
                    spread=float("nan") if stat == "winrate" else told.spread,
                    ahead=part["model"].isin(told.ahead),
                    **{name: getattr(runs.column(metric), name) for name in DESCRIBED},
                )
            )
        if not setting:
            continue
        rows = pd.concat(setting, ignore_index=True)
        parts.append(significance.annotate(rows) if against else rows)
    tidy = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    # the same columns whatever is asked for, so that the rows of several tables fit into one file
    tidy = tidy.assign(stat=stat, against=against or "", protocol=protocol)
    return tidy.reindex(columns=COLUMNS + TESTED + TOLD + DESCRIBED)


def render(tidy: pd.DataFrame, format: str = "text") -> str:
    """Lay a tidy table out: text, md and latex side by side, those ahead marked; csv and json as tidy rows."""
    one_of(format, FORMATS, "--format")
    if format == "csv":
        return tidy.to_csv(index=False, lineterminator="\n", float_format="%.8g")
    if format == "json":
        rows = tidy.astype(object).where(tidy.notna(), None).to_dict("records")
        return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False)
    return layouts.render(tidy, format)


def default_protocol(runs: Runs) -> str:
    return runs.evaluation.get("protocol") or "mean"


def group_scores(runs: Runs, group: tuple[str, float]) -> stats.Scores:
    """The scores of one (prompt set, guidance) as an array, gathered once."""
    if group not in runs.arrays:
        rows = runs.scores
        rows = rows[(rows["prompt_set"] == group[0]) & (rows["guidance"] == group[1])]
        seeds = runs.evaluation.get("seeds") or ()
        runs.arrays[group] = stats.gather(rows, list(runs.models), runs.columns, seeds)
    return runs.arrays[group]


def apart(runs: Runs, group: tuple[str, float], metric: str, stat: str, protocol: str) -> Apart:
    """Which models of a setting are told apart, tested with all guidance scales of its prompt set; computed once."""
    key = (group[0], metric, stat, protocol)
    if key not in runs.arrays:
        family = [one for one in runs.groups if one[0] == group[0]]
        found = told_apart([group_scores(runs, one) for one in family], metric, stat, protocol)
        runs.arrays[key] = dict(zip(family, found, strict=True))
    return runs.arrays[key][group]


def metric_names(runs: Runs) -> list[str]:
    """All columns of the runs, in order."""
    return [column.name for column in runs.columns]


def averaged(runs: Runs) -> list[str]:
    """The two averages, where there are several metrics to average."""
    return list(stats.AVERAGES) if columns.averaged(runs.columns) else []


def average_note(runs: Runs) -> str:
    """Which metrics the averages are of, for whoever reads one."""
    names = [column.title for column in columns.averaged(runs.columns)]
    return f"{' and '.join(column.title for column in columns.AVERAGES)} are those of {', '.join(names)}"


def lead_column(runs: Runs) -> Column:
    """What a verdict is about."""
    return columns.lead(runs.columns)


def one_of(value: str, options: Sequence[str], what: str) -> None:
    """Refuse what is not among the options, in one line."""
    if value not in options:
        raise UsageError(f"{what}: unknown '{value}'{did_you_mean(value, options)}; one of {', '.join(options)}")


def chosen_groups(runs: Runs, prompt_set: str | None, guidance: float | None) -> list[tuple[str, float]]:
    groups = runs.groups
    chosen = [g for g in groups if prompt_set in (None, g[0]) and (guidance is None or g[1] == guidance)]
    if not chosen:
        there = ", ".join(f"{name} at guidance {scale:g}" for name, scale in groups)
        raise UsageError(
            f"no scores for prompt set {prompt_set or 'any'} at guidance "
            f"{'any' if guidance is None else f'{guidance:g}'}; there are {there}"
        )
    return chosen


def chosen_metrics(runs: Runs, metrics: Sequence[str] | None) -> list[str]:
    names = metric_names(runs)
    if not metrics:
        return [column.name for column in runs.columns if not column.detail]
    chosen: list[str] = []
    for metric in metrics:
        if several := [name for name in names if name.startswith(f"{metric}/")]:
            chosen += several
            continue
        if metric in stats.AVERAGES and not averaged(runs):
            raise UsageError(
                f"metrics: {metric} is of at least two of the paper's four scores; scored were {', '.join(names)}"
            )
        one_of(metric, [*names, *stats.AVERAGES], "metrics")
        chosen.append(metric)
    return list(dict.fromkeys(chosen))
