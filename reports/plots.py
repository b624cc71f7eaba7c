"""Plots as inline SVG: one small picture a panel, which the page arranges for its width.

Text and axes are drawn in the page's own colour and font, so that the same picture works in light and dark
mode. The drawing libraries are imported only when something is drawn.
"""

from __future__ import annotations

import hashlib
import io
import re
from functools import lru_cache
from html import escape
from typing import Any

import pandas as pd

from bench.methods.signals import Signal
from bench.reports.layouts import statistic
from bench.reports.load import BASE
from bench.storage.runs import Result

INK = "#123456"  # stands for the page's text colour until the SVG is written
HUES = {"sft": "#e69f00", "diffusion_dpo": "#0c86c9", "spin": "#009e73"}  # Okabe and Ito, safe for colour blindness
SPARE = ("#cc79a7", "#d55e00", "#56b4e9", "#999933", "#882255")
GREY = "#8c8c8c"
PLAIN = {"text.parse_math": False, "axes.unicode_minus": False}  # labels are text, never formulas


def colours(models: dict[str, Result]) -> dict[str, str]:
    """One colour a model, everywhere: a hue for each method, darker towards its last result, grey for the base."""
    methods = list(dict.fromkeys(result.method for result in models.values() if result.method != BASE))
    spare = iter(SPARE * (1 + len(methods)))
    hues = {method: HUES.get(method) or next(spare) for method in methods}
    own = {method: [label for label in models if models[label].method == method] for method in methods}
    found = {}
    for label, result in models.items():
        if result.method == BASE:
            found[label] = GREY
            continue
        before_last = len(own[result.method]) - 1 - own[result.method].index(label)
        found[label] = _lighter(hues[result.method], 0.25 * min(before_last, 2))
    return found


def _lighter(colour: str, share: float) -> str:
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def differences(rows: pd.DataFrame, palette: dict[str, str], label: str) -> str:
    """Dots with intervals, a row a model, and a line at no difference."""
    figure, axes = panel(4.6, 0.5 + 0.3 * len(rows))
    for height, row in enumerate(rows.iloc[::-1].itertuples()):
        colour = palette[row.model]
        axes.plot([row.low, row.high], [height, height], color=colour, linewidth=2.4, solid_capstyle="round")
        axes.plot(row.value, height, "o", color=colour, markersize=7)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows["model"])[::-1])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    quiet(axes, "x")
    axes.margins(x=0.06)
    return svg(figure, f"{label}: " + spoken(rows))


