"""Which runs stand beside each other in one table: those of one suite, with the same scorers and the same settings."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bench.suites import Suite, of_before

# Settings that change how fast a number is made but not the number, or that are chosen when a table is read.
INCIDENTAL = {
    "train.micro_batch",
    "train.log_every",
    "data.batch_size",
    "train.gradient_checkpointing",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.stop_on_collapse",
    "opponent.batch_size",
    "evaluation.batch_size",
    "evaluation.protocol",
}
DESCRIPTION = ("title", "reads", "columns")  # of a metric in the protocol: no number depends on it


def mismatch(run: dict, kept: list[dict]) -> str:
    """Why a run does not belong beside those kept; "" if it does."""
    if not kept:
        return ""
    anchor = kept[0]
    mine, theirs = _shared(run), _shared(anchor)
    different = [key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]
    if different:
        return f"another suite than {anchor['id']}: {_differences(different, mine, theirs)}"
    mine, theirs = (_flat(_scorers(r)) for r in (run, anchor))
    different = [key for key in mine if key in theirs and mine[key] != theirs[key]]
    if different:
        return f"other scorers than {anchor['id']}: {_differences(different, mine, theirs)}"
    method = run["protocol"].get("method")
    same = next((k for k in kept if k["protocol"].get("method") == method), None)
    if same:
        defaults = {**_defaults(same), **_defaults(run)}
        mine, theirs = _own(run, defaults), _own(same, defaults)
        different = [key for key in mine if key in theirs and mine[key] != theirs[key]]
        if different:
            return f"{method} with other settings than {same['id']}: {_differences(different, mine, theirs)}"
    return ""


def with_defaults(suite: dict) -> dict:
    """A suite written before a setting existed was run with what is now its default."""
    suite = of_before(suite)
    try:
        return Suite.model_validate(suite).model_dump(mode="json")
    except ValidationError:
        return suite


def _shared(run: dict) -> dict[str, Any]:
    """What must be equal in every row of a comparison, flattened to dotted keys."""
    rooms = {
        name: run["suite"].get(name) for name in ("model", "data", "train", "opponent", "evaluation", "metric_options")
    }
    rooms["weights"] = run["protocol"].get("model")
    return {key: value for key, value in _flat(rooms).items() if key not in INCIDENTAL}


def _own(run: dict, defaults: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in runs of one method: its settings, over the sections of the suite that they change.

    `defaults` of the method's options stand where a run says nothing of one. Checkpoints need not be equal: they leave
    the training as it is.
    """
    entry = run["suite"].get("methods", {}).get(run["protocol"].get("method"), {})
    done = run["protocol"].get("schedule", entry.get("iterations", []))
    entry = {**entry, "iterations": [{**defaults, **iteration} for iteration in done]}
    changed = {name: {**run["suite"].get(name, {}), **entry.get(name, {})} for name in ("train", "opponent")}
    settings = _flat({**entry, **changed}).items()
    return {key: value for key, value in settings if key not in INCIDENTAL and ".checkpoints" not in key}


def _defaults(run: dict) -> dict[str, Any]:
    """The defaults of the options that a run's protocol declares."""
    options = run["protocol"].get("options", [])
    return {option["name"]: option["default"] for option in options if "default" in option}


def _scorers(run: dict) -> dict[str, dict]:
    """How each metric's numbers came about; how they are called and shown may differ."""
    return {
        name: {key: value for key, value in info.items() if key not in DESCRIPTION}
        for name, info in run["protocol"].get("metrics", {}).items()
    }


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [_flat(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in items]
        return {key: item for part in parts for key, item in part.items()}
    return {prefix: value}


def _differences(keys: list[str], mine: dict, theirs: dict) -> str:
    shown = [
        f"{key} {str(mine.get(key, 'unset'))[:40]} against {str(theirs.get(key, 'unset'))[:40]}" for key in keys[:2]
    ]
    return ", ".join(shown) + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")
