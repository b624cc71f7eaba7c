"""What the page shows of one prompt set at one guidance: tables, plots, warnings, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.methods.signals import LOSS
from bench.metrics.columns import Column
from bench.reports import agreement, charts, cost, layouts, paper, plots, stats, tables
from bench.reports.layouts import spoken_name
from bench.reports.load import BASE, Runs
from bench.reports.signals import declared
from bench.reports.signatures import matrix, signatures, worst_first
from bench.reports.stats import AVERAGES
from bench.reports.verdict import Verdict


@dataclass(frozen=True)
class Cell:
    """A number of a table; small: what stands below it in small print."""

    value: str
    small: str
    ahead: bool = False

    @property
    def sort(self) -> str:
        return self.value.replace("\u2212", "-").lstrip("<")


@dataclass(frozen=True)
class View:
    """One statistic of one setting: the judge's table and the metrics' table, each (header, body) or None."""

    key: str
    name: str
    caption: str
    note: str
    judge: tuple[list[str], list[list[Any]]] | None
    metrics: tuple[list[str], list[list[Any]]] | None


TESTED = (
    "Each number is the two-sided p-value of the difference to base, from the same model of prompts and training seeds "
    "as its interval, corrected (Holm) over all metrics and judge readings of a model; the averages repeat other "
    "metrics and have none. Verdicts and bold are by one metric, and corrected over pairs of models. Below p the "
    "smallest true difference that this comparison would find with 80 % power at the 5 % level."
)

HEAT_MAPS = {
    "changes": "Spearman's rank correlation of per-prompt differences to base, all models together.",
    "images": "Spearman's rank correlation over all images of all models.",
}


@dataclass(frozen=True)
class Plot:
    """A drawing with its title; judged: whether it is of a judge's reading."""

    title: str
    svg: Any
    remark: str = ""
    judged: bool = False


def setting(runs: Runs, verdict: Verdict, palette: dict[str, str], lead: Column) -> dict[str, Any]:
    """Everything of one setting but its pictures, by the names the template uses."""
    names = [*tables.metric_names(runs), *tables.averaged(runs)]
    where = {"prompt_set": verdict.group[0], "guidance": verdict.group[1], "metrics": names}
    mean = tables.table(runs, "mean", **where)
    absolute = [_view("mean", "Mean", mean), _view("median", "Median", tables.table(runs, "median", **where))]
    found: dict[str, Any] = {"forest": None, "iterations": [], "walls": [], "paid": [], "plots": [], "more": []}
    views: list[View | None] = []
    if BASE in runs.models and len(runs.models) > 1:
        gain = tables.table(runs, "mean", BASE, **where)
        views += [_view("gain", "Difference to base", gain)]
        for key, against in zip(("winrate", "rivals"), [BASE, *_rivals(runs)], strict=False):
            rate = tables.table(runs, "winrate", against, **where)
            views.append(_view(key, f"Win rate over {against}", rate))
            found["walls"].append(
                (against, _panels(runs, rate, lambda rows, name: plots.winrates(rows, palette, name)))
            )
        views += [_tests(gain), _agreement_view(runs, verdict)]
        found |= _plots(runs, verdict, mean, gain, palette, lead)
    given = [view for view in views if view]
    warnings, trained = signatures(runs, verdict.group), [model for model in runs.models if model != BASE]
    rows = mean[mean["metric"] == lead.name]
    return found | {
        "name": verdict.group[0],
        "guidance": f"{verdict.group[1]:g}",
        "verdict": verdict,
        "views": given or [view for view in absolute if view],
        "absolute": [view for view in absolute if view and given],
        "caption": " · ".join(layouts.setting(rows)),
        "n_prompts": int(rows["n_prompts"].max()),
        "trained": trained,
        "warnings": worst_first(warnings),
        "matrix": matrix(warnings, trained),
    }


def _rivals(runs: Runs) -> list[str]:
    """The second baseline of win rates: Diffusion-DPO as in the paper's Figure 1, else SFT; none beside nothing."""
    for method in ("diffusion_dpo", "sft"):
        found = [label for label, result in runs.models.items() if result.method == method]
        if found and len(runs.models) > 2:
            return found[-1:]
    return []


def _panels(runs: Runs, tidy: pd.DataFrame, draw: Any) -> list[Plot]:
    """A plot of each column but details, the judge's readings first."""
    parts = [(runs.column(str(metric)), rows) for metric, rows in tidy.groupby("metric", sort=False)]
    drawn = [
        Plot(spoken_name(column), safe(draw(rows, spoken_name(column))), judged=column.truth)
        for column, rows in parts
        if not column.detail and len(rows)
    ]
    return sorted(drawn, key=lambda plot: not plot.judged)


def _halves(tidy: pd.DataFrame, cells: Any) -> list[Any]:
    judged = tidy["truth"].astype(bool)
    return [cells(rows) if len(rows) else None for rows in (tidy[judged], tidy[~judged])]