def iterations(rows: pd.DataFrame, models: dict[str, Result], palette: dict[str, str], label: str) -> str:
    """Differences to the base per iteration (the paper's Figure 3, paired); one-shot methods are horizontal lines.

    Of an iteration only its end: results inside it have their place where costs are the axis.
    """
    figure, axes = panel(3.5, 2.4)
    rows = rows[[models[model].end for model in rows["model"]]]
    values = rows.set_index("model")
    last = max(models[model].iteration for model in values.index)
    edge = last
    for method in dict.fromkeys(models[model].method for model in values.index):
        own = [model for model in values.index if models[model].method == method]
        found, colour = values.loc[own], palette[own[-1]]
        if len(own) == 1:
            edge += 0.09
            axes.axhline(found["value"].iloc[0], color=colour, linewidth=1.6, dashes=(4, 2))
            axes.vlines(edge, found["low"], found["high"], color=colour, linewidth=1.6)
            continue
        steps = [0, *(models[model].iteration for model in own)]
        low, high, value = ([0.0, *found[name].astype(float)] for name in ("low", "high", "value"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, value, color=colour, linewidth=2)
        for step, height, model in zip(steps[1:], value[1:], own, strict=True):
            axes.plot(step, height, "o", color=palette[model], markersize=6)
    axes.plot(0, 0, "o", color=GREY, markersize=6)
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xticks(range(last + 1), [BASE if i == 0 else str(i) for i in range(last + 1)])
    axes.set_xlim(-0.15, edge + 0.15)
    axes.set_xlabel("iteration")
    quiet(axes, "y")
    return svg(figure, f"{label} per iteration, difference to base: " + spoken(rows))


def winrates(rows: pd.DataFrame, palette: dict[str, str], label: str) -> str:
    """Win-rate bars in per cent with intervals (the paper's Figure 1) and a line at even."""
    figure, axes = panel(3.5, 0.7 + 0.27 * len(rows))
    centre = range(len(rows))
    axes.barh(centre, 100 * rows["value"], 0.72, color=[palette[model] for model in rows["model"]])
    axes.hlines(centre, 100 * rows["low"], 100 * rows["high"], color=INK, linewidth=1.4)
    axes.set_yticks(centre, list(rows["model"]))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(50, color=INK, linewidth=1, dashes=(3, 2))
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of prompts won, ties half")
    quiet(axes, "x")
    return svg(figure, f"{label}, {statistic('winrate', rows['against'].iloc[0])}: " + spoken(rows, 100))


def training(history: pd.DataFrame, logged: Signal, palette: dict[str, str], models: list[str]) -> str:
    """A logged training signal over the steps, a line a model: mean over training seeds, and their range."""
    import seaborn

    signal = logged.name
    figure, axes = panel(3.5, 2.4)
    rows = history[history["model"].isin(models)].dropna(subset=[signal])
    there = [model for model in models if model in set(rows["model"])]
    seaborn.lineplot(
        rows,
        x="step",
        y=signal,
        hue="model",
        hue_order=there,
        palette=palette,
        ax=axes,
        linewidth=1.8,
        errorbar=("pi", 100),
        legend=False,
    )
    for model, own in rows.groupby("model", sort=False, observed=True):
        if own["step"].nunique() == 1:  # no line goes through one point
            axes.plot(own["step"].iloc[0], own[signal].mean(), "o", color=palette[model], markersize=6)
    if logged.start is not None:
        axes.axhline(logged.start, color=INK, linewidth=1, dashes=(3, 2))
    axes.set(xlabel="step", ylabel="")
    quiet(axes, "y")
    return svg(figure, f"{logged.title} during training of {', '.join(there)}")


@lru_cache
def _style() -> dict[str, Any]:
    import seaborn

    inked = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color xtick.labelcolor ytick.labelcolor"
    sized = "font.size axes.labelsize xtick.labelsize ytick.labelsize"
    style = {**seaborn.axes_style("ticks"), **seaborn.plotting_context("paper")}
    return {**style, **dict.fromkeys(inked.split(), INK), **dict.fromkeys(sized.split(), 9), **PLAIN}


def panel(width: float, height: float, projection: str | None = None) -> tuple[Any, Any]:
    """An empty figure of so many inches, without global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_style()):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot(projection=projection)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def quiet(axes: Any, along: str) -> None:
    """Only what is read: faint grid lines along the values, no frame."""
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right", "left" if along == "x" else "top"]].set_visible(False)
    axes.grid(axis=along, color=INK, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    getattr(axes, f"{along}axis").set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y" if along == "x" else "x", length=0)


def spoken(rows: pd.DataFrame, scale: float = 1) -> str:
    """The plot in words, for those who do not see it."""
    return "; ".join(
        f"{row.model} {scale * row.value:.4g} (from {scale * row.low:.4g} to {scale * row.high:.4g})"
        for row in rows.itertuples()
    )


def svg(figure: Any, spoken: str) -> str:
    """The figure as an SVG element: text as text, ids that do not collide, no addresses, the page's ink."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    key = hashlib.sha1(f"{spoken}{figure.get_size_inches()}".encode()).hexdigest()[:8]
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, **PLAIN}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'(<[^<>]*)\sstyle="([^"]*)"', lambda tag: tag[1] + _attributes(tag[2]), text)
    box = re.search(r'viewBox="([^"]*)"', text)[1]
    head = f'<svg role="img" aria-label="{escape(spoken)}" viewBox="{box}" class="plot">'
    text = head + text[text.index(">") + 1 :]
    return re.sub(INK, "currentColor", text, flags=re.I).strip()


def _attributes(style: str) -> str:
    """Style properties as the presentation attributes of the same names: the page's policy allows no inline style."""
    pairs = (part.partition(":") for part in style.split(";") if part.strip())
    return "".join(f' {name.strip()}="{value.strip()}"' for name, _, value in pairs)
