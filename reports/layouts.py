"""How tidy rows look as text, Markdown and LaTeX: models down, metrics across, the judge in a block apart."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence

import pandas as pd

from reports.load import BASE
from reports.stats import AVERAGE, JUDGE, ZSCORE, higher_is_better

WIDTH = 118
TITLES = {
    "pickscore": "PickScore",
    "hpsv2": "HPSv2",
    "imagereward": "ImageReward",
    "aesthetic": "Aesthetic",
    "clip": "CLIP",
    AVERAGE: "Average",
    ZSCORE: "Mean z-score",
}
STATS = {"mean": "mean", "median": "median", "winrate": "win rate, %"}
PROTOCOLS = {
    "one": "one image a prompt",
    "mean": "mean over the images of a prompt",
    "best": "best of the images of a prompt",
}
JUDGE_TITLE = "exact judge, the drawn world's ground truth"
SUMMARY_NOTE = (
    "[low, high]: 95 % interval, bootstrap paired over prompts (and training seeds). "
    "^ v: difference to base clear of 0."
)
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "·": r"$\cdot$",
    "†": r"$^\dagger$",
    "\u2212": "$-$",
}


def metric_title(name: str) -> str:
    """A metric's column heading; a judge reading loses its prefix (its block names the judge)."""
    return TITLES.get(name, name.removeprefix(JUDGE))


def spoken_name(metric: str) -> str:
    """A metric's name where no block says whether it is the judge's."""
    return ("judge: " if metric.startswith(JUDGE) else "") + metric_title(metric)


def column_digits(rows: pd.DataFrame) -> int:
    """Decimals of a column: those that show its typical interval's width with two figures, at least one."""
    width = float((rows["high"] - rows["low"]).median()) if len(rows) else 0.0
    return int(min(5, max(1, 1 - math.floor(math.log10(width))))) if width > 0 else 3


def caption(rows: pd.DataFrame) -> str:
    """What stands above every table: statistic, prompt set, guidance, prompts, seeds, protocol."""
    first = rows.iloc[0]
    return " · ".join([statistic(first["stat"], first["against"]), *setting(rows)])


def statistic(stat: str, against: str) -> str:
    """ "mean", "median difference to base", "win rate, % over base, ties half"."""
    if stat == "winrate":
        return f"{STATS[stat]} over {against}, ties half"
    return f"{STATS[stat]} difference to {against}" if against else STATS[stat]


def setting(rows: pd.DataFrame) -> list[str]:
    """Prompt set, guidance, prompts, training seeds of the trained models, protocol, as short phrases."""
    first = rows.iloc[0]
    trained = rows.loc[rows["model"] != BASE, "n_seeds"]
    seeds = span(trained if len(trained) else rows["n_seeds"])
    return [
        f"prompt set {first['prompt_set']}",
        f"guidance {first['guidance']:g}",
        f"{span(rows['n_prompts'])} prompts",
        f"{seeds} training seed{'' if seeds == '1' else 's'}",
        PROTOCOLS[first["protocol"]],
    ]


def span(numbers: pd.Series) -> str:
    """ "500" or "498-500"."""
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low}-{high}"


def ranks(rows: pd.DataFrame) -> dict[str, int]:
    """Model -> 1 for a metric's best value, 2 for the second; ties share a rank. Empty for one model."""
    if len(rows) < 2:
        return {}
    order = rows["value"].rank(method="min", ascending=not higher_is_better(rows["metric"].iloc[0]))
    return {model: int(rank) for model, rank in zip(rows["model"], order, strict=True) if rank <= 2}


