"""How tidy rows look as text, Markdown and LaTeX: models down, columns across, the judge's in a block apart.

A mark (a star, bold) stands for a test: see `note`. Where nothing is told apart, nothing is marked.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Callable, Sequence

import pandas as pd

from bench.metrics.columns import Column
from bench.reports.apart import CHECKPOINTS, METHODS, RULE
from bench.reports.load import BASE

WIDTH = 118
STATS = {"mean": "mean", "median": "median", "winrate": "win rate, %"}
PROTOCOLS = {
    "one": "one image a prompt",
    "mean": "mean over the images of a prompt",
    "best": "best of the images of a prompt",
}
JUDGE_TITLE = "judge, a network that reads each picture against the drawn world's rules"
INTERVAL = "[low, high]: 95 % interval over prompts, and over training seeds where there are several."
ONE_SEED = "One training seed: this is about these checkpoints; another training may order their methods otherwise."
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
    "↓": r"$\downarrow$",
    "\u2212": "$-$",
}


JUDGED = "judge: "


def spoken_name(column: Column) -> str:
    """A column's title where no block says whether it is the judge's."""
    return (JUDGED if column.truth else "") + column.title


def column_of(rows: pd.DataFrame) -> Column:
    """The column that tidy rows of one metric are of, as far as it matters to a layout."""
    first = rows.iloc[0]
    return Column(
        first["metric"], first["title"], first["unit"], bool(first["higher_is_better"]), truth=bool(first["truth"])
    )


def column_digits(rows: pd.DataFrame) -> int:
    """Decimals of a column: those that show its typical interval's width with two figures, from one to five.

    Where rows have the metric's spread between prompts, none finer than about its thousandth: what is smaller is
    nothing, and reads as 0. A mean or median has no more than its metric declares; differences are finer.
    """
    if rows.empty:
        return 3
    width = float((rows["high"] - rows["low"]).median())
    places = 1 - math.floor(math.log10(width)) if width > 0 else 3
    spread = float(rows["spread"].median()) if "spread" in rows else 0.0
    places = min(5, max(1, min(places, round(3 - math.log10(spread))) if spread > 0 else places))
    declared = rows.loc[rows["against"] == "", "decimals"] if {"against", "decimals"} <= set(rows) else pd.Series()
    return int(min(places, declared.dropna().min())) if declared.notna().any() else places


def number(value: float, places: int, sign: str = "") -> str:
    """`places` decimals; what rounds to zero has no sign."""
    shown = f"{value:{sign}.{places}f}"
    return shown if float(shown) else shown.lstrip("+-")


def interval(low: float, high: float, places: int, sign: str = "") -> str:
    """ "[0.1, 0.3]"."""
    return f"[{number(low, places, sign)}, {number(high, places, sign)}]"


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
    """Prompt set, guidance, prompts, training seeds of the trained models and what they speak of, protocol."""
    first = rows.iloc[0]
    return [
        f"prompt set {first['prompt_set']}",
        f"guidance {first['guidance']:g}",
        f"{span(rows['n_prompts'])} prompts",
        about(rows),
        PROTOCOLS[first["protocol"]],
    ]


def about(rows: pd.DataFrame) -> str:
    """ "3 training seeds, about methods": of methods only if every row speaks of them."""
    trained = rows.loc[rows["model"] != BASE, "n_seeds"]
    seeds = span(trained if len(trained) else rows["n_seeds"])
    what = METHODS if rows["speaks_of"].eq(METHODS).all() else CHECKPOINTS
    return f"{seeds} training seed{'' if seeds == '1' else 's'}, about {what}"


def notes(rows: pd.DataFrame, mark: str) -> list[str]:
    """What the marks (e.g. "Bold") and brackets of a table mean, and what it is about."""
    says = f"{mark}: no model is told apart above it, and at least one below it."
    if not rows["ahead"].any():
        says = "Nothing is marked: no two models are told apart."
    return [f"{says} {RULE}", INTERVAL, *([ONE_SEED] if rows["speaks_of"].eq(CHECKPOINTS).any() else [])]


def span(numbers: pd.Series) -> str:
    """ "500" or "498-500"."""
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low}-{high}"


def blocks(tidy: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(heading, rows) for each prompt set and guidance: the metrics, then the judge."""
    found = []
    for _, group in tidy.groupby(["prompt_set", "guidance"], sort=False):
        judged = group["truth"].astype(bool)
        for rows, prefix in ((group[~judged], ""), (group[judged], f"{JUDGE_TITLE}: ")):
            if len(rows):
                found.append((prefix + caption(rows), rows))
    return found


