"""The state of a training under way, so that a killed one goes on with the very numbers it would have had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.errors import BenchError
from bench.storage.integrity import expecting
from bench.storage.stages import MARKER, Stage, atomic_write

T = TypeVar("T")
STATE = "state.pt"
COST = "cost.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training, a folder `step<N>` each, of which the newest is kept.

    A checkpoint is a stage: there whole or not at all, and used only by the training with the same `key`, the hash
    of all that decides its result. One made with other settings is never read.
    """

    folder: Path
    key: str
    every: int | None  # steps between two; None keeps none
    minutes: float = 0.0  # between two at least, whatever the steps

    def due(self, step: int) -> bool:
        """Whether one is to be written after `step` steps of this training."""
        return self.every is not None and step % self.every == 0

    def check(self) -> None:
        """Set aside those that are damaged; the training then starts from an earlier state."""
        for step in self._steps():
            self._stage(step).ready()

    def newest(self) -> Path | None:
        """The last checkpoint of this training, or None."""
        whole = [stage for stage in map(self._stage, self._steps()) if stage.done]
        return whole[-1].directory if whole else None

    @contextmanager
    def write(self, step: int, seconds: float) -> Iterator[Path]:
        """Yield an empty folder to fill; when it is whole, the older checkpoints are removed.

        `seconds` is what the training took until now, in all the processes that worked on it one after another.
        """
        with self._stage(step).fresh() as folder:
            yield folder
            atomic_write(folder / COST, json.dumps({"seconds": seconds}))
        for other in self._steps():
            if other != step:
                shutil.rmtree(self.folder / f"step{other}", ignore_errors=True)

    def reached(self) -> int:
        """The step of the newest checkpoint, 0 when there is none."""
        newest = self.newest()
        return int(newest.name.removeprefix("step")) if newest else 0

    def seconds(self) -> float:
        """What the training took up to the newest checkpoint."""
        newest = self.newest()
        if newest is None:
            return 0.0
        with expecting(newest / COST):
            return json.loads((newest / COST).read_text())["seconds"]

    def remove(self) -> None:
        """Drop all of them: the training is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stage(self, step: int) -> Stage:
        return Stage(self.folder / f"step{step}", {"training": self.key, "step": step})

    def _steps(self) -> list[int]:
        found = (path.parent.name.removeprefix("step") for path in self.folder.glob(f"step*/{MARKER}"))
        return sorted(int(name) for name in found if name.isdigit())


class Writer:
    """Writes one checkpoint after another; `beside` a training where that goes on without the processor.

    What is written must then be a copy. A kill meanwhile leaves the checkpoint of before, as any kill does: a folder
    that is not whole is none.
    """

    def __init__(self, beside: bool):
        self.thread = ThreadPoolExecutor(1, "checkpoint") if beside else None
        self.writing: Future[None] | None = None

    def write(self, call: Callable[[], None]) -> None:
        """Begin with `call`, after the last one, whose error, if it had one, is raised."""
        self.wait()
        if self.thread is None:
            call()
        else:
            self.writing = self.thread.submit(call)

    def wait(self) -> None:
        """Wait until all is written; raises what went wrong."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """The same without an error: a training that fails has one of its own."""
        if self.thread is not None:
            self.thread.shutdown()


def copied(state: T) -> T:
    """The same containers with copies of their tensors on the processor."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write numbers and tensors in plain containers."""
    torch.save(state, folder / STATE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BenchError(
            f"{folder / STATE} cannot be read ({type(error).__name__}): remove {folder} to train from the start"
        ) from error
