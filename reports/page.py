"""One HTML file that can be mailed: no request leaves it, and everything in it is escaped."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench.errors import BenchError
from bench.stages import atomic_write
from reports import cost, layouts, plots, tables
from reports.load import BASE, Runs
from reports.pictures import gallery
from reports.stats import JUDGE, Estimate
from reports.verdict import Finding, findings


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str
    rank: int

    @property
    def sort(self) -> str:
        return self.value.replace("\u2212", "-")


@dataclass(frozen=True)
class View:
    """One statistic of one setting: the judge's table and the metrics' table, each (header, body) or None."""

    key: str
    name: str
    caption: str
    judge: tuple[list[str], list[list[Any]]] | None
    metrics: tuple[list[str], list[list[Any]]] | None


def write(runs: Runs, output: Path) -> Path:
    """Write the report of `runs` as one self-contained HTML file and return its path."""
    output = Path(output)
    if output.is_dir():
        raise BenchError(f"{output} is a folder; give the page a file name, e.g. -o {output / 'report.html'}")
    try:
        atomic_write(output, html(runs))
    except OSError as error:
        raise BenchError(f"cannot write {output}: {error.strerror}") from error
    return output


def html(runs: Runs) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    environment.filters |= {
        "estimate": _estimate,
        "duration": cost.duration,
        "flops": cost.flops,
        "pretty": _pretty,
        "minus": _minus,
    }
    return environment.get_template("template.html").render(context(runs))


def context(runs: Runs) -> dict[str, Any]:
    """Everything the template shows."""
    palette = plots.colours(runs.models)
    found = findings(runs)
    prices = cost.costs(runs)
    lead = tables.lead_metric(runs)
    return {
        "suite": runs.protocol.get("suite", {}),
        "protocol": runs.protocol,
        "protocols": runs.protocols,
        "models": runs.models,
        "palette": palette,
        "problems": runs.problems,
        "groups": runs.groups,
        "lead": layouts.metric_title(lead),
        "judged": lead.startswith(JUDGE),
        "judge_title": layouts.JUDGE_TITLE,
        "reading": layouts.PROTOCOLS[tables.default_protocol(runs)],
        "first": found[0],
        "findings": found,
        "price": {row["model"]: row for row in prices.to_dict("records")},
        "n_seeds": runs.scores["train_seed"].nunique(),
        "newest": str(runs.protocol.get("created", ""))[:10],
        "settings": [_setting(runs, finding, palette, lead) for finding in found],
        "training": _training(runs, palette),
        "names": _spoken_name,
        "training_models": [model for model in runs.models if model in set(runs.history["model"])],
    }


def _setting(runs: Runs, finding: Finding, palette: dict[str, str], lead: str) -> dict[str, Any]:
    """Tables, plots and pictures of one prompt set at one guidance."""
    where = {
        "prompt_set": finding.group[0],
        "guidance": finding.group[1],
        "metrics": tables.metric_names(runs),
    }
    mean = tables.table(runs, "mean", **where)
    views = [_view("mean", "Mean", mean)]
    panels: list[tuple[str, bool, Any]] = []
    bars: list[tuple[str, bool, Any]] = []
    forest = None
    if BASE in runs.models and len(runs.models) > 1:
        gain, rate = (tables.table(runs, stat, BASE, **where) for stat in ("mean", "winrate"))
        views += [_view("gain", "Difference to base", gain), _view("winrate", "Win rate over base", rate)]
        forest = _safe(plots.differences(gain[gain["metric"] == lead], palette, _spoken_name(lead)))
        bars = [
            (name, judged, _safe(plots.winrates(rows, palette, spoken)))
            for name, judged, spoken, rows in _by_metric(rate)
        ]
    views.append(_view("median", "Median", tables.table(runs, "median", **where)))
    if any(iteration > 1 for _, iteration in runs.models.values()):
        panels = [
            (name, judged, _safe(plots.iterations(rows, runs.models, palette, spoken)))
            for name, judged, spoken, rows in _by_metric(mean)
        ]
    rows = mean[mean["metric"] == lead]
    return {
        "name": finding.group[0],
        "guidance": f"{finding.group[1]:g}",
        "finding": finding,
        "forest": forest,
        "views": [view for view in views if view],
        "panels": panels,
        "bars": bars,
        "caption": " · ".join(layouts.setting(rows)),
        "n_prompts": int(rows["n_prompts"].max()),
        "gallery": gallery(runs, finding.group, finding.best),
    }


def _by_metric(tidy: pd.DataFrame) -> list[tuple[str, bool, str, pd.DataFrame]]:
    """(title, is a judge reading, spoken name, rows) for the plots: metrics and the judge's main parts."""
    return [
        (layouts.metric_title(str(metric)), str(metric).startswith(JUDGE), _spoken_name(str(metric)), rows)
        for metric, rows in tidy.groupby("metric", sort=False)
        if not str(metric).startswith(JUDGE) or metric in tables.JUDGE_PARTS
    ]


def _spoken_name(metric: str) -> str:
    return ("judge: " if metric.startswith(JUDGE) else "") + layouts.metric_title(metric)


def _view(key: str, name: str, tidy: pd.DataFrame) -> View | None:
    if tidy.empty:
        return None

    def mark(value: str, interval: str, rank: int) -> Cell:
        return Cell(_minus(value), _minus(interval), rank)

    judged = tidy["metric"].str.startswith(JUDGE)
    halves = [layouts.cells(rows, mark) if len(rows) else None for rows in (tidy[judged], tidy[~judged])]
    return View(key, name, layouts.caption(tidy), *halves)


def _training(runs: Runs, palette: dict[str, str]) -> list[tuple[str, Any]]:
    """(title, plot) of the logged signals; losses, which differ in kind, a method at a time."""
    logged = runs.history
    models = [model for model in runs.models if model in set(logged["model"])]
    by_method = {
        runs.title(method): [m for m in models if runs.models[m][0] == method]
        for method in dict.fromkeys(runs.models[model][0] for model in models)
    }
    panels = [(f"loss, {title}", "loss", own) for title, own in by_method.items()]
    panels += [(name, signal, models) for signal, name in plots.SIGNALS.items()]
    return [
        (title, _safe(plots.training(logged, signal, palette, own)))
        for title, signal, own in panels
        if signal in logged and logged.loc[logged["model"].isin(own), signal].notna().any()
    ]


def _safe(svg: str) -> Any:
    """Our own drawing, its texts escaped when it was drawn."""
    from markupsafe import Markup

    return Markup(svg)


def _estimate(estimate: Estimate, sign: str = "", scale: float = 1, places: int | None = None) -> str:
    value, low, high = (part * scale for part in estimate)
    if places is None:
        places = layouts.column_digits(pd.DataFrame({"low": [low], "high": [high]}))
    return _minus(f"{value:{sign}.{places}f} [{low:{sign}.{places}f}, {high:{sign}.{places}f}]")


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
