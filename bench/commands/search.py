"""The command that searches settings. As in cli.py, heavy imports are inside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.errors import BenchError, UsageError, did_you_mean
from bench.runtime import processes

if TYPE_CHECKING:
    import pandas as pd

    from bench.search.search import Search


@click.command()
@click.argument("methods", nargs=-1, metavar="[METHOD]...")
@click.option(
    "--suite",
    default="mini-measured",
    show_default=True,
    help="A suite of `bench list suites`, or a YAML file, with a search section.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for bench run.")
@click.option(
    "--storage",
    metavar="URL",
    help="A database that workers on all hosts reach, e.g. "
    "postgresql://host/name.  [default: a journal in results/search, for hosts that share it]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes here; more may be started at any time, here or elsewhere.",
)
@click.option("--worker", is_flag=True, help="Only do trials until none is left; print no result.")
@click.option(
    "--import",
    "earlier",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A table that -o wrote: what is in it is not tried again.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Everything tried, as .csv, or as .parquet with the scores of every prompt.",
)
def search(
    methods: tuple[str, ...],
    suite: str,
    settings: tuple[str, ...],
    storage: str | None,
    jobs: int,
    worker: bool,
    earlier: Path | None,
    output: Path | None,
) -> None:
    """Search the settings of METHODs (default: all with a grid).

    Every method has the same budget, on validation prompts. Killed or started again, it goes on; several may work at
    once. Exit status 1 when a best setting lies at an end of its grid.
    """
    for path in (earlier, output):
        if path and path.suffix not in (".csv", ".parquet"):
            raise UsageError(f"{path}: tables of a search are .csv or .parquet")
    if worker and output:
        raise UsageError("-o does not go with --worker, which only does trials; started without it, the command writes")
    if processes.count() > 1:
        raise UsageError("bench search is not started by a launcher: start it once a GPU instead, on one storage")
    if find_spec("optuna") is None:
        raise BenchError(
            "bench search needs optuna, which is not installed: pip install 'diffusion-align-bench[search]'"
        )
    from bench.suites import load_suite

    chosen = load_suite(suite, settings)
    from bench.search import grids

    grids.check(chosen)
    known = grids.of(chosen).grids
    for method in methods:
        if method not in known:
            raise UsageError(
                f"search.grids: suite '{chosen.name}' has no grid for '{method}'"
                f"{did_you_mean(method, known)}; it has {', '.join(known)}"
            )
    same = [
        "--suite",
        suite,
        *(part for setting in settings for part in ("--set", setting)),
        *(("--storage", storage) if storage else ()),
    ]
    with _beside(jobs - 1, [*methods, *same]):
        from bench.search.queue import open_storage
        from bench.search.search import Search
        from bench.search.trials import FOLDER

        found = Search(chosen, methods or tuple(known), open_storage(FOLDER, storage))
        if earlier:
            rows = _read(earlier)
            click.echo(f"{earlier}: {found.adopt(rows)} of {len(rows)} results taken", err=True)
        found.work(lambda line: click.echo(line, err=True))
    if not worker:
        _show(found, output)


@contextmanager
def _beside(count: int, arguments: Sequence[str]) -> Iterator[None]:
    """Further workers while the block does a worker's part too; with fewer threads each, set before torch is loaded."""
    if count:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (count + 1))))
    others = [subprocess.Popen([sys.executable, "-m", "bench", "search", "--worker", *arguments]) for _ in range(count)]
    try:
        yield
    except BaseException:
        for other in others:
            other.terminate()
        raise
    finally:
        for other in others:
            other.wait()


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def _show(found: Search, output: Path | None) -> None:
    """Print the table, the choices, and the lines for the suite; fail when a grid must be widened."""
    from bench.search import choice

    table = found.table()
    if output and output.suffix == ".csv":
        table.drop(columns="prompts").to_csv(output, index=False, float_format="%.9g")
    elif output:
        table.to_parquet(output, index=False)
    click.echo(table.drop(columns=["prompts", "identity"]).to_string(index=False, na_rep=""))
    lines, chosen, wide = found.verdicts()
    click.echo("\n".join(["", *lines]))
    if chosen:
        click.echo("\nfor the suite:\n" + choice.yaml_lines(chosen))
    if wide:
        raise BenchError(
            f"not chosen yet: {'; '.join(wide)}; move this grid of search.grids, or widen those of all methods alike"
        )