def blocks(tidy: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(heading, rows) for each prompt set and guidance: the metrics, then the judge."""
    found = []
    for _, group in tidy.groupby(["prompt_set", "guidance"], sort=False):
        judged = group["metric"].str.startswith(JUDGE)
        for rows, prefix in ((group[~judged], ""), (group[judged], f"{JUDGE_TITLE}: ")):
            if len(rows):
                found.append((prefix + caption(rows), rows))
    return found


def cells(rows: pd.DataFrame, mark: Callable[[str, str, int], str]) -> tuple[list[str], list[list[str]]]:
    """Header and body of one block; mark(value, interval, rank) writes a cell."""
    models = list(dict.fromkeys(rows["model"]))
    header, columns = ["model"], [models]
    for metric, part in rows.groupby("metric", sort=False):
        scale = 100 if part["stat"].iloc[0] == "winrate" else 1
        scaled = part.assign(**{name: part[name] * scale for name in ("value", "low", "high")})
        places, rank = column_digits(scaled), ranks(scaled)
        sign = "+" if part["against"].iloc[0] and scale == 1 else ""
        found = {
            row.model: mark(
                f"{row.value:{sign}.{places}f}",
                f"[{row.low:{sign}.{places}f}, {row.high:{sign}.{places}f}]",
                rank.get(row.model, 0),
            )
            for row in scaled.itertuples()
        }
        header.append(metric_title(str(metric)))
        columns.append([found.get(model, "-") for model in models])
    return header, [list(row) for row in zip(*columns, strict=True)]


def render(tidy: pd.DataFrame, format: str) -> str:
    """Side by side tables as "text", "md" or "latex"."""
    if tidy.empty:
        return "no scores to show\n"
    draw = {"text": _text, "md": _markdown, "latex": _latex}[format]
    return "\n\n".join(draw(heading, rows) for heading, rows in blocks(tidy)) + "\n"


def _text(heading: str, rows: pd.DataFrame) -> str:
    header, body = cells(rows, lambda value, interval, rank: f"{value}{'*' if rank == 1 else ' '} {interval}")
    return "\n".join([heading, *wrapped(header, body)]) + "\n* best of its column; [low, high] 95 % interval"


def wrapped(header: list[str], body: list[list[str]], names: int = 1) -> list[str]:
    """Aligned columns; when they are wider than a terminal, several tables under each other.

    The first `names` columns name a row and are repeated in each of them.
    """
    table = [header, *body]
    widths = [max(text_width(row[i]) for row in table) for i in range(len(header))]
    named = list(range(names))
    chunks: list[list[int]] = [[]]
    for i in range(names, len(header)):
        if chunks[-1] and sum(widths[j] + 2 for j in [*named, *chunks[-1], i]) - 2 > WIDTH:
            chunks.append([])
        chunks[-1].append(i)
    lines: list[str] = []
    for chunk in chunks:
        columns = [*named, *chunk]
        drawn = ["  ".join(pad(row[i], widths[i]) for i in columns).rstrip() for row in table]
        lines += ([""] if lines else []) + [drawn[0], "  ".join("-" * widths[i] for i in columns), *drawn[1:]]
    return lines


def text_width(text: str) -> int:
    """Columns a text takes in a terminal (wide characters take two, combining ones none)."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def pad(text: str, width: int) -> str:
    return text + " " * (width - text_width(text))


def _markdown(heading: str, rows: pd.DataFrame) -> str:
    marks = {1: "**{}**", 2: "<u>{}</u>"}
    return markdown(heading, *cells(
        rows, lambda value, interval, rank: f"{marks.get(rank, '{}').format(value)} {interval}"
    ))


def markdown(heading: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows; other cells are written as they are."""
    lines = [[markdown_text(cell) for cell in header]]
    lines += [[markdown_text(row[0]), *row[1:]] for row in body]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return "\n".join([markdown_text(heading), "", drawn[0], rule, *drawn[1:]])


def markdown_text(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\|`*_[]<>#" else c for c in text.replace("\n", " "))


def _latex(heading: str, rows: pd.DataFrame) -> str:
    """Two lines a model: values, then intervals in small print."""
    marks = {1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
    header, body = cells(
        rows, lambda value, interval, rank: f"{marks.get(rank, '{}').format(value)}\n{{\\tiny {interval}}}"
    )
    halves = [[cell.partition("\n") for cell in row] for row in body]
    lines = [[part[index] for part in row] for row in halves for index in (0, 2)]
    return latex(heading, header, lines)


LONG = 80  # characters, beyond which a cell is a paragraph


def latex(heading: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table environment that needs no package; the first column is escaped, other cells are LaTeX already."""
    drawn = [" & ".join(map(latex_text, header)) + r" \\"]
    drawn += [" & ".join([latex_text(row[0]), *row[1:]]) + r" \\" for row in body]
    kinds = [r"p{0.75\linewidth}" if any(len(row[column]) > LONG for row in body) else "r"
             for column in range(1, len(header))]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{latex_text(heading)}}}",
            rf"\begin{{tabular}}{{l{''.join(kinds)}}}",
            r"\hline",
            drawn[0],
            r"\hline",
            *drawn[1:],
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def latex_text(text: str) -> str:
    """Text for any LaTeX document without a package; what its fonts lack is written as a code point."""
    return "".join(LATEX.get(c, c if c.isascii() else f"[U+{ord(c):04X}]") for c in text.replace("\n", " "))


def summary_block(
    group: tuple[str, float],
    protocol: str,
    lead: str,
    models: Sequence[str],
    plain: dict[str, pd.DataFrame],
    gain: dict[str, pd.DataFrame],
) -> str:
    """One setting: the lead metric with interval and difference to base, the other metrics as numbers."""
    judged = lead.startswith(JUDGE)
    name = f"{metric_title(lead)} (exact judge)" if judged else metric_title(lead)
    header = ["model", name, "difference to base", *(metric_title(m) for m in plain if m != lead)]
    body = []
    for model in models:
        row = [model, _bracketed(plain[lead], model), _bracketed(gain.get(lead), model, "+")]
        row += [_arrowed(plain[m], gain.get(m), model) for m in plain if m != lead]
        body.append(row)
    rows = plain[lead].reset_index().assign(prompt_set=group[0], guidance=group[1], protocol=protocol)
    return "\n".join([" · ".join(setting(rows)), *wrapped(header, body)])


def _bracketed(rows: pd.DataFrame | None, model: str, sign: str = "") -> str:
    if rows is None or model not in rows.index:
        return "-"
    row, places = rows.loc[model], column_digits(rows)
    return f"{row['value']:{sign}.{places}f} [{row['low']:{sign}.{places}f}, {row['high']:{sign}.{places}f}]"


def _arrowed(rows: pd.DataFrame, gain: pd.DataFrame | None, model: str) -> str:
    if model not in rows.index:
        return "-"
    arrow = ""
    if gain is not None and model in gain.index:
        arrow = " ^" if gain.loc[model, "low"] > 0 else " v" if gain.loc[model, "high"] < 0 else ""
    return f"{rows.loc[model, 'value']:.{column_digits(rows)}f}{arrow}"
