"""The command that trains, samples, scores and compares. As in cli.py, heavy imports are inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.commands.options import PAGE, as_json
from bench.errors import UsageError
from bench.runtime import failures, processes

if TYPE_CHECKING:
    from bench.storage.runs import Run
    from bench.suites import Suite


@click.command()
@click.option(
    "--method",
    help="A method of `bench list methods`, or a variant that the suite names; all: every one of the suite in turn.",
)
@click.option(
    "--iters",
    type=int,
    help="How many iterations (default: as many as the suite lists). With "
    "--method all this is for self-play; the other methods keep what the suite lists.",
)
@click.option("--suite", help="A suite of `bench list suites`, or a YAML file.  [default: mini]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    help="Seed of training and of the opponent's samples; evaluation samples are seeded by the suite.  [default: 0]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the suite, e.g. --set evaluation.steps=10. May be repeated.",
)
@click.option(
    "--resume",
    metavar="RUN",
    help="Go on with a run that was interrupted, as it was started; "
    "with --set metrics=[...] other scorers read the images that are there.",
)
@click.option(
    "--replay",
    metavar="RUN",
    help="Make a finished run again from its own protocol, apart from the other ones, and say whether it is equal to "
    "the last bit, or where it first differs.",
)
@click.option(
    "--once",
    is_flag=True,
    help="Only what is not there yet: a finished run of the same settings counts, an unfinished one is gone on with.",
)
@click.option("--wait", is_flag=True, help="When another process works on the run, wait for it instead of leaving.")
@click.option("--mongo", metavar="URL", help="Record the run in a MongoDB too, e.g. mongodb://host/database.")
@click.option("--sql", metavar="URL", help="Record the run in an SQL database too, e.g. sqlite:///runs.db.")
@as_json
def run(
    method: str | None,
    iters: int | None,
    suite: str | None,
    seed: int | None,
    settings: tuple[str, ...],
    resume: str | None,
    replay: str | None,
    once: bool,
    wait: bool,
    mongo: str | None,
    sql: str | None,
    layout: str,
) -> None:
    """Train, sample, score, and print the comparison so far.

    Whatever was cut short goes on with --resume. The last line printed is the path of the page.
    """
    if iters is not None and iters < 1:
        raise UsageError(f"--iters: a run has at least 1 iteration, not {iters}")
    if replay:
        if any(
            given not in (None, (), False) for given in (method, iters, suite, seed, settings, resume, once, mongo, sql)
        ):
            raise UsageError("--replay takes all settings from the run's own protocol: give no others")
        from bench.commands.replay import replay_run

        replay_run(replay, layout)
        return
    from bench.storage import runs
    from bench.suites import load_suite, override

    if mongo or sql:
        from bench.storage.tracking import require_drivers

        require_drivers(mongo, sql)
    if resume:
        resumed = runs.load(resume)
        wanted = load_suite(suite, settings) if suite else override(resumed.suite, settings)
        asked = {"method": method, "seed": seed, "iterations": iters}
        runs.refuse_changes(
            resumed,
            {name: value for name, value in asked.items() if value is not None} | {"suite": wanted.model_dump()},
        )
        resumed = runs.rescored(resumed, wanted)
        if processes.index() == 0:
            with runs.held(resumed, wait):  # said before models are loaded and data encoded
                pass
        finished = execute_all(resumed.suite, [resumed], mongo, sql, wait)
    else:
        chosen = load_suite(suite or "mini", settings)
        if method is None:
            raise UsageError(f"--method is missing: all, or one of {', '.join(chosen.methods)}")
        plans = _planned(chosen, chosen.entries(method), seed or 0, iters, only_self_play=method == "all")
        there = {plan["method"]: _same(plan) if once else None for plan in plans}
        left = [there[plan["method"]] or plan for plan in plans if not _done(there[plan["method"]])]
        finished = [run for run in there.values() if run and _done(run)]
        finished += execute_all(chosen, left, mongo, sql, wait) if left else []
    compare(finished, layout)


def _planned(
    suite: Suite, methods: Sequence[str], seed: int, iters: int | None, only_self_play: bool
) -> list[dict[str, Any]]:
    """Settings of the runs to make, checked as far as is possible before anything is loaded."""
    from bench.experiment import planned_iterations
    from bench.methods.base import Pairing

    plans = []
    for method in methods:
        count = planned_iterations(method, suite, iters, only_self_play)
        entry = suite.methods.get(method)
        if entry and entry.opponent and suite.method(method).pairing is not Pairing.SELF_PLAY:
            raise UsageError(f"methods.{method}.opponent: {suite.kind(method)} does not play against itself")
        plans.append({"method": method, "suite": suite, "seed": seed, "iterations": count})
    return plans


def _same(plan: dict[str, Any]) -> Run | None:
    """The first run that was started with the same settings, if there is one."""
    from bench.storage import runs

    def settings(run: Run) -> dict[str, Any]:
        return {name: value for name, value in run.config().items() if name != "run"}

    wanted = settings(runs.Run("", **plan))
    return next((run for run in map(runs.load, runs.ids()) if settings(run) == wanted), None)


def _done(run: Run | None) -> bool:
    from bench.storage import runs

    return run is not None and runs.finished(run.folder)


def execute_all(
    suite: Suite,
    plans: Sequence[Run | dict[str, Any]],
    mongo: str | None = None,
    sql: str | None = None,
    wait: bool = False,
) -> list[Run]:
    """Run one after another; a run's folder is made when its turn comes."""
    from bench.experiment import Interrupted, execute
    from bench.shared import Shared
    from bench.storage import runs

    methods = [plan["method"] if isinstance(plan, dict) else plan.method for plan in plans]
    try:
        shared = Shared(suite, methods)
    except KeyboardInterrupt as error:
        again = f"bench run --resume {plans[0].id}" if not isinstance(plans[0], dict) else "the same command"
        raise Interrupted(
            f"{failures.stopped(error)} before a run was started; what was encoded is kept, to go on: {again}"
        ) from None
    finished = []
    for position, plan in enumerate(plans):
        current = shared.processes.once(partial(runs.create, **plan)) if isinstance(plan, dict) else plan
        if shared.processes.main:
            what = "as it is" if current.method in suite.models else f"{current.iterations} iteration(s)"
            click.echo(f"{current.folder}: {current.method}, {what}, suite {suite.name}, seed {current.seed}", err=True)
        try:
            execute(current, shared, mongo, sql, wait)
        except Interrupted as error:
            left = [later["method"] for later in plans[position + 1 :]]
            raise Interrupted(f"{error}" + (f"; not started: {', '.join(left)}" if left else "")) from None
        finished.append(current)
    shared.processes.end()
    return finished


def compare(finished: list[Run], layout: str) -> None:
    """Print how the runs just made compare with the other ones of their suite and seed; write the page."""
    from bench.storage import runs

    if processes.index() > 0:
        return
    from bench.reports import load, page, tables, verdict
    from bench.reports.summary import summary

    loaded = load.load_runs([run.folder for run in runs.comparable(finished[-1])])
    path = page.write(loaded, Path(PAGE))
    if layout == "json":
        table = json.loads(tables.render(tables.table(loaded), "json"))
        identities = [run.id for run in finished]
        found = verdict.verdicts(loaded)
        clear = {"headline": verdict.headline(found), "verdicts": [one.as_dict() for one in found]}
        click.echo(json.dumps({"runs": identities, **clear, "table": table, "page": str(path)}, indent=1))
    else:
        click.echo(summary(loaded))
        click.echo(str(path))
