"""What there is to choose from: for each kind a mapping from name to a remark for people."""

from __future__ import annotations

from typing import Any

from bench import registry, suites
from bench.errors import BenchError
from bench.storage import runs
from bench.suites import options


def _methods() -> dict[str, str]:
    """Where each comes from, and a line for each of its options: name, type, default, what it is."""
    return {
        record["name"]: "\n".join(
            [record["target"], *record.get("problem", "").splitlines(), *map(_option, record["options"])]
        )
        for record in method_records()
    }


def method_records() -> list[dict[str, Any]]:
    """Name, target, title and options of every method; of one that cannot be imported the problem instead."""
    return [_method_record(name, target) for name, target in registry.targets("methods").items()]


def _method_record(name: str, target: str) -> dict[str, Any]:
    try:
        found = registry.method(name)
        own = [option.record() for option in options.options(found).values()]
        return {"name": name, "target": target, "title": found.title, "options": own}
    except BenchError as error:
        return {"name": name, "target": target, "options": [], "problem": str(error)}


def _option(record: dict[str, Any]) -> str:
    default = f"default {record['default']}" if "default" in record else "required"
    return f"  {record['name']}: {record['type']}, {default}" + (f"; {record['meaning']}" if record["meaning"] else "")


def _prompt_sets() -> dict[str, str]:
    from bench.data.prompts import PUBLISHED, WORLD_SETS

    drawn = {f"world:{name}": f"{count} prompts of the drawn world" for name, (count, *_) in WORLD_SETS.items()}
    return drawn | {
        name: f"{published.remark}, from the hub ({published.repository}) or {name}:FOLDER"
        for name, published in PUBLISHED.items()
    }


def _progress(identity: str) -> str:
    """Method, suite, seed, and how far a run has come."""
    try:
        run = runs.load(identity)
    except BenchError as error:
        return str(error)
    trained = sum((run.folder / f"iter{k + 1}" / "stage.json").exists() for k in range(run.iterations))
    state = "finished" if runs.finished(run.folder) else "not finished"
    return (
        f"{run.method}, suite {run.suite.name}, seed {run.seed}, "
        f"{trained} of {run.iterations} iteration(s) trained, {state}"
    )


KINDS = {
    "methods": _methods,
    "metrics": lambda: registry.targets("metrics"),
    "suites": lambda: {name: suites.load_suite(name).description for name in suites.available()},
    "prompts": _prompt_sets,
    "runs": lambda: {identity: _progress(identity) for identity in runs.ids()},
}
