"""The record beside every number: what was compared, with which models and scorers, and what it cost."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench.costs import cards
from bench.errors import BenchError
from bench.methods.signals import EVERY_TRAINING
from bench.models.random_weights import REMARK, is_random
from bench.runtime.machine import device_name, git_commit
from bench.runtime.processes import tf32
from bench.runtime.versions import versions
from bench.shared import Shared
from bench.storage import integrity
from bench.storage.integrity import Damage, expecting
from bench.storage.meter import mfu
from bench.storage.runs import Run
from bench.storage.stages import atomic_write
from bench.suites import options

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pandas", "sacred")


def write_protocol(run: Run, shared: Shared, warnings: Sequence[str] = ()) -> None:
    """Write protocol.json. A resumed run must find the same weights, and keeps what was said of the process that
    started it; each that works on a run is added to `processes`, with its code, versions, threads and device.

    `warnings` are one line each, for whoever reads the run's numbers.
    """
    path = run.folder / "protocol.json"
    model = {
        **run.suite.model.model_dump(),
        "fingerprint": shared.frozen.base.key,
        "unet_parameters": sum(parameter.numel() for parameter in shared.frozen.pipe.unet.parameters()),
    }
    if is_random(run.suite.model.weights):
        model["remark"] = REMARK
    process = this_process(shared)
    before = _written(path)
    if before and before["model"] != model:
        raise BenchError(
            f"cannot resume {run.id}: the weights '{run.suite.model.weights}' are not those it was "
            "started with; start a new run"
        )
    record = {
        "run": run.id,
        "suite": run.suite.model_dump(),
        "method": run.method,
        "method_title": run.title,
        "seed": run.seed,
        "iterations": run.iterations,
        **(_given(run, shared) if run.method in run.suite.models else _trained(run, shared)),
        "results": [result._asdict() for result in run.results],
        "model": model,
        "metrics": shared.evaluator.scorers.protocol(),
        "prompt_sets": {
            name: {"source": prompts.name, "count": len(prompts), "truncated": shared.evaluator.truncated[name]}
            for name, prompts in shared.evaluator.prompt_sets.items()
        },
        "warnings": list(warnings),
        **{name: before.get(name, process[name]) for name in ("versions", "git_commit", "created")},
        "processes": [*before.get("processes", []), process],
    }
    atomic_write(path, json.dumps(record, indent=1))


def _trained(run: Run, shared: Shared) -> dict[str, Any]:
    """How a method trained, and on what."""
    method, suite = run.suite.method(run.method), run.suite
    schedule = zip(suite.schedule(run.method, run.iterations), suite.resolved(run.method, run.iterations), strict=True)
    return {
        "schedule": [{**iteration.model_dump(), **chosen} for iteration, chosen in schedule],
        "options": [option.record() for option in options.options(method).values()],
        "signals": [asdict(signal) for signal in (*method.signals, *EVERY_TRAINING)],
        "data": {**shared.encoded.pairs.record(), "truncated": shared.encoded.truncated},
    }


def _given(run: Run, shared: Shared) -> dict[str, Any]:
    """Where a model that was not trained here is from: how it was trained is its makers' word, and not known here."""
    return {"schedule": [], "options": [], "signals": [], "given": shared.sources[run.method].record()}


def write_warnings(run: Run, warnings: Sequence[str]) -> None:
    """Put warnings that came later into protocol.json."""
    path = run.folder / "protocol.json"
    atomic_write(path, json.dumps({**json.loads(path.read_text()), "warnings": list(warnings)}, indent=1))


def this_process(shared: Shared) -> dict[str, Any]:
    """What may decide the last bits of a number: the code, the libraries, the threads, the device."""
    return {
        "created": datetime.now().isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "device": device_name(shared.accelerator.device),
        "threads": torch.get_num_threads(),
        "tf32": tf32(),
        "processes": shared.processes.count,
    }


def _written(path: Path) -> dict[str, Any]:
    """The protocol that is there; a broken one is named and set aside, and its processes are lost."""
    try:
        found = json.loads(path.read_text())
        return found if found["model"] and found["created"] else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError):
        integrity.say(
            [Damage(path, "is no protocol that can be read")],
            f"set aside as {integrity.set_aside(path)}, and begun anew",
        )
        return {}


def write_cost(run: Run, stages: Iterable[Path], shared: Shared, checkpoints: Iterable[Path] = ()) -> None:
    """Sum up what the stages in these folders cost; what all runs share is listed, but charged to none.

    Of `checkpoints` of a training is listed what it had cost until then, which is in the training's own cost too.
    """
    device, dtype, precision = device_name(shared.accelerator.device), run.suite.model.dtype, run.suite.train.precision
    card = cards.recognise(device) if shared.accelerator.device.type == "cuda" else None
    peaks = {kind: cards.CARDS[card].peak(kind) if card else None for kind in (dtype, precision)}

    def read(folder: Path) -> dict[str, Any]:
        """What one stage cost, and its MFU where the device's peak is known."""
        with expecting(folder / "cost.json"):
            stage = json.loads((folder / "cost.json").read_text())
        peak = peaks[precision if stage["name"].endswith("/train") else dtype]
        return {**stage, "mfu": mfu(stage.get("flops"), stage["seconds"], stage.get("devices", 1), peak)}

    spent = [read(folder) for folder in stages]

    def total(kind: str, what: str) -> int:
        return sum(stage.get(what, 0) for stage in spent if stage["name"].endswith(kind))

    joules = [stage.get("energy_joules") for stage in spent]
    memory = [stage["peak_memory_bytes"] for stage in spent if stage.get("peak_memory_bytes")]
    record = {
        "stages": spent,
        "checkpoints": [read(folder) for folder in checkpoints],
        "shared_stages": [read(folder) for folder in shared.common.values()],
        "total_seconds": round(sum(stage["seconds"] for stage in spent), 3),
        "train_flops": total("/train", "flops"),
        "sample_flops": total("/opponent", "flops"),
        "pairs_seen": total("/train", "pairs"),
        "peak_memory_bytes": max(memory, default=None),
        "energy_joules": sum(joules) if spent and None not in joules else None,
        "device": device,
        "dtype": dtype,
        "peak_flops_per_s": peaks[dtype],
        "train_precision": precision,
        "train_peak_flops_per_s": peaks[precision],
    }
    atomic_write(run.folder / "cost.json", json.dumps(record, indent=1))
