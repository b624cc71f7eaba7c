"""A suite that runs in seconds, and `bench` with a metric that needs no weights; as a script, it can be killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import yaml

from bench import registry
from bench.commands import cli
from bench.metrics.base import Images, Metric
from bench.storage import runs

if TYPE_CHECKING:
    from bench.shared import Shared

DARKNESS, GLOOM = "tiny_bench:Darkness", "tiny_bench:Gloom"
ORDER = ["method", "iteration", "step", "prompt_set", "prompt_id", "seed", "guidance", "metric"]
SPIN = "run --suite tiny.yaml --method spin --iters 2"
SUITE = {
    "name": "tiny",
    "data": {"pairs": "world", "size": 12, "seed": 1},
    "train": {"batch_size": 4, "micro_batch": 2, "log_every": 1},
    "opponent": {"guidance": 1.0, "steps": 2, "batch_size": 3},
    "evaluation": {
        "prompt_sets": {"test": {"prompts": "world:test", "limit": 4}},
        "guidance": [1.0, 3.0],
        "steps": 2,
        "seeds": [1, 2],
        "protocol": "mean",
        "batch_size": 3,
    },
    "metrics": ["darkness"],
    "methods": {
        "sft": {"iterations": [{"steps": 2, "lr": 1e-3}]},
        "diffusion_dpo": {"iterations": [{"steps": 2, "lr": 1e-3, "beta": 1000.0}]},
        "spin": {"iterations": [{"steps": 2, "lr": 1e-3, "beta": 1000.0}]},
    },
}


class Darkness(Metric):
    """How dark an image is: 255 minus its mean."""

    name = "darkness"
    title = "Darkness"

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32) -> Darkness:
        return cls()

    def score(self, images: Images, prompts: list[str]) -> np.ndarray:
        return np.array([255 - np.asarray(image).mean() for image in images], dtype=np.float32)

    def info(self) -> dict[str, str]:
        return {
            "version": "1",
            "checkpoint": "none",
            "scale": "0 to 255",
            "preprocessing": "none",
            "truncates": "nothing",
        }


class Gloom(Darkness):
    """The same under another name."""

    name = "gloom"
    title = "Gloom"


def write_suite(folder: Path, weights: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SUITE, "model": {"weights": str(weights)}}, sort_keys=False))
    return path


def bench(line: str) -> int:
    """Run a command line in this process; its exit status. Quotes hold together what has blanks in it."""
    try:
        cli.main(shlex.split(line))
    except SystemExit as done:
        return done.code
    raise AssertionError("bench returned")


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own to its end."""
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


def run_of(method: str) -> runs.Run:
    """The only run of a method."""
    (run,) = [run for run in map(runs.load, runs.ids()) if run.method == method]
    return run


def scores_of(folder: Path) -> pd.DataFrame:
    """A run's scores without its name, in an order that does not depend on when they were made."""
    return pd.read_parquet(folder / "scores.parquet").drop(columns="run").sort_values(ORDER, ignore_index=True)


def history_of(folder: Path) -> pd.DataFrame:
    """A run's signals without what depends on the machine's pace."""
    return pd.read_parquet(folder / "history.parquet").drop(columns=["pairs_per_s", "images_per_s"])


def unets_of(run: runs.Run) -> dict[str, bytes]:
    """The weights of all results of a run, by the folder of each."""
    return {path.parts[-3]: path.read_bytes() for path in run.folder.glob("iter*/unet/*.safetensors")}


def trained(run: runs.Run, shared: Shared) -> None:
    """Everything of a run but what is sampled for and scored."""
    from bench import walk
    from bench.experiment import Experiment

    experiment = Experiment(run, shared)
    for stage in walk.walk(run.suite, run.method, run.iterations):
        if not isinstance(stage, walk.Evaluation):
            experiment.do(stage, lambda *scalar: None)


def killed(place: str, line: str) -> int:
    """Run `bench` in a process that kills itself just before a file or folder whose path matches `place` appears.

    Returns its exit status, that of `os.waitpid`.
    """
    replace = os.replace

    def deadly(source: str | Path, target: str | Path) -> None:
        if re.search(place, Path(target).as_posix()):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    process = os.fork()
    if not process:
        os.replace = deadly
        cli.main(line.split())
    return os.waitpid(process, 0)[1]


def die_at(steps: int) -> None:
    """Make this process kill itself instead of its `steps`-th training step."""
    from bench.training.train import Loop

    step, left = Loop.step, [steps]

    def deadly(self: Loop, number: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, number)

    Loop.step = deadly


if __name__ == "__main__":
    registry.BUILT_IN["metrics"]["darkness"] = DARKNESS
    if "TINY_BENCH_DIES_AT_STEP" in os.environ:
        die_at(int(os.environ["TINY_BENCH_DIES_AT_STEP"]))
    kills = json.loads(os.environ.get("TINY_BENCH_KILLED_BEFORE", "[]"))
    if not kills:
        cli.main()
    start = " ".join(sys.argv[1:])
    import bench.experiment  # noqa: F401, before the forks: what takes long is loaded once

    for number, place in enumerate(kills):
        line = start if number == 0 else f"run --resume {runs.ids()[0]}"
        print(os.waitstatus_to_exitcode(killed(place, line)))
