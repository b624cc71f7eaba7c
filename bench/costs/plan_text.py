"""A plan as a person reads it, and as a program does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.costs.cards import Card
from bench.costs.plan import Plan

UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"))


def as_record(made: Plan, card: Card, mfu: float, gpus: int) -> dict[str, Any]:
    """The plan in numbers: `gpu_hours` = FLOPs / (MFU x peak); `wall_hours` on all GPUs together."""

    def priced(hours: float) -> dict[str, float]:
        return {"gpu_hours": hours, "wall_hours": hours / gpus}

    hours = [stage.flops / (mfu * card.peak(stage.dtype) * 3600) for stage in made.stages]
    total = {
        "flops": made.flops,
        **priced(sum(hours)),
        "peak_memory_bytes": made.peak_memory_bytes,
        "disk_bytes": made.disk_bytes,
    }
    return {
        "suite": made.suite,
        "methods": list(made.methods),
        "assumptions": {
            "card": card.title,
            "gpus": gpus,
            "mfu": mfu,
            "card_memory_bytes": card.memory,
            "peak_flops_per_s": {dtype: card.peak(dtype) for dtype in sorted({stage.dtype for stage in made.stages})},
            "flops": "two per multiply-add; matrix products, convolutions and attention, counted by "
            "torch's FlopCounterMode on the models' shapes",
            "memory": "tensors alive at once in a simulated pass, per device; without allocator waste, "
            "workspaces (a third more, resident, on the miniature), CUDA context (1 to 2 GB) or "
            "Python (about 0.7 GB)",
        },
        "stages": [{**asdict(stage), **priced(spent)} for stage, spent in zip(made.stages, hours, strict=True)],
        "total": total,
        "notes": list(made.notes),
    }


def as_text(record: dict[str, Any]) -> str:
    """The table, the assumptions it stands on, and what does not fit."""
    assumed, total = record["assumptions"], record["total"]
    size, unit = next((unit for unit in UNITS if total["flops"] >= unit[0]), UNITS[-1])
    rows = [("stage", "amount", unit, "GPU-hours", "peak GB", "disk GB")]
    for stage in record["stages"]:
        rows.append((stage["name"], f"{stage['count']:,} {stage['unit']}", *_figures(stage, size)))
    rows.append(("total", "", *_figures(total, size)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines[1:1] = ["-" * len(lines[0])]
    lines.insert(-1, lines[1])
    peaks = ", ".join(f"{peak / 1e12:g} TFLOP/s ({dtype})" for dtype, peak in assumed["peak_flops_per_s"].items())
    lines += [
        "",
        f"{assumed['gpus']} x {assumed['card']} at {assumed['mfu']:.0%} of {peaks}: "
        f"{_number(total['wall_hours'])} hours.",
        f"Memory: {assumed['memory']}.",
    ]
    if total["peak_memory_bytes"] > assumed["card_memory_bytes"]:
        lines.append(
            f"It does not fit: {assumed['card']} has {assumed['card_memory_bytes'] / 1e9:g} GB; lower "
            "train.micro_batch or the batch sizes of opponent and evaluation."
        )
    return "\n".join([*lines, *(f"Note: {note}" for note in record["notes"])])


def _figures(row: dict[str, Any], size: float) -> tuple[str, ...]:
    return (
        _number(row["flops"] / size),
        _number(row["gpu_hours"]),
        _number(row["peak_memory_bytes"] / 1e9),
        _number(row["disk_bytes"] / 1e9),
    )


def _number(value: float) -> str:
    """Three digits, and no exponent where a person can do without."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1e}"