def _view(key: str, name: str, tidy: pd.DataFrame) -> View | None:
    if tidy.empty:
        return None

    def cells(rows: pd.DataFrame) -> tuple[list[str], list[list[Any]]]:
        return layouts.cells(rows, lambda value, interval, ahead: Cell(minus(value), minus(interval), ahead))

    return View(key, name, layouts.caption(tidy), " ".join(layouts.notes(tidy, "Bold")), *_halves(tidy, cells))


def _tests(gain: pd.DataFrame) -> View | None:
    """The p-values and detectable differences of the differences to the base."""
    if gain.empty:
        return None

    def cells(rows: pd.DataFrame) -> tuple[list[str], list[list[Any]]]:
        models = list(dict.fromkeys(rows["model"]))
        header, columns = ["model"], []
        for _, part in rows.groupby("metric", sort=False):
            header.append(layouts.column_of(part).heading)
            by = {row.model: Cell(_p(row.p_holm), f"finds {row.detectable:.2g}") for row in part.itertuples()}
            columns.append([by.get(model, "-") for model in models])
        return header, [list(line) for line in zip(models, *columns, strict=True)]

    caption = "difference to base, p-value after Holm · " + " · ".join(layouts.setting(gain))
    return View("test", "Tests", caption, TESTED, *_halves(gain, cells))


def _p(value: float) -> str:
    return "–" if value != value else "<0.001" if value < 0.001 else f"{value:.3f}"


def _plots(
    runs: Runs, verdict: Verdict, mean: pd.DataFrame, gain: pd.DataFrame, palette: dict[str, str], lead: Column
) -> dict[str, Any]:
    """The plots of a setting that has a base: what is looked at first, and in "more" the rest."""
    own = gain[gain["metric"] == lead.name]
    learned = [column for column in runs.columns if not column.truth and column != lead]
    first = [lead, *learned[:1]]
    found: dict[str, Any] = {"paid": _efficiency(runs, gain, palette, first)}
    found["forest"] = safe(plots.differences(own, palette, spoken_name(lead))) if len(own) else None
    shown, more = _by_prompt(runs, verdict, palette, first)
    heat = _heat_maps(runs, verdict)
    if any(runs.models[model].iteration > 1 for model in gain["model"]):
        drawn = _panels(runs, gain, lambda rows, name: plots.iterations(rows, runs.models, palette, name))
        found["iterations"] = [plot for plot in drawn if plot.title in map(spoken_name, first)]
        more += [Plot(f"{plot.title} per iteration", plot.svg) for plot in drawn if plot not in found["iterations"]]
    return found | {"plots": shown + heat[:1], "more": [*_radar(runs, mean, palette), *heat[1:], *more]}


def _radar(runs: Runs, mean: pd.DataFrame, palette: dict[str, str]) -> list[Plot]:
    table = mean[~mean["truth"].astype(bool) & (mean["metric"] != AVERAGES[0])]
    wide = table.pivot(index="model", columns="metric", values="value")
    wide = wide.loc[list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["metric"]))].dropna()
    if len(wide.columns) < 3 or len(wide) < 2:
        return []
    axes = [runs.column(name) for name in wide.columns]
    wide.columns = [column.heading for column in axes]
    remark = "Means; each axis runs from its worst to its best model, so it shows order, not size."
    drawn = charts.radar(wide, palette, [column.higher_is_better for column in axes])
    return [Plot("Metrics at a glance", safe(drawn), remark)]


def _efficiency(runs: Runs, gain: pd.DataFrame, palette: dict[str, str], shown: list[Column]) -> list[Plot]:
    paid, found = gain.merge(cost.costs(runs), on="model"), []
    for column in shown:
        rows, name = paid[paid["metric"] == column.name], spoken_name(column)
        for along, axis in (("pairs", "pairs seen"), ("seconds", "seconds of compute, opponent's images included")):
            if rows[along].max() > 0:
                drawn = charts.efficiency(rows, along, axis, runs.models, palette, name)
                title = f"{name}, difference to base against {axis.split(',')[0]}"
                found.append(Plot(title, safe(drawn), "Bars are 95 % intervals."))
    return found


def _heat_maps(runs: Runs, verdict: Verdict) -> list[Plot]:
    agreed, found = _agreement(runs, verdict), []
    for unit, remark in HEAT_MAPS.items():
        square = agreement.matrix(agreed, unit)
        if len(square) > 1:
            drawn = charts.agreement(square.to_numpy(), agreement.titled(agreed, square))
            title = f"Do the metrics agree? {agreement.UNIT_TITLES[unit].capitalize()}"
            found.append(Plot(title, safe(drawn), remark))
    return found


def _by_prompt(
    runs: Runs, verdict: Verdict, palette: dict[str, str], columns: list[Column]
) -> tuple[list[Plot], list[Plot]]:
    """How differences to the base are distributed over prompts: of the first column, and of the others."""
    changes = _changes(tables.group_scores(runs, verdict.group), tables.default_protocol(runs))
    remark = "Dot: median. Thick: middle half. Thin: middle 90 %. Mean over training seeds."
    found = [
        Plot(
            f"{spoken_name(column)}, prompt by prompt",
            safe(charts.distributions(changes[column.name], palette, spoken_name(column), column.sign)),
            remark,
        )
        for column in columns
        if changes.get(column.name)
    ]
    return found[:1], found[1:]


