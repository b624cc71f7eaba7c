"""What there is to choose from: for each kind a mapping from name to a remark for people."""

from __future__ import annotations

from bench import registry, runs, suites
from bench.errors import BenchError


def _prompt_sets() -> dict[str, str]:
    from bench.data.prompts import PUBLISHED, WORLD_SETS

    drawn = {f"world:{name}": f"{count} prompts of the drawn world" for name, (count, *_) in WORLD_SETS.items()}
    return drawn | {name: f"{published.remark}, from the hub ({published.repository}) or {name}:FOLDER"
                    for name, published in PUBLISHED.items()}


def _progress(identity: str) -> str:
    """Method, suite, seed, and how far a run has come."""
    try:
        run = runs.load(identity)
    except BenchError as error:
        return str(error)
    trained = sum((run.folder / f"iter{k + 1}" / "stage.json").exists() for k in range(run.iterations))
    state = "finished" if runs.finished(run.folder) else "not finished"
    return (f"{run.method}, suite {run.suite.name}, seed {run.seed}, "
            f"{trained} of {run.iterations} iteration(s) trained, {state}")


KINDS = {
    "methods": lambda: registry.targets("methods"),
    "metrics": lambda: registry.targets("metrics"),
    "suites": lambda: {name: suites.load_suite(name).description for name in suites.available()},
    "prompts": _prompt_sets,
    "runs": lambda: {identity: _progress(identity) for identity in runs.ids()},
}
