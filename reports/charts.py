"""Plots across metrics and against cost: radar, efficiency, agreement, distributions. As SVG, see `plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.reports.plots import GREY, INK, panel, quiet, spoken, svg
from bench.storage.runs import Result


def radar(values: pd.DataFrame, palette: dict[str, str], higher_is_better: Sequence[bool]) -> str:
    """The paper's Figure 4: models [rows] by metrics [columns], each axis from its worst to its best model."""
    figure, axes = panel(4.4, 3.9, "polar")
    spread = (values.max() - values.min()).replace(0, 1)
    risen = (values - values.min()) / spread
    better = pd.DataFrame(np.where(higher_is_better, risen, 1 - risen), risen.index, risen.columns)
    scaled = 0.15 + 0.85 * better
    angles = [2 * math.pi * i / len(values.columns) for i in range(len(values.columns))]
    for model, row in scaled.iterrows():
        closed = [*row, row.iloc[0]]
        axes.plot([*angles, angles[0]], closed, color=palette[model], linewidth=1.8)
        axes.fill([*angles, angles[0]], closed, color=palette[model], alpha=0.06)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, list(values.columns))
    axes.tick_params(axis="x", pad=16)
    axes.set_yticks([0.15, 1], [])
    axes.set_ylim(0, 1.02)
    axes.grid(color=INK, alpha=0.15, linewidth=0.8)
    axes.spines["polar"].set_visible(False)
    words = "; ".join(f"{m} " + ", ".join(f"{n} {v:.4g}" for n, v in row.items()) for m, row in values.iterrows())
    return svg(figure, f"Radar of the means, each axis from the worst to the best model: {words}")


def efficiency(
    rows: pd.DataFrame, along: str, axis: str, models: dict[str, Result], palette: dict[str, str], label: str
) -> str:
    """Difference to the base against what it cost (Figure 7 and the cost axis): one line a method, from nothing.

    rows: model, value, low, high and the cost column `along`.
    """
    figure, axes = panel(4.4, 2.8)
    values = rows.set_index("model")
    for method in dict.fromkeys(models[model].method for model in values.index):
        own = [model for model in values.index if models[model].method == method]
        line, colour = values.loc[own], palette[own[-1]]
        axes.plot([0, *line[along]], [0, *line["value"]], color=colour, linewidth=1.6)
        axes.vlines(line[along], line["low"], line["high"], color=colour, linewidth=1.4)
        for model in own:
            axes.plot(values.loc[model, along], values.loc[model, "value"], "o", color=palette[model], markersize=6)
    axes.plot(0, 0, "o", color=GREY, markersize=6)
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{label}, to base")
    quiet(axes, "y")
    return svg(figure, f"{label}, difference to base, against {axis}: {spoken(rows)}")


def agreement(matrix: np.ndarray, names: Sequence[str]) -> str:
    """A heat map of rank correlations [metrics, metrics]."""
    side = 1.6 + 0.42 * len(names)
    figure, axes = panel(side + 0.6, side)
    axes.pcolormesh(np.nan_to_num(matrix), cmap="RdBu", vmin=-1.4, vmax=1.4, linewidth=0)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(matrix):
        shown = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(column + 0.5, row + 0.5, shown, ha="center", va="center", color="#14161a", fontsize=8)
    middles = [i + 0.5 for i in range(len(names))]
    axes.set_xticks(middles, names, rotation=40, ha="right")
    axes.set_yticks(middles, names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    pairs = [
        f"{names[i]} and {names[j]} {matrix[i, j]:.2f}" for i in range(len(names)) for j in range(i + 1, len(names))
    ]
    return svg(figure, "Rank correlation of metrics: " + "; ".join(pairs))


def distributions(differences: dict[str, np.ndarray], palette: dict[str, str], label: str, sign: int = 1) -> str:
    """Per-prompt differences to the base: for each model the middle half, the middle 90 % and the median.

    sign: of a gain, -1 where less is better.
    """
    figure, axes = panel(4.6, 0.6 + 0.34 * len(differences))
    words = []
    for height, (model, values) in enumerate(reversed(differences.items())):
        edges = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
        bins, borders = np.histogram(values, 24)
        tops = 0.42 * bins / bins.max()
        centres = (borders[1:] + borders[:-1]) / 2
        axes.fill_between(centres, height - tops, height + tops, color=palette[model], alpha=0.3, linewidth=0)
        axes.plot(edges[[0, 4]], [height, height], color=palette[model], linewidth=1.2)
        axes.plot(edges[[1, 3]], [height, height], color=palette[model], linewidth=4, solid_capstyle="butt")
        axes.plot(edges[2], height, "o", color=palette[model], markersize=6)
        words.append(
            f"{model}: median {edges[2]:+.3g}, middle 90 % from {edges[0]:+.3g} to {edges[4]:+.3g}, "
            f"better on {np.mean(sign * values > 0):.0%}"
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(differences)), list(differences)[::-1])
    axes.set_xlabel(f"{label}: difference to base, prompt by prompt")
    quiet(axes, "x")
    return svg(figure, f"Per-prompt differences to base in {label}: " + "; ".join(words[::-1]))


def bars(parts: pd.DataFrame, palette: dict[str, str], axis: str) -> str:
    """Cost bars: models [rows] by parts [columns], stacked; later parts are paler."""
    figure, axes = panel(4.6, 0.7 + 0.3 * len(parts))
    start = np.zeros(len(parts))
    for shade, part in enumerate(parts):
        colours = [palette[model] for model in parts.index]
        axes.barh(range(len(parts)), parts[part], 0.7, start, color=colours, alpha=1 - 0.55 * shade)
        start += parts[part].to_numpy()
    axes.set_yticks(range(len(parts)), list(parts.index))
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.set_xlabel(axis)
    quiet(axes, "x")
    words = "; ".join(f"{m} " + ", ".join(f"{n} {v:.3g}" for n, v in row.items()) for m, row in parts.iterrows())
    return svg(figure, f"{axis}: {words}")
