"""The result tables of the SPIN-Diffusion paper (arXiv 2402.10210), in its layout, from measured runs.

Tables 1 to 4 are the Pick-a-Pic test prompts, 7 and 8 PartiPrompts, 9 and 10 the prompts of HPSv2. In a suite
without these, its own prompt sets take their places in order, and are named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.errors import UsageError
from bench.reports import layouts, stats
from bench.reports.load import BASE, Runs
from bench.reports.published import PAPER, Published, published
from bench.reports.tables import FORMATS, apart, group_scores, one_of

COLUMNS = {
    "hpsv2": "HPS",
    "aesthetic": "Aesthetic",
    "imagereward": "ImageReward",
    "pickscore": "PickScore",
    stats.AVERAGE: "Average",
}
RIVAL = "Diffusion-DPO (reproduced)"
ROWS = {
    "SD-1.5": (BASE, 0),
    "SFT (reproduced)": ("sft", None),
    "Diffusion-DPO": None,  # the checkpoint its authors released, which no run here is
    RIVAL: ("diffusion_dpo", None),
    "SPIN-Diffusion-Iter1": ("spin", 1),
    "SPIN-Diffusion-Iter2": ("spin", 2),
    "SPIN-Diffusion-Iter3": ("spin", 3),
}
SETS = (("Pick-a-Pic", "pick"), ("PartiPrompts", "parti"), ("HPSv2", "hps"))
WHAT = {"mean": "mean", "median": "median", "winrate": "win rate, %,"}
NOTHING = Published(float("nan"), "", "", "", "")
IMAGES, GUIDANCE = 5, 7.5  # the paper's protocol: best of five images at guidance 7.5


@dataclass(frozen=True)
class Kind:
    """What a table of the paper shows: statistic, row it is compared with, and which of its prompt sets."""

    stat: str
    prompts: int
    against: str | None = None


TABLES = {
    1: Kind("mean", 0),
    2: Kind("median", 0),
    3: Kind("winrate", 0, "SD-1.5"),
    4: Kind("winrate", 0, RIVAL),
    7: Kind("mean", 1),
    8: Kind("median", 1),
    9: Kind("mean", 2),
    10: Kind("median", 2),
}


@dataclass(frozen=True)
class PaperTable:
    """One table. rows: paper's row, measured model's label ("" if none), metric, the estimate (NaN if none)
    and the published cell; notes: what every reader has to know about the numbers."""

    number: int
    title: str
    tidy: pd.DataFrame
    notes: list[str]


def available(runs: Runs) -> list[int]:
    """The tables these runs have prompts and models for."""
    return [number for number in TABLES if _missing(runs, number) is None]


def build(runs: Runs, number: int, guidance: float | None = None, protocol: str | None = None) -> PaperTable:
    """One of the paper's tables. guidance: default the suite's highest; protocol: default the paper's best."""
    kind = _kind(number)
    missing = _missing(runs, number)
    if missing:
        raise UsageError(f"--paper {number}: {missing}")
    name = _prompt_set(runs, kind.prompts)
    scales = [scale for found, scale in runs.groups if found == name]
    scale = max(scales) if guidance is None else guidance
    if scale not in scales:
        raise UsageError(f"--guidance: {name} was sampled at {', '.join(f'{s:g}' for s in scales)}, not {scale:g}")
    scores = group_scores(runs, (name, scale))
    protocol = protocol or ("best" if len(scores.image_seeds) > 1 else "one")
    one_of(protocol, stats.PROTOCOLS, "--protocol")
    tidy = _cells(runs, number, (name, scale), protocol).assign(prompt_set=name, guidance=scale, protocol=protocol)
    over = f" over {_measured(runs)[kind.against]}, ties half," if kind.against else ""
    place = SETS[kind.prompts][0]
    title = f"Table {number} of the paper: {WHAT[kind.stat]}{over} on prompt set {name}"
    if SETS[kind.prompts][1] not in name.casefold():
        title += f" (in the place of {place})"
    return PaperTable(number, title, tidy, _notes(runs, tidy, scores))


def published_only(number: int) -> PaperTable:
    """One of the paper's tables without any run: its published cells, as far as they are verified."""
    kind, known = _kind(number), published()
    rows = [
        _row(number, row, "", metric, None, known.get((number, row, metric), NOTHING))
        for metric in COLUMNS
        for row in ROWS
        if row != kind.against
    ]
    over = f" over {kind.against}" if kind.against else ""
    place = SETS[kind.prompts][0]
    title = f"Table {number} of the paper: {WHAT[kind.stat]}{over} on the prompts of {place}, as published"
    tidy = pd.DataFrame(rows).assign(prompt_set="", guidance=float("nan"), protocol="")
    return PaperTable(number, title, tidy, ["Measured: nothing; there is no run.", *_published_notes(tidy)])


def _kind(number: int) -> Kind:
    if number not in TABLES:
        raise UsageError(f"--paper: no table {number}; there are {', '.join(map(str, TABLES))}")
    return TABLES[number]