def cells(rows: pd.DataFrame, mark: Callable[[str, str, bool], str]) -> tuple[list[str], list[list[str]]]:
    """Header and body of one block; mark(value, interval, whether it is ahead) writes a cell."""
    models = list(dict.fromkeys(rows["model"]))
    header, columns = ["model"], [models]
    for _, part in rows.groupby("metric", sort=False):
        scale = 100 if part["stat"].iloc[0] == "winrate" else 1
        scaled = part.assign(**{name: part[name] * scale for name in ("value", "low", "high")})
        places = column_digits(scaled)
        sign = "+" if part["against"].iloc[0] and scale == 1 else ""
        found = {
            row.model: mark(number(row.value, places, sign), interval(row.low, row.high, places, sign), row.ahead)
            for row in scaled.itertuples()
        }
        header.append(column_of(part).heading)
        columns.append([found.get(model, "-") for model in models])
    return header, [list(row) for row in zip(*columns, strict=True)]


def render(tidy: pd.DataFrame, format: str) -> str:
    """Side by side tables as "text", "md" or "latex", and what their marks mean."""
    if tidy.empty:
        return "no scores to show\n"
    says = notes(tidy, "*" if format == "text" else "Bold")
    if format == "latex":
        return "\n\n".join(_latex(heading, rows, says) for heading, rows in blocks(tidy)) + "\n"
    draw = _text if format == "text" else _markdown
    shown = [draw(heading, rows) for heading, rows in blocks(tidy)]
    return "\n\n".join([*shown, "\n".join(line for one in says for line in folded(one))]) + "\n"


def folded(text: str) -> list[str]:
    """A paragraph as lines no wider than a terminal."""
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False, break_long_words=False)


def _text(heading: str, rows: pd.DataFrame) -> str:
    header, body = cells(rows, lambda value, interval, ahead: f"{value}{'*' if ahead else ' '} {interval}")
    return "\n".join([heading, *wrapped(header, body)])


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
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def pad(text: str, width: int) -> str:
    return text + " " * (width - text_width(text))


def _markdown(heading: str, rows: pd.DataFrame) -> str:
    return markdown(
        heading, *cells(rows, lambda value, interval, ahead: f"{'**' * ahead}{value}{'**' * ahead} {interval}")
    )


def markdown(heading: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column names the rows; other cells are written as they are."""
    lines = [[markdown_text(cell) for cell in header]]
    lines += [[markdown_text(row[0]), *row[1:]] for row in body]
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return "\n".join([markdown_text(heading), "", drawn[0], rule, *drawn[1:]])


def markdown_text(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\|`*_[]<>#" else c for c in text.replace("\n", " "))


def _latex(heading: str, rows: pd.DataFrame, says: list[str]) -> str:
    """Two lines a model: values, then intervals in small print."""
    header, body = cells(
        rows, lambda value, interval, ahead: f"{bold(value) if ahead else value}\n{{\\tiny {interval}}}"
    )
    halves = [[cell.partition("\n") for cell in row] for row in body]
    lines = [[part[index] for part in row] for row in halves for index in (0, 2)]
    return latex(heading, header, lines, says)


def bold(text: str) -> str:
    return rf"\textbf{{{text}}}"


LONG = 80  # characters, beyond which a cell is a paragraph


def latex(heading: str, header: Sequence[str], body: Sequence[Sequence[str]], says: Sequence[str] = ()) -> str:
    """A table environment that needs no package; the first column is escaped, other cells are LaTeX already."""
    drawn = [" & ".join(map(latex_text, header)) + r" \\"]
    drawn += [" & ".join([latex_text(row[0]), *row[1:]]) + r" \\" for row in body]
    kinds = [
        r"p{0.75\linewidth}" if any(len(row[column]) > LONG for row in body) else "r"
        for column in range(1, len(header))
    ]
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
            *latex_notes(says),
            r"\end{table}",
        ]
    )


def latex_notes(says: Sequence[str]) -> list[str]:
    """The small print under a table."""
    text = " ".join(map(latex_text, says))
    return [rf"\par\smallskip\parbox{{\linewidth}}{{\scriptsize {text}}}"] if says else []


def latex_text(text: str) -> str:
    """Text for any LaTeX document without a package; what its fonts lack is written as a code point."""
    return "".join(LATEX.get(c, c if c.isascii() else f"[U+{ord(c):04X}]") for c in text.replace("\n", " "))
