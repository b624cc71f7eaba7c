"""`python -m bench.search`: the hyperparameter search of a suite, every method until its best lies inside its grid.

A method is judged on validation prompts alone, by one number: the judge's mean utility over the suite's guidance
scales. A grid whose best setting lay at its edge was widened there, so that no method loses for want of search; how
many settings each was given is in the table. Methods that play against themselves choose their settings iteration by
iteration, each from the best so far, because their iterations may differ (the paper's do). The table of everything
tried is the result; the winning settings go into the suite by hand, where they can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pandas as pd

from bench import runs
from bench.experiment import Experiment
from bench.shared import Shared
from bench.suites import Iteration, Suite, load_suite

VALIDATION = ("evaluation.prompt_sets={validation: {prompts: 'world:validation', limit: 150}}", "metrics=[]")

# What is tried: (steps, [(lr, beta), ...]) an iteration. Three times 300 steps for every method.
GRIDS: dict[str, list[tuple[int, list[tuple[float, float | None]]]]] = {
    "sft": [(300, [(3e-5, None), (1e-4, None), (3e-4, None), (5e-4, None), (1e-3, None), (3e-3, None)])],
    "diffusion_dpo": [(300, [(2e-5, 30.0), (1e-4, 30.0),
                             (1e-5, 100.0), (2e-5, 100.0), (5e-5, 100.0), (1e-4, 100.0), (2e-4, 100.0),
                             (2e-5, 300.0), (5e-5, 300.0), (1e-4, 300.0), (2e-5, 1000.0), (5e-5, 1000.0)])],
    "spin": [(100, [(2e-5, 100.0), (5e-5, 100.0), (2e-5, 300.0), (5e-5, 300.0), (2e-5, 1000.0), (5e-5, 1000.0),
                    (1e-4, 1000.0), (1e-4, 3000.0)]),
             (100, [(1e-5, 300.0), (2e-6, 1000.0), (5e-6, 1000.0), (1e-5, 1000.0), (5e-6, 3000.0), (1e-5, 3000.0),
                    (1e-5, 10000.0), (2e-5, 10000.0)]),
             (100, [(2e-6, 3000.0), (5e-6, 3000.0), (5e-6, 10000.0), (1e-5, 10000.0)])],
    "spin-g3": [(100, [(2e-5, 100.0), (5e-5, 100.0), (2e-5, 300.0), (5e-5, 300.0), (2e-5, 1000.0), (5e-5, 1000.0),
                       (1e-4, 1000.0), (1e-4, 3000.0), (5e-5, 3000.0), (2e-5, 3000.0)]),
                (100, [(1e-5, 1000.0), (1e-5, 3000.0), (1e-5, 10000.0), (5e-6, 3000.0), (2e-5, 3000.0),
                       (5e-6, 10000.0), (2e-6, 3000.0), (2e-6, 10000.0), (2e-6, 1000.0), (1e-6, 3000.0)]),
                (100, [(1e-6, 3000.0), (5e-7, 3000.0), (2e-6, 3000.0), (1e-6, 10000.0)])],
}


def search(method: str, suite: Suite, shared: Shared, seed: int) -> Iterator[dict]:
    """Try every candidate of every iteration; yields a row each, the last of an iteration's rows once chosen."""
    settled: list[Iteration] = []
    for number, (steps, candidates) in enumerate(GRIDS[method], start=1):
        rows = []
        for lr, beta in candidates:
            schedule = [*settled, Iteration(steps=steps, lr=lr, beta=beta)]
            rows.append({"method": method, "iteration": number, "steps": steps, "lr": lr, "beta": beta,
                         "pairs": steps * suite.train.batch_size, "seed": seed,
                         **utilities(method, suite, schedule, shared, seed)})
            click.echo(rows[-1], err=True)
        best = max(range(len(rows)), key=lambda row: rows[row]["utility"])
        settled.append(Iteration(steps=steps, lr=candidates[best][0], beta=candidates[best][1]))
        yield from ({**row, "chosen": index == best} for index, row in enumerate(rows))


def utilities(method: str, suite: Suite, schedule: list[Iteration], shared: Shared, seed: int) -> dict[str, float]:
    """Train the schedule (finished iterations are reused) and return the last model's gain over the base."""
    entry = suite.methods[method].model_copy(update={"iterations": schedule})
    tried = suite.model_copy(update={"methods": {method: entry}})
    run = runs.Run(f"search-{method}-s{seed}", method, seed, len(schedule), tried)
    Experiment(run, shared).stages(lambda *scalar: None)
    scores = pd.read_parquet(run.folder / "scores.parquet")
    utility = scores[scores["metric"] == "judge/utility"].groupby(["iteration", "guidance"])["value"].mean()
    last, base = utility[len(schedule)], utility[0]
    return {"utility": last.mean(), "gain": (last - base).mean(),
            **{f"gain_g{guidance:g}": last[guidance] - base[guidance] for guidance in last.index}}


@click.command()
@click.argument("methods", nargs=-1)
@click.option("--suite", default="mini-measured", show_default=True)
@click.option("--seed", default=100, show_default=True, help="Training seed: none that the comparison uses.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("results/search"), show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the table goes (CSV).")
def main(methods: tuple[str, ...], suite: str, seed: int, work: Path, output: Path | None) -> None:
    """Search the settings of METHODS (all by default)."""
    runs.RUNS = work
    chosen = load_suite(suite, VALIDATION)
    wanted = methods or tuple(GRIDS)
    shared = Shared(chosen, wanted)
    rows = [row for method in wanted for row in search(method, chosen, shared, seed)]
    table = pd.DataFrame(rows)
    click.echo(table.to_string(index=False))
    if output:
        table.to_csv(output, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