def _agreement(runs: Runs, verdict: Verdict) -> pd.DataFrame:
    metrics = tables.chosen_metrics(runs, None)
    return agreement.setting(runs, verdict.group, metrics, tables.default_protocol(runs))


def _agreement_view(runs: Runs, verdict: Verdict) -> View | None:
    """Each metric beside the judge, where there is one."""
    rows = _agreement(runs, verdict)
    if not rows["beside"].any():
        return None
    header, body = agreement.with_judge(rows)
    pairs = agreement.opposed(rows)
    cells = [[line[0], *map(_split, line[1:-1]), Cell(line[-1], pairs.get(line[0], ""))] for line in body]
    caption = f"rank correlation with {agreement.judged(rows)} · {agreement.caption(rows)}"
    note = f"{agreement.sentence(rows)} {agreement.NOTE}"
    return View("agreement", "Agreement", caption, note, None, (header, cells))


def _split(text: str) -> Cell | str:
    """ "0.51 [0.48, 0.55]" as value and small print."""
    value, _, small = text.partition(" ")
    return text if text == "-" else Cell(minus(value), minus(small))


def _changes(scores: stats.Scores, protocol: str) -> dict[str, dict[str, np.ndarray]]:
    """Metric -> model -> per-prompt difference to the base [prompts that all models have]."""
    data = stats.per_prompt(scores, protocol)
    base = scores.models.index(BASE)
    found: dict[str, dict[str, np.ndarray]] = {}
    for i, metric in enumerate(scores.metrics):
        part = data[..., i]
        present = np.isfinite(part).any(axis=2)
        rows = {
            model: (part[m] - part[base])[present[m] & present[base]].mean(axis=0)
            for m, model in enumerate(scores.models)
            if m != base and (present[m] & present[base]).any()
        }
        if rows:
            whole = np.isfinite(np.stack(list(rows.values()))).all(axis=0)
            found[metric] = {model: values[whole] for model, values in rows.items()} if whole.any() else {}
    return {metric: rows for metric, rows in found.items() if rows}


def price_bars(runs: Runs, palette: dict[str, str]) -> list[tuple[str, Any]]:
    """Cost bars: operations and time of what was trained."""
    rows = cost.costs(runs).set_index("model")
    rows = rows[rows["pairs"] > 0]
    found = []
    if len(rows) and rows[["train_flops", "sample_flops"]].to_numpy().max() > 0:
        parts = rows[["train_flops", "sample_flops"]] / 1e12
        parts.columns = ["training", "opponent's images"]
        found.append(("TFLOP: training, and paler the opponent's images", safe(charts.bars(parts, palette, "TFLOP"))))
    if len(rows) and rows["seconds"].max() > 0:
        parts = rows[["seconds"]] / 60
        parts.columns = ["minutes"]
        found.append(("Minutes, opponent's images included", safe(charts.bars(parts, palette, "minutes"))))
    return found


def paper_tables(runs: Runs) -> list[dict[str, Any]]:
    """The paper's tables that these runs can fill; what the paper prints stands in columns of its own."""
    found = []
    for number in paper.available(runs):
        table = paper.build(runs, number)
        header, rows = paper.grid(table.tidy)
        printed = [i for i in range(len(header)) if any(line[i][3] for _, _, line in rows)]
        columns = [*header, *(f"{header[i]}, paper" for i in printed)]
        cells = [
            (
                row,
                label,
                [Cell(minus(c[0]), minus(c[1]), c[2]) if c[0] else "-" for c in line]
                + [Cell(minus(line[i][3]), "") if line[i][3] else "-" for i in printed],
            )
            for row, label, line in rows
        ]
        found.append({"number": number, "title": table.title, "header": columns, "rows": cells, "notes": table.notes})
    return found


def training(runs: Runs, palette: dict[str, str]) -> list[tuple[str, Any]]:
    """(title, plot) of the logged signals; losses, which differ in kind, a method at a time."""
    logged = runs.history
    models = [model for model in runs.models if model in set(logged["model"])]
    by_method = {
        runs.title(method): [m for m in models if runs.models[m].method == method]
        for method in dict.fromkeys(runs.models[model].method for model in models)
    }
    panels = [(f"{LOSS.title}, {title}", LOSS, own) for title, own in by_method.items()]
    signals = declared(runs.protocols.values()).values()
    panels += [(signal.title, signal, models) for signal in signals if signal.name != LOSS.name]
    return [
        (title, safe(plots.training(logged, signal, palette, own)))
        for title, signal, own in panels
        if signal.name in logged and logged.loc[logged["model"].isin(own), signal.name].notna().any()
    ]


def safe(svg: str) -> Any:
    """Our own drawing, its texts escaped when it was drawn."""
    from markupsafe import Markup

    return Markup(svg)


def minus(text: str) -> str:
    return text.replace("-", "\u2212")
