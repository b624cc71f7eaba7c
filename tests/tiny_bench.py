"""A suite that runs in seconds, and `bench` with a metric that needs no weights (also as a script)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import yaml

from bench import cli, registry
from bench.stages import Stage
from metrics.base import Images, Metric

DARKNESS = "tiny_bench:Darkness"
SUITE = {
    "name": "tiny",
    "data": {"pairs": "world", "size": 12, "seed": 1},
    "train": {"batch_size": 4, "micro_batch": 2, "log_every": 1},
    "opponent": {"guidance": 1.0, "steps": 2},
    "evaluation": {"prompt_sets": {"test": {"prompts": "world:test", "limit": 4}}, "guidance": [1.0, 3.0],
                   "steps": 2, "seeds": [1, 2], "protocol": "mean"},
    "metrics": ["darkness"],
    "methods": {"sft": {"iterations": [{"steps": 2, "lr": 1e-3}]},
                "diffusion_dpo": {"iterations": [{"steps": 2, "lr": 1e-3, "beta": 1000.0}]},
                "spin": {"iterations": [{"steps": 2, "lr": 1e-3, "beta": 1000.0}]}},
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
        return {"version": "1", "checkpoint": "none", "scale": "0 to 255", "preprocessing": "none",
                "truncates": "nothing"}


def write_suite(folder: Path, weights: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SUITE, "model": {"weights": str(weights)}}, sort_keys=False))
    return path


def die_in(stage: str) -> None:
    """Make this process kill itself when the work of a stage is done but its marker is not yet written."""
    fresh = Stage.fresh

    @contextmanager
    def deadly(self: Stage) -> Iterator[Path]:
        with fresh(self) as folder:
            yield folder
            if self.directory.as_posix().endswith(stage):
                os.kill(os.getpid(), signal.SIGKILL)

    Stage.fresh = deadly


def die_at(steps: int) -> None:
    """Make this process kill itself instead of its `steps`-th training step."""
    from bench.train import Loop

    step, left = Loop.step, [steps]

    def deadly(self: Loop, number: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, number)

    Loop.step = deadly


if __name__ == "__main__":
    registry.BUILT_IN["metrics"]["darkness"] = DARKNESS
    if "TINY_BENCH_DIES_IN" in os.environ:
        die_in(os.environ["TINY_BENCH_DIES_IN"])
    if "TINY_BENCH_DIES_AT_STEP" in os.environ:
        die_at(int(os.environ["TINY_BENCH_DIES_AT_STEP"]))
    cli.main()