def _missing(runs: Runs, number: int) -> str | None:
    kind = TABLES[number]
    if _prompt_set(runs, kind.prompts) is None:
        there = ", ".join(dict.fromkeys(name for name, _ in runs.groups))
        return f"no prompt set here takes the place of {SETS[kind.prompts][0]}; there is {there}"
    if kind.against and not _measured(runs).get(kind.against):
        return f"it compares with {kind.against}, which no run here is"
    return None


def _prompt_set(runs: Runs, position: int) -> str | None:
    """The suite's set of that name, else the first, second or third of those that stand for no other one."""
    names = list(dict.fromkeys(name for name, _ in runs.groups))
    named = {i: next((n for n in names if word in n.casefold()), None) for i, (_, word) in enumerate(SETS)}
    if named[position]:
        return named[position]
    if any(named.values()):
        return None
    return names[position] if position < len(names) else None


def _measured(runs: Runs) -> dict[str, str]:
    """Paper's row -> label of the measured model; models the paper has no row for come last, as themselves."""
    found = {}
    for row, wanted in ROWS.items():
        method, iteration = wanted or ("", None)
        labels = [
            label
            for label, result in runs.models.items()
            if result.method == method and iteration in (None, result.iteration)
        ]
        found[row] = labels[-1] if labels else ""
    return found | {label: label for label in runs.models if label not in found.values()}


def _cells(runs: Runs, number: int, group: tuple[str, float], protocol: str) -> pd.DataFrame:
    kind, measured, known, scores = TABLES[number], _measured(runs), published(), group_scores(runs, group)
    against = measured[kind.against] if kind.against else None
    rows = []
    for metric in COLUMNS:
        found = {}
        told = apart(runs, group, metric, kind.stat, protocol)
        if metric in scores.metrics:
            part = stats.compare(scores, metric, kind.stat, against, protocol)
            found = {row.model: row for row in part.itertuples()}
        for row, label in measured.items():
            if row == kind.against:
                continue
            printed = known.get((number, row, metric), NOTHING)
            ahead = label in found and label in told.ahead
            rows.append(
                _row(number, row, label, metric, found.get(label), printed)
                | {"speaks_of": told.speaks_of, "ahead": ahead, "against": against or ""}
            )
    return pd.DataFrame(rows)


def _row(number: int, row: str, label: str, metric: str, cell: Any, printed: Published) -> dict[str, Any]:
    """A cell of the tidy table: the estimate (None: not measured) beside the published value."""
    stat = TABLES[number].stat
    scale = 100 if stat == "winrate" else 1
    return {
        "table": number,
        "row": row,
        "model": label,
        "metric": metric,
        **{n: scale * getattr(cell, n, float("nan")) for n in ("value", "low", "high")},
        "n_prompts": getattr(cell, "n_prompts", 0),
        "n_seeds": getattr(cell, "n_seeds", 0),
        "speaks_of": "",
        "ahead": False,
        "stat": stat,
        "against": "",
        "published": printed.value,
        "published_text": printed.text,
        "published_kind": printed.kind,
        "published_protocol": printed.protocol,
        "published_source": printed.source,
    }


def _notes(runs: Runs, tidy: pd.DataFrame, scores: stats.Scores) -> list[str]:
    first = tidy.iloc[0]
    there = [COLUMNS[name] for name in COLUMNS if name in scores.metrics and name != stats.AVERAGE]
    gone = [COLUMNS[name] for name in COLUMNS if name not in scores.metrics and name != stats.AVERAGE]
    chosen_by = "average" if stats.AVERAGE in scores.metrics else layouts.spoken_name(scores.columns[0])
    done = tidy[tidy["n_prompts"] > 0]
    images = len(scores.image_seeds)
    reading = {
        "one": "one image a prompt",
        "mean": f"mean of {images} images a prompt",
        "best": f"of {images} images a prompt the one with the highest {chosen_by}",
    }[first["protocol"]]
    weights = runs.protocol.get("suite", {}).get("model", {}).get("weights", "unknown")
    prompts = layouts.span(done["n_prompts"]) if len(done) else "no"
    notes = [
        f"Measured: base model {weights}, {prompts} prompts of {first['prompt_set']}, guidance "
        f"{first['guidance']:g}, {reading}; {layouts.about(tidy)}.",
        *layouts.notes(tidy, "Marked"),
    ]
    if gone and there:
        average = f"Average is that of {' and '.join(there)} alone" if len(there) > 1 else "so there is no Average"
        notes.append(f"Not measured: {', '.join(gone)}; {average}.")
    notes += _published_notes(tidy)
    differences = _differences(weights, first, images) if tidy["published"].notna().any() else []
    if differences:  # first, so that nobody compares before reading it
        notes.insert(0, f"Not comparable with the published values: {'; '.join(differences)}.")
    return notes


