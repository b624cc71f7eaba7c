"""The commands that show runs: report, table, list. As in cli.py, heavy imports are inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bench.commands.options import PAGE, as_json
from bench.errors import BenchError, UsageError, did_you_mean


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option("-o", "--output", default=PAGE, show_default=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--max-mb",
    type=click.FloatRange(min=0, min_open=True),
    default=20,
    show_default=True,
    help="How large the page may be; pictures are made fewer and smaller to keep it so.",
)
@as_json
def report(names: tuple[str, ...], output: Path, max_mb: float, layout: str) -> None:
    """Write one self-contained page about runs (default: all).

    Runs are those of results/runs; the page's path is printed, and its size on stderr.
    """
    from bench.reports import load, page

    path = page.write(load.load_runs([Path(name) for name in names] or None), output, max_mb)
    size = path.stat().st_size
    click.echo(f"{path.name}: {size / 1e6:.1f} MB", err=True)
    click.echo(json.dumps({"page": str(path), "bytes": size}) if layout == "json" else str(path))


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN]...")
@click.option(
    "--paper",
    type=int,
    metavar="N",
    help="Table N (1-4, 7-10) of the SPIN-Diffusion paper in its layout, published values beside the measured ones.",
)
@click.option(
    "--stat",
    default="mean",
    show_default=True,
    help="mean, median, winrate; seeds: the mean of each training seed, as csv or json; or agreement: rank "
    "correlations of the metrics with each other and with the judge, per image, per prompt, per model.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="Compare with this model, prompt by prompt: a label of "
    "the table, or METHOD[:ITERATION][@STEP].  [default for winrate: base]",
)
@click.option("--prompt-set", help="Only this prompt set.")
@click.option("--guidance", type=float, help="Only this guidance scale.")
@click.option(
    "--metrics",
    help="Only these, e.g. pickscore,clip; judge, as any metric's name, for all its columns, "
    "average for the paper's mean of raw scores, average_z for its mean z-score.",
)
@click.option(
    "--protocol", help="one, mean or best: how the images of a prompt become one number.  [default: the suite's]"
)
@click.option("--format", "layout", default="text", show_default=True, help="text, csv, md, latex or json.")
def table(
    names: tuple[str, ...],
    paper: int | None,
    stat: str,
    against: str | None,
    prompt_set: str | None,
    guidance: float | None,
    metrics: str | None,
    protocol: str | None,
    layout: str,
) -> None:
    """Print a table of runs (default: all) with intervals.

    Runs are those of results/runs; intervals are 95 %, paired over prompts. Marked is what no model is told apart above
    and what is told apart above some.
    """
    from bench.reports import agreement, load, seeds, stats, tables

    of_its_own = {module.STAT: module for module in (agreement, seeds)}
    tables.one_of(stat, (*stats.STATS, *of_its_own), "--stat")
    if paper is not None:
        _refuse_beside_paper(stat=stat != "mean", against=against, prompt_set=prompt_set, metrics=metrics)
        from bench.reports import paper as papers

    try:
        runs = load.load_runs([Path(name) for name in names] or None)
    except BenchError as error:
        if paper is None or names:
            raise
        click.echo(f"note: {error}", err=True)
        click.echo(papers.render(papers.published_only(paper), layout).rstrip("\n"))
        return
    for problem in runs.problems:
        click.echo(f"note: {problem}", err=True)
    if paper is not None:
        shown = papers.render(papers.build(runs, paper, guidance, protocol), layout)
        click.echo(shown.rstrip("\n"))
        return
    chosen = metrics.split(",") if metrics else None
    if stat in of_its_own:
        if against:
            raise UsageError(f"--against does not go with --stat {stat}: its rows compare with nothing else")
        tidy = of_its_own[stat].table(runs, prompt_set, guidance, chosen, protocol)
        click.echo(of_its_own[stat].render(tidy, layout).rstrip("\n"))
        return
    tidy = tables.table(runs, stat, against, prompt_set, guidance, chosen, protocol)
    if tidy["metric"].isin(stats.AVERAGES).any():
        click.echo(f"note: {tables.average_note(runs)}", err=True)
    click.echo(tables.render(tidy, layout).rstrip("\n"))


def _refuse_beside_paper(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')} does not go with --paper: the paper's table decides that")


@click.command("list")
@click.argument("kind", metavar="methods|metrics|suites|prompts|runs")
@as_json
def list_command(kind: str, layout: str) -> None:
    """List what there is to choose from."""
    from bench.commands.listing import KINDS, method_records

    if kind not in KINDS:
        raise UsageError(f"cannot list '{kind}'{did_you_mean(kind, KINDS)}; one of {', '.join(KINDS)}")
    if layout == "json":
        click.echo(json.dumps(method_records() if kind == "methods" else list(KINDS[kind]())))
        return
    entries = KINDS[kind]()
    width = max(map(len, entries), default=0)
    for name, remark in entries.items():
        click.echo(f"{name:<{width}}  {remark}".rstrip())
