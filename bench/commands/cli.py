"""The command line. Heavy imports happen inside the commands: help, lists and mistakes answer at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bench import __version__
from bench.commands import agree, costs, search, store
from bench.errors import BenchError, UsageError, did_you_mean, printable
from bench.runtime import failures, processes

if TYPE_CHECKING:
    from bench.storage.runs import Run
    from bench.suites import Suite

PAGE = "report.html"
as_json = click.option("--format", "layout", type=click.Choice(["text", "json"]), default="text", show_default=True)


class Commands(click.Group):
    """Lists commands in the order they are used, and knows what a mistyped one was meant to be."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            raise UsageError(f"unknown command '{args[0]}'{did_you_mean(args[0], known)}; commands: {', '.join(known)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:  # click takes it for the end of its terminal; here it is a file that is cut short
            raise BenchError(f"EOFError: {error} (BENCH_DEBUG=1 shows where)") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bench")
def cli() -> None:
    """Train, sample, score and compare alignment methods for text-to-image diffusion models."""


@cli.command()
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
        finished = _execute(resumed.suite, [resumed], mongo, sql, wait)
    else:
        chosen = load_suite(suite or "mini", settings)
        if method is None:
            raise UsageError(f"--method is missing: all, or one of {', '.join(chosen.methods)}")
        plans = _planned(chosen, chosen.entries(method), seed or 0, iters, only_self_play=method == "all")
        finished = _execute(chosen, plans, mongo, sql)
    _compare(finished, layout)


def _planned(
    suite: Suite, methods: Sequence[str], seed: int, iters: int | None, only_self_play: bool
) -> list[dict[str, Any]]:
    """Settings of the runs to make, checked as far as is possible before anything is loaded."""
    from bench.experiment import planned_iterations
    from bench.methods.base import Pairing

    plans = []
    for method in methods:
        count = planned_iterations(method, suite, iters, only_self_play)
        if suite.methods[method].opponent and suite.method(method).pairing is not Pairing.SELF_PLAY:
            raise UsageError(f"methods.{method}.opponent: {suite.kind(method)} does not play against itself")
        plans.append({"method": method, "suite": suite, "seed": seed, "iterations": count})
    return plans


def _execute(
    suite: Suite, plans: Sequence[Run | dict[str, Any]], mongo: str | None, sql: str | None, wait: bool = False
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
            click.echo(
                f"{current.folder}: {current.method}, {current.iterations} iteration(s), suite "
                f"{suite.name}, seed {current.seed}",
                err=True,
            )
        try:
            execute(current, shared, mongo, sql, wait)
        except Interrupted as error:
            left = [later["method"] for later in plans[position + 1 :]]
            raise Interrupted(f"{error}" + (f"; not started: {', '.join(left)}" if left else "")) from None
        finished.append(current)
    shared.processes.end()
    return finished


def _compare(finished: list[Run], layout: str) -> None:
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


@cli.command()
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


@cli.command()
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
    help="mean, median, winrate, or agreement: rank "
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
    from bench.reports import agreement, load, stats, tables

    tables.one_of(stat, (*stats.STATS, agreement.STAT), "--stat")
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
    if stat == agreement.STAT:
        if against:
            raise UsageError("--against does not go with --stat agreement: it compares metrics, not models")
        tidy = agreement.table(runs, prompt_set, guidance, chosen, protocol)
        click.echo(agreement.render(tidy, layout).rstrip("\n"))
        return
    tidy = tables.table(runs, stat, against, prompt_set, guidance, chosen, protocol)
    if tidy["metric"].isin(stats.AVERAGES).any():
        click.echo(f"note: {tables.average_note(runs)}", err=True)
    click.echo(tables.render(tidy, layout).rstrip("\n"))


def _refuse_beside_paper(**given: Any) -> None:
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name.replace('_', '-')} does not go with --paper: the paper's table decides that")


@cli.command()
@click.argument("images", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    help="csv, jsonl or parquet with file_name and prompt, or txt with one prompt a line for the images in "
    "order of their names.  [default: metadata.jsonl or the like in the folder]",
)
@click.option(
    "--metrics",
    help="Metrics of `bench list metrics`, e.g. pickscore,hpsv2.  [default: the mini suite's but the judge]",
)
@click.option("--weights", help="mini or official, for all of them.  [default: mini, with --backend official official]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="METRIC.KEY=VALUE",
    help="A setting of one metric, e.g. --set hpsv2.antialias=false. May be repeated.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--backend",
    type=click.Choice(["ours", "official"]),
    default="ours",
    show_default=True,
    help="official: the hpsv2 and image-reward packages themselves beside ours, and the largest difference.",
)
@click.option("--official-python", metavar="PATH", help="The Python of the environment that has these packages.")
@click.option("--strict", is_flag=True, help="Fail when an image or a prompt has a problem.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A .parquet or .csv file.")
@as_json
def score(
    images: Path,
    prompts: Path | None,
    metrics: str | None,
    weights: str | None,
    settings: tuple[str, ...],
    device: str,
    backend: str,
    official_python: str | None,
    strict: bool,
    output: Path | None,
    layout: str,
) -> None:
    """Score a folder of images against their prompts.

    What is broken is named and left without scores. Scores of before are not computed again.
    """
    from bench import registry
    from bench.scoring import official
    from bench.scoring import score as scoring
    from bench.scoring.named import beyond_their_world
    from bench.storage import runs

    beside = backend == "official"
    default = official.DEFAULT if beside else scoring.DEFAULT
    names = metrics.split(",") if metrics else list(default)
    for name in names:
        registry.check("metrics", name)
    if output and output.suffix not in (".parquet", ".csv"):
        raise UsageError(f"-o {output}: scores are written as .parquet or .csv")
    if official_python and not beside:
        raise UsageError("--official-python goes with --backend official")
    options = scoring.metric_options(names, weights or ("official" if beside else "mini"), settings)
    if beside:
        official.require(names, official_python)
    table, protocol = scoring.score_folder(
        scoring.collect(images, prompts), names, options, device, runs.CACHE / "scores.sqlite"
    )
    if beside:
        protocol["official"] = official.compare(images, table, names, options, device, official_python)
    click.echo(scoring.truncation(protocol), err=True)
    if warning := beyond_their_world(table.loc[table["problem"] == "", "prompt"], protocol["metrics"]):
        click.echo(warning, err=True)
    if output:
        scoring.write(table, protocol, output)
    if layout == "json":
        click.echo(json.dumps({"protocol": protocol, "scores": json.loads(table.to_json(orient="records"))}))
    else:
        click.echo(scoring.summary(table, names, protocol))
        if beside:
            click.echo(official.summary(protocol["official"]))
    troubled = int((table["problem"] != "").sum())
    if strict and troubled:
        raise BenchError(f"{troubled} of {len(table)} images were not scored (--strict)")


@cli.command("list")
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


@cli.command()
@click.argument("name", metavar="RUN")
@click.option("--iter", "iteration", type=int, help="Which iteration.  [default: the last]")
@click.option("--step", type=int, help="Which of its checkpoints, by steps within it.  [default: its end]")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder that does not exist yet.",
)
def export(name: str, iteration: int | None, step: int | None, output: Path) -> None:
    """Write a trained model as a diffusers pipeline folder.

    The folder loads whole with StableDiffusionPipeline.from_pretrained and has a model card.
    """
    from bench.commands.export import export_run

    click.echo(str(export_run(name, iteration, output, step)))