def _published_notes(tidy: pd.DataFrame) -> list[str]:
    printed = tidy[tidy["published"].notna()]
    if printed.empty:
        return ["None of this table's published values could be verified, so none is shown."]
    notes = [
        f"Published, in parentheses or columns of their own: {PAPER}, {printed['published_protocol'].iloc[0]}. "
        "Cells without one have no verified published value."
    ]
    derived = printed[printed["published_kind"] != "verbatim"]
    if len(derived):
        notes.append("† derived: " + "; ".join(dict.fromkeys(derived["published_source"])) + ".")
    return notes


def _differences(weights: str, first: pd.Series, images: int) -> list[str]:
    """How the measured protocol differs from the paper's."""
    found = []
    if "stable-diffusion-v1-5" not in str(weights):
        found.append(f"base model {weights}, not SD-1.5" + (" (its scorers are small ones too)" * (weights == "mini")))
    if SETS[TABLES[first["table"]].prompts][1] not in first["prompt_set"].casefold():
        found.append(f"other prompts ({first['prompt_set']})")
    if first["guidance"] != GUIDANCE:
        found.append(f"guidance {first['guidance']:g}, not {GUIDANCE:g}")
    if first["protocol"] != "best" or images != IMAGES:
        found.append(f"{first['protocol']} of {images}, not best of {IMAGES}")
    return found


def grid(tidy: pd.DataFrame) -> tuple[list[str], list[tuple[str, str, list[tuple[str, str, bool, str]]]]]:
    """Header, and for each row (paper's name, measured label, cells of value, interval, ahead, published)."""
    rows: dict[str, list] = {row: [] for row in tidy["row"].unique()}
    labels = dict(zip(tidy["row"], tidy["model"], strict=True))
    for _, part in tidy.groupby("metric", sort=False):
        places = layouts.column_digits(part[part["value"].notna()])
        for cell in part.itertuples():
            value = interval = ""
            if cell.value == cell.value:
                value, interval = layouts.number(cell.value, places), layouts.interval(cell.low, cell.high, places)
            printed = cell.published_text + "†" * (cell.published_kind == "derived")
            rows[cell.row].append((value, interval, cell.ahead, printed))
    return [COLUMNS[m] for m in tidy["metric"].unique()], [(row, labels[row], c) for row, c in rows.items()]


def render(table: PaperTable, format: str) -> str:
    """The table as text, md or latex in the paper's layout, or as tidy csv or json rows."""
    one_of(format, FORMATS, "--format")
    if format == "csv":
        return table.tidy.to_csv(index=False, lineterminator="\n")
    if format == "json":
        rows = table.tidy.astype(object).where(table.tidy.notna(), None).to_dict("records")
        return json.dumps(
            {"title": table.title, "notes": table.notes, "rows": rows}, indent=1, ensure_ascii=False, allow_nan=False
        )
    return {"text": _text, "md": _markdown, "latex": _latex}[format](table) + "\n"


def _text(table: PaperTable) -> str:
    header, rows = grid(table.tidy)

    def cell(value: str, interval: str, ahead: bool, printed: str) -> str:
        marked = value and value + ("*" if ahead else " ")
        return " ".join(part for part in (marked, interval, printed and f"({printed})") if part) or "-"

    body = [[row, label or "-", *(cell(*c) for c in cells)] for row, label, cells in rows]
    lines = layouts.wrapped(["paper's row", "measured", *header], body, 2)
    return "\n".join([table.title, *lines, *table.notes])


def _markdown(table: PaperTable) -> str:
    header, rows = grid(table.tidy)
    clean = layouts.markdown_text

    def cell(value: str, interval: str, ahead: bool, printed: str) -> str:
        marked = f"**{value}**" if ahead else value
        return " ".join(part for part in (marked, interval, printed and f"({printed})") if part)

    lines = [[clean(row), clean(label), *(cell(*c) for c in cells)] for row, label, cells in rows]
    drawn = ["| " + " | ".join(line) + " |" for line in [["paper's row", "measured", *header], *lines]]
    rule = "| --- | --- |" + " ---: |" * len(header)
    notes = [f"- {clean(note)}" for note in table.notes]
    return "\n".join([f"**{clean(table.title)}**", "", drawn[0], rule, *drawn[1:], "", *notes])


def _latex(table: PaperTable) -> str:
    """Two lines a row: values with the published ones in parentheses, then intervals. Needs no package."""
    header, rows = grid(table.tidy)
    clean = layouts.latex_text
    lines = [" & ".join(["", *header])]
    for row, label, cells in rows:
        marked = [layouts.bold(c[0]) if c[2] else c[0] or "--" for c in cells]
        printed = [f" ({clean(c[3])})" if c[3] else "" for c in cells]
        lines.append(" & ".join([clean(row), *map("".join, zip(marked, printed, strict=True))]))
        if label:
            small = [f"measured: {clean(label)}", *(c[1] for c in cells)]
            lines.append(" & ".join(rf"{{\tiny {text}}}" if text else "" for text in small))
    drawn = [line + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{clean(table.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(header)}}}",
            r"\hline",
            drawn[0],
            r"\hline",
            *drawn[1:],
            r"\hline",
            r"\end{tabular}",
            *layouts.latex_notes(table.notes),
            r"\end{table}",
        ]
    )
