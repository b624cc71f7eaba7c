"""What each model cost, summed over the iterations that led to it."""

from __future__ import annotations

import re

import pandas as pd

from reports.load import BASE, Runs

STAGE = re.compile(r"^iter(\d+)/(train|opponent)$")  # what makes a model; tests of it are not its price


def costs(runs: Runs) -> pd.DataFrame:
    """One row a model, cumulative over its iterations, means over training seeds.

    Columns model, pairs (winners) seen, train_flops, sample_flops (the opponent's images), seconds, device.
    The base costs nothing here.
    """
    rows = []
    for label, (method, iteration) in runs.models.items():
        if method == BASE:
            rows.append({"model": label, "pairs": 0, "train_flops": 0.0, "sample_flops": 0.0, "seconds": 0.0})
            continue
        found = [
            _until(runs.costs[run], iteration)
            for run, protocol in runs.protocols.items()
            if protocol.get("method") == method and runs.costs.get(run)
        ]
        rows += [{"model": label, **cost} for cost in found if cost]
    columns = ["model", "pairs", "train_flops", "sample_flops", "seconds", "device"]
    table = pd.DataFrame(rows, columns=columns)
    mean = table.groupby("model", sort=False)[columns[1:-1]].mean()
    return mean.join(table.groupby("model", sort=False)["device"].first()).reset_index()


def _until(cost: dict, iteration: int) -> dict | None:
    """Costs of the training stages up to an iteration; None where the record does not reach it."""
    total = {"pairs": 0, "train_flops": 0.0, "sample_flops": 0.0, "seconds": 0.0}
    reached = 0
    for stage in cost.get("stages", []):
        found = STAGE.match(str(stage.get("name", "")))
        if not found or int(found[1]) > iteration:
            continue
        total["seconds"] += stage.get("seconds") or 0.0
        total["train_flops" if found[2] == "train" else "sample_flops"] += stage.get("flops") or 0.0
        if found[2] == "train":
            total["pairs"] += stage.get("pairs") or 0
            reached = max(reached, int(found[1]))
    total["device"] = str(cost.get("device", ""))
    return total if reached == iteration else None


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