@cli.command()
@click.option("--model", default="mini", show_default=True, help="mini, a diffusers pipeline folder or a hub id.")
@click.option("--prompts", required=True, help="A txt, csv, jsonl or parquet file, or a set of `bench list prompts`.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first prompts.")
@click.option(
    "--guidance",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="1 samples the model itself; below 1 leans towards the empty prompt, where diffusers' pipelines "
    "switch guidance off.",
)
@click.option("--steps", type=click.IntRange(min=1, max=1000), default=20, show_default=True)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=[5775709],
    show_default=True,
    help="May be repeated: one image a prompt for each.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path))
def sample(
    model: str,
    prompts: str,
    limit: int | None,
    guidance: float,
    steps: int,
    seeds: tuple[int, ...],
    batch_size: int,
    output: Path,
) -> None:
    """Sample images for prompts into a folder.

    Its prompts.csv says which file belongs to which prompt.
    """
    from bench.data import load_prompts

    chosen = load_prompts(prompts, limit)
    from bench.commands.export import sample_folder

    sample_folder(model, chosen, output, guidance=guidance, steps=steps, seeds=seeds, batch_size=batch_size)
    click.echo(str(output))


cli.add_command(agree.agree)
cli.add_command(store.verify)
cli.add_command(costs.plan)
cli.add_command(costs.perf)
cli.add_command(costs.doctor)
cli.add_command(search.search)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a mistake or a failure is one line on stderr, with BENCH_DEBUG=1 the whole trace."""
    if os.environ.get("BENCH_DEBUG"):
        cli.main(arguments, prog_name="bench")
    try:
        with failures.stopping_in_order():
            sys.exit(cli.main(arguments, prog_name="bench", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        hint = f"; see {error.ctx.command_path} --help" if getattr(error, "ctx", None) else ""
        _fail(error.format_message().rstrip(".") + hint, error.exit_code)
    except BenchError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        _fail(failures.stopped(error), 130)
    except BrokenPipeError:
        # The reader has gone, as in `bench table | head`; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(failures.explained(error) or f"{type(error).__name__}: {error} (BENCH_DEBUG=1 shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    processes.fail(printable(f"bench: {' '.join(message.split())}"), code)


if __name__ == "__main__":
    main()
