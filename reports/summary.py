"""The comparison so far as text: what a run ends with in the terminal."""

from __future__ import annotations

import pandas as pd

from bench.reports import layouts, tables
from bench.reports.apart import CHECKPOINTS, RULE, Apart
from bench.reports.layouts import folded
from bench.reports.load import BASE, Runs
from bench.reports.verdict import Verdict, headline, verdicts

NOTES = (f"{layouts.INTERVAL} What is clear is by the first metric; ^ v: told apart above, below {BASE}.", RULE)


def summary(runs: Runs) -> str:
    """The headline, then each setting: the lead metric with intervals, the others as numbers, and what is clear."""
    found = verdicts(runs)
    by_group = {one.group: one for one in found}
    blocks = [folded(headline(found) + ".")]
    blocks += [_block(runs, by_group[group]) for group in runs.groups]
    notes = [*NOTES, *([layouts.ONE_SEED] if any(one.speaks_of == CHECKPOINTS for one in found) else [])]
    blocks.append([line for note in notes for line in folded(note)] + [f"note: {problem}" for problem in runs.problems])
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


def _block(runs: Runs, verdict: Verdict) -> list[str]:
    """Lines of one setting."""
    group, lead = verdict.group, verdict.metric
    scores, protocol = tables.group_scores(runs, group), tables.default_protocol(runs)
    shown = [
        column
        for column in runs.columns
        if column in scores.columns and column.name != lead and not (column.truth or column.detail)
    ]
    others = [column.name for column in shown]
    plain = {name: tables.table(runs, "mean", None, *group, [name], protocol) for name in (lead, *others)}
    gain = tables.table(runs, "mean", BASE, *group, [lead], protocol) if BASE in scores.models else None
    header = [
        "model",
        verdict.title,
        *(["difference to base"] if gain is not None else []),
        *(column.heading for column in shown),
    ]
    columns = [list(scores.models), _bracketed(plain[lead], scores.models)]
    columns += [_bracketed(gain, scores.models, "+")] if gain is not None else []
    columns += [
        _arrowed(plain[name], tables.apart(runs, group, name, "mean", protocol), scores.models) for name in others
    ]
    clear = " · ".join(f"{what}: {models}" for what, models in verdict.listing.items())
    lines = layouts.wrapped(header, [list(row) for row in zip(*columns, strict=True)])
    return [" · ".join(layouts.setting(plain[lead])), *lines, *folded(clear)]


def _bracketed(rows: pd.DataFrame, models: tuple[str, ...], sign: str = "") -> list[str]:
    places, by = layouts.column_digits(rows), rows.set_index("model")
    return [
        f"{layouts.number(by.loc[m, 'value'], places, sign)} "
        f"{layouts.interval(by.loc[m, 'low'], by.loc[m, 'high'], places, sign)}"
        if m in by.index
        else "-"
        for m in models
    ]


def _arrowed(rows: pd.DataFrame, apart: Apart, models: tuple[str, ...]) -> list[str]:
    """Means, with an arrow up where told apart as better than the base, down as worse."""
    places, values = layouts.column_digits(rows), rows.set_index("model")["value"]
    better = {model for model, beaten in apart.beats.items() if BASE in beaten}
    worse = apart.beats.get(BASE, ())
    return [
        layouts.number(values[m], places) + (" ^" if m in better else " v" if m in worse else "")
        if m in values.index
        else "-"
        for m in models
    ]
