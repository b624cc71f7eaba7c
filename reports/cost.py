"""What each model cost, summed over the trainings that led to it."""

from __future__ import annotations

import re

import pandas as pd

from bench.reports.load import BASE, Runs
from bench.storage.runs import Result

OPPONENT = re.compile(r"^iter(\d+)/opponent$")


def costs(runs: Runs) -> pd.DataFrame:
    """One row a model, cumulative over what led to it, means over training seeds.

    Columns model, pairs (winners) seen, train_flops, sample_flops (the opponent's images), seconds, device.
    The base costs nothing here. A checkpoint has what its training had cost by then, and all of its iteration's
    opponent, whose images are made before the first step.
    """
    rows = []
    for label, result in runs.models.items():
        if result.method == BASE:
            rows.append({"model": label, "pairs": 0, "train_flops": 0.0, "sample_flops": 0.0, "seconds": 0.0})
            continue
        found = [
            _until(runs.costs[run], result)
            for run, protocol in runs.protocols.items()
            if protocol.get("method") == result.method and runs.costs.get(run)
        ]
        rows += [{"model": label, **cost} for cost in found if cost]
    columns = ["model", "pairs", "train_flops", "sample_flops", "seconds", "device"]
    table = pd.DataFrame(rows, columns=columns)
    mean = table.groupby("model", sort=False)[columns[1:-1]].mean()
    return mean.join(table.groupby("model", sort=False)["device"].first()).reset_index()


def _until(cost: dict, result: Result) -> dict | None:
    """Costs of what made a result, tests of it not among them; None where the record does not reach it."""
    ends = {f"iter{iteration}/train" for iteration in range(1, result.iteration)}
    trained = [
        stage
        for stage in [*cost.get("stages", []), *cost.get("checkpoints", [])]
        if stage.get("name") in ends | {f"{result.name}/train"}
    ]
    if not any(stage["name"] == f"{result.name}/train" for stage in trained):
        return None
    opponents = [
        stage
        for stage in cost.get("stages", [])
        if (found := OPPONENT.match(str(stage.get("name")))) and int(found[1]) <= result.iteration
    ]
    return {
        "pairs": sum(stage.get("pairs") or 0 for stage in trained),
        "train_flops": sum(stage.get("flops") or 0.0 for stage in trained),
        "sample_flops": sum(stage.get("flops") or 0.0 for stage in opponents),
        "seconds": sum(stage.get("seconds") or 0.0 for stage in [*trained, *opponents]),
        "device": str(cost.get("device", "")),
    }


def duration(seconds: float) -> str:
    """4.2 s, 3.5 min, 2.1 h."""
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def flops(count: float) -> str:
    """3.2 TFLOP: a count, not a rate."""
    for size, unit in ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} FLOP"
