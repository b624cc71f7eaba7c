"""Runs on disk: their folders, their settings, and whether a run may go on with what is asked of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bench.errors import BenchError, UsageError, did_you_mean, first_line, printable
from bench.storage import locks
from bench.storage.stages import MARKER, atomic_write
from bench.suites import Suite, stored_suite
from bench.suites.keys import flat

RUNS = Path("results/runs")
CACHE = Path("results/cache")
REPLAYS = Path("results/replays")
SCORING = ("metrics", "metric_options")
"""Sections of the suite that a finished run may still change: its images are there, and only scores follow."""
LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)(@(?P<host>.+))?\.tmp$")
FORGOTTEN = 24 * 3600  # seconds after which a folder that another host has not touched counts as left behind


@contextmanager
def apart(root: Path) -> Iterator[None]:
    """Within the block runs and cache are those below `root`: nothing of before is read, or compared with."""
    global RUNS, CACHE
    before = RUNS, CACHE
    RUNS, CACHE = root / RUNS.name, root / CACHE.name
    try:
        yield
    finally:
        RUNS, CACHE = before


class Result(NamedTuple):
    """Weights that are sampled and scored: the base, the end of an iteration, or a checkpoint inside one.

    `step` counts optimizer steps since the base, over all iterations; `within` those of the iteration alone.
    """

    method: str
    iteration: int
    step: int
    within: int
    end: bool = True

    @property
    def name(self) -> str:
        """What its folders are called: iter0 the base, iter2 the end of the second iteration, iter2@50 inside it."""
        return f"iter{self.iteration}" + ("" if self.end else f"@{self.within}")

    @property
    def title(self) -> str:
        """What progress bars and errors call it."""
        return f"{self.method} {self.name.removeprefix('iter')}" if self.iteration else self.method


BASE = Result("base", 0, 0, 0)


@dataclass(frozen=True)
class Run:
    """One method on one suite with one seed."""

    id: str
    method: str
    seed: int
    iterations: int
    suite: Suite

    @property
    def title(self) -> str:
        """What tables call the method; a variant, or a model that was not trained here, goes by its entry's name."""
        if self.method in self.suite.models:
            return self.method
        variant = self.suite.kind(self.method) != self.method
        return self.method if variant else self.suite.method(self.method).title

    @property
    def folder(self) -> Path:
        return RUNS / self.id

    @property
    def results(self) -> list[Result]:
        """What the run leaves besides the base, in the order in which it is made."""
        return results(self.suite, self.method, self.iterations)

    def trained(self, iteration: int | None = None, step: int | None = None) -> Result:
        """A result that is there: the end of an iteration, by default of the last; `step` names a checkpoint inside it.

        Raises UsageError with those there are where there is no such one, BenchError where nothing is trained yet.
        """
        there = [result for result in self.results if (self.folder / result.name / MARKER).exists()]
        ends = [result for result in there if result.end]
        if not ends:
            raise BenchError(f"{self.id} has no trained iteration yet; bench run --resume {self.id}")
        iteration = ends[-1].iteration if iteration is None else iteration
        inside = [result for result in there if result.iteration == iteration]
        if not inside:
            raise UsageError(
                f"{self.id} has no iteration {iteration}; it has {', '.join(str(result.iteration) for result in ends)}"
            )
        chosen = next((result for result in inside if (result.end if step is None else result.within == step)), None)
        if chosen is None:
            raise UsageError(
                f"{self.id} has no result after {step or 'all'} steps of iteration {iteration}; it has "
                f"{', '.join(str(result.within) for result in inside)}"
            )
        return chosen

    def config(self) -> dict[str, Any]:
        """All that decides the result; config.json of the run's folder."""
        return {
            "run": self.id,
            "method": self.method,
            "seed": self.seed,
            "iterations": self.iterations,
            "suite": self.suite.model_dump(),
        }


def results(suite: Suite, method: str, iterations: int) -> list[Result]:
    """What a method leaves of so many iterations, in the order in which it is made; of a given model, itself."""
    if method in suite.models:
        return [Result(method, 1, 0, 0)]
    found, first = [], 0
    for iteration, settings in enumerate(suite.schedule(method, iterations), 1):
        found += [
            Result(method, iteration, first + within, within, within == settings.steps)
            for within in (*settings.checkpoints, settings.steps)
        ]
        first += settings.steps
    return found


