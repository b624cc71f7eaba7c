"""Tables: tidy rows from runs, and their layouts for people, papers and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pandas as pd

from bench.errors import UsageError, did_you_mean
from reports import layouts, significance, stats
from reports.apart import Apart, told_apart
from reports.load import BASE, Runs

FORMATS = ("text", "csv", "md", "latex", "json")
JUDGE_PARTS = ("judge/utility", "judge/alignment", "judge/aesthetics")
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
    winrate over `against` (default base) in [0, 1]. metrics: names; "judge" stands for all judge readings,
    "average" for the paper's mean of raw scores, "average_z" for its scale-free variant; default all metrics
    and the judge's main readings. protocol: one, mean or best image of a prompt; default the suite's.
    With `against` there are values in p, p_holm (corrected over a model's metrics) and detectable, see
    `reports.significance`. spread: the metric's standard deviation between prompts (none for win rates). speaks_of:
    "checkpoints" with one training seed, else "methods". ahead: whether to mark the model, see `Apart.ahead`.
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
            setting.append(part.assign(
                prompt_set=group[0], guidance=group[1], metric=metric, speaks_of=told.speaks_of,
                spread=float("nan") if stat == "winrate" else told.spread, ahead=part["model"].isin(told.ahead),
            ))
        if not setting:
            continue
        rows = pd.concat(setting, ignore_index=True)
        parts.append(significance.annotate(rows) if against else rows)
    tidy = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
    # the same columns whatever is asked for, so that the rows of several tables fit into one file
    return tidy.assign(stat=stat, against=against or "", protocol=protocol).reindex(columns=COLUMNS + TESTED + TOLD)


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
        runs.arrays[group] = stats.gather(rows, list(runs.models), runs.evaluation.get("seeds") or ())
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
    """All metrics of the runs, judge readings last."""
    return sorted(runs.scores["metric"].unique(), key=stats.metric_order)


def averaged(runs: Runs) -> list[str]:
    """The two averages, where there are several metrics to average."""
    return list(stats.AVERAGES) if stats.averaged(metric_names(runs)) else []


def average_note(runs: Runs) -> str:
    """Which metrics the averages are of, for whoever reads one."""
    names = [layouts.metric_title(name) for name in stats.averaged(metric_names(runs))]
    return f"{' and '.join(layouts.metric_title(name) for name in stats.AVERAGES)} are those of {', '.join(names)}"


def lead_metric(runs: Runs) -> str:
    """What a verdict is about: the judge's utility where the world has a judge, else the first metric."""
    names = metric_names(runs)
    return JUDGE_PARTS[0] if JUDGE_PARTS[0] in names else names[0]


def one_of(value: str, options: Sequence[str], what: str) -> None:
    """Refuse what is not among the options, in one line."""
    if value not in options:
        raise UsageError(
            f"{what}: unknown '{value}'{did_you_mean(value, options)}; one of {', '.join(options)}"
        )


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
        return [name for name in names if not name.startswith(stats.JUDGE) or name in JUDGE_PARTS]
    chosen: list[str] = []
    for metric in metrics:
        if metric == "judge":
            chosen += [name for name in names if name.startswith(stats.JUDGE)]
            continue
        if metric in stats.AVERAGES and not averaged(runs):
            raise UsageError(f"metrics: {metric} is of at least two of {', '.join(stats.PAPER_METRICS)}; "
                             f"scored were {', '.join(names)}")
        one_of(metric, [*names, *stats.AVERAGES], "metrics")
        chosen.append(metric)
    return list(dict.fromkeys(chosen))
