"""This machine's rates, ours beside a baseline: both measured in turn in one run, so that their ratio holds even where
the machine is busy with other things and neither rate alone does.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.runtime.progress import quiet, track
from bench.storage.stages import atomic_write

MATMUL = {"cpu": 1536, "cuda": 8192}  # side of the square matrices whose product shows the device's peak
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
Row = dict[str, Any]


def interleave(
    work: Mapping[str, Callable[[], float]], repeats: int, device: torch.device, description: str
) -> dict[str, list[float]]:
    """Rates of each kind of work, `repeats` times in turn after one round that does not count.

    Each callable does its work once and returns how much it was; a rate is that over its seconds.
    """
    rates: dict[str, list[float]] = {name: [] for name in work}
    with track(None, description, total=(repeats + 1) * len(work), unit="measurement") as bar, quiet():
        for turn in range(repeats + 1):
            for name, call in work.items():
                synchronise(device)
                started = time.perf_counter()
                amount = call()
                synchronise(device)
                if turn:
                    rates[name].append(amount / (time.perf_counter() - started))
                bar.update()
    return rates


def compared(rates: Mapping[str, Sequence[float]], ours: str, baseline: str, unit: str) -> Row:
    """Median rates, and the ratio turn by turn: its median, smallest and largest."""
    ratios = [mine / theirs for mine, theirs in zip(rates[ours], rates[baseline], strict=True)]
    return {
        unit: statistics.median(rates[ours]),
        f"{unit}_baseline": statistics.median(rates[baseline]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "repeats": len(ratios),
    }


def matmul_flops(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """Work for `interleave`: a product of large square matrices, two operations per multiply-add."""
    side = MATMUL.get(device.type, MATMUL["cpu"])
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def multiply() -> float:
        torch.mm(left, right)
        return 2.0 * side**3

    return multiply


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def protocol(device: torch.device, **settings: Any) -> dict[str, Any]:
    """What was measured, where and with which versions."""
    from bench.runtime.machine import device_name, git_commit
    from bench.runtime.versions import versions

    return {"device": device_name(device), **settings, "versions": versions(PACKAGES), "git_commit": git_commit()}


def render(record: Mapping[str, Any], layout: str) -> str:
    """{"protocol": ..., "rows": [...]} as json, as csv with the protocol in a first comment, or as a table to read."""
    rows: list[Row] = record["rows"]
    if layout == "json":
        return json.dumps(record, indent=1)
    if layout == "csv":
        sink = io.StringIO()
        sink.write(f"# bench.protocol: {json.dumps(record['protocol'])}\n")
        writer = csv.DictWriter(sink, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return sink.getvalue().rstrip("\n")
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    told = {name: value for name, value in record["protocol"].items() if name not in ("versions", "git_commit")}
    return "\n".join([*lines, "", *(f"{name}: {_cell(value)}" for name, value in told.items())])


def write(record: Mapping[str, Any], path: Path) -> None:
    atomic_write(path, render(record, path.suffix[1:]) + "\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return "-" if value is None else str(value)