def create(method: str, suite: Suite, seed: int, iterations: int) -> Run:
    """Make the folder of a new run and store its settings there."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{method}-s{seed}"
    RUNS.mkdir(parents=True, exist_ok=True)
    identity, copies = stem, 1
    while True:
        try:
            (RUNS / identity).mkdir()
            break
        except FileExistsError:
            copies += 1
            identity = f"{stem}-{copies}"
    run = Run(identity, method, seed, iterations, suite)
    store(run)
    return run


def store(run: Run) -> None:
    """Write a run's settings into its folder, in the order of the suite: a page shows its prompt sets in that order."""
    atomic_write(run.folder / "config.json", json.dumps(run.config(), indent=2))


def find(name: str) -> Path:
    """The folder of a run, given by id or by path."""
    for folder in (RUNS / name, Path(name)):
        with suppress(OSError, ValueError):  # a name that no file can have
            if (folder / "config.json").is_file():
                return folder
    hint = did_you_mean(name, ids())
    raise UsageError(f"no run '{printable(name, 80)}' in {RUNS}{hint}; `bench list runs` shows what there is")


def load(name: str) -> Run:
    """The run in a folder of RUNS, as it was started."""
    folder = find(name)
    if folder.resolve() != (RUNS / folder.name).resolve():
        raise UsageError(f"{folder} is not in {RUNS}: go to the folder the run was started from")
    try:
        config = json.loads((folder / "config.json").read_text())
        suite = stored_suite(config["suite"])
        return Run(folder.name, config["method"], config["seed"], config["iterations"], suite)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"{folder / 'config.json'} cannot be read ({type(error).__name__}: {first_line(error)}); "
            f"{folder / 'protocol.json'} holds the same settings: restore it by that, or start a new run"
        ) from error


def ids() -> list[str]:
    """All runs, oldest first."""
    return sorted(path.parent.name for path in RUNS.glob("*/config.json"))


def held(run: Run, wait: bool = False) -> AbstractContextManager[None]:
    """The right to work on a run, which one process (or launch of several) has at a time; see bench.storage.locks."""
    return locks.held(run.folder / ".lock", f"run {run.id}", wait)


def finished(folder: Path) -> bool:
    """Whether a run came to its end; sacred's record says so."""
    try:
        return json.loads((folder / "run.json").read_text())["status"] == "COMPLETED"
    except (OSError, ValueError, KeyError):
        return False


def comparable(run: Run) -> list[Run]:
    """The finished runs of the same suite and seed, whatever their method."""

    def room(other: Run) -> tuple[int, Suite]:
        return other.seed, other.suite.model_copy(update={"methods": {}, "models": {}, "search": None})

    return [other for identity in ids() if finished(RUNS / identity) and room(other := load(identity)) == room(run)]


def refuse_changes(run: Run, asked: dict[str, Any]) -> None:
    """A run goes on with the settings it was started with, but for SCORING; name the first that was asked to differ."""
    stored, wanted = flat(run.config()), flat(asked)
    for key, value in wanted.items():
        if value != stored.get(key) and key.split(".")[:2] not in (["suite", name] for name in SCORING):
            name = key.removeprefix("suite.")
            raise UsageError(
                f"cannot resume {run.id} with another {name}: it was started with "
                f"{stored.get(key)}, not {value}; start a new run for that"
            )


def rescored(run: Run, suite: Suite) -> Run:
    """The run with the scorers of `suite`; executed, it drops the rows of scorers that left."""
    changes = {name: getattr(suite, name) for name in SCORING}
    return replace(run, suite=run.suite.model_copy(update=changes))


def sweep(folder: Path) -> None:
    """Remove what killed processes left half done below a folder; never what a living one is writing."""
    for path in folder.rglob(".*.tmp") if folder.is_dir() else ():
        found = LEFTOVER.search(path.name)
        if found and _abandoned(path, int(found["process"]), found["host"]):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _abandoned(path: Path, process: int, host: str | None) -> bool:
    """A process of this host can be looked up; of another one, only how long it has not written is known."""
    if host in (None, socket.gethostname()):
        return not _alive(process)
    try:
        return time.time() - path.stat().st_mtime > FORGOTTEN
    except FileNotFoundError:
        return False


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
