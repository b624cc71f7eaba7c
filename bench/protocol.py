"""The record beside every number: what was compared, with which models and scorers, and what it cost."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import torch

from bench import registry
from bench.errors import BenchError
from bench.random_weights import REMARK, is_random
from bench.runs import Run
from bench.shared import Shared
from bench.stages import atomic_write
from bench.versions import versions

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pandas", "sacred")


def write_protocol(run: Run, shared: Shared) -> None:
    """Write protocol.json; a resumed run keeps its creation time and must find the same weights."""
    path = run.folder / "protocol.json"
    model = {**run.suite.model.model_dump(), "fingerprint": shared.base.key,
             "unet_parameters": sum(parameter.numel() for parameter in shared.pipe.unet.parameters())}
    if is_random(run.suite.model.weights):
        model["remark"] = REMARK
    created = datetime.now().isoformat(timespec="seconds")
    if path.exists():
        before = json.loads(path.read_text())
        created = before["created"]
        if before["model"] != model:
            raise BenchError(f"cannot resume {run.id}: the weights '{run.suite.model.weights}' are not those "
                             "it was started with; start a new run")
    record = {
        "run": run.id,
        "suite": run.suite.model_dump(),
        "method": run.method,
        "method_title": registry.method(run.method).title,
        "seed": run.seed,
        "iterations": run.iterations,
        "model": model,
        "data": shared.pairs.record(),
        "metrics": shared.scorers.info(),
        "judge": shared.judge_info(),
        "prompt_sets": {name: {"source": prompts.name, "count": len(prompts)}
                        for name, prompts in shared.prompt_sets.items()},
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "git_commit": git_commit(),
        "created": created,
    }
    atomic_write(path, json.dumps(record, indent=1))


def write_cost(run: Run, stages: Iterable[Path], device: torch.device) -> None:
    """Sum up what the stages in these folders cost; the cache, which all runs share, is charged to none."""
    spent = [json.loads((folder / "cost.json").read_text()) for folder in stages]

    def total(kind: str, what: str) -> int:
        return sum(stage.get(what, 0) for stage in spent if stage["name"].endswith(kind))

    record = {
        "stages": spent,
        "total_seconds": round(sum(stage["seconds"] for stage in spent), 3),
        "train_flops": total("/train", "flops"),
        "sample_flops": total("/opponent", "flops"),
        "pairs_seen": total("/train", "pairs"),
        "device": device_name(device),
    }
    atomic_write(run.folder / "cost.json", json.dumps(record, indent=1))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def git_commit() -> str | None:
    """The commit this code is a checkout of, "+changes" when files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
