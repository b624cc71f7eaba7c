"""The trials of a search in Optuna's storage, which any number of workers on any hosts may share.

A cell is a setting and a training seed. The trial that stands for a cell is its first that has not failed: of two that
were put in line at the same moment the second is never done, and of a worker that is gone the trial fails and another
takes its place. A trial is claimed by one worker, in the storage, and finished once: every cell is done exactly once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, NamedTuple

import optuna
import psutil
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from bench.errors import UsageError, first_line
from bench.search import grids
from bench.search.grids import Setting

BEAT = 20.0  # seconds between two signs of life of a worker
GRACE = 180.0  # seconds without one after which a worker of another host counts as gone
optuna.logging.set_verbosity(optuna.logging.ERROR)


class Cell(NamedTuple):
    """What is done once: a setting, by its text, with a training seed."""

    setting: str
    seed: int


def open_storage(folder: Path, url: str | None = None) -> BaseStorage:
    """A database, or a journal in `folder`: a file that workers on other hosts may share too, over NFS as well."""
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        path = str((folder / "trials.journal").absolute())
        return JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path)))
    try:
        return RDBStorage(url)
    except Exception as error:  # of the driver, of SQLAlchemy, or the driver is not there
        raise UsageError(f"--storage {url}: cannot be used: {first_line(error)}") from error


def cell_of(trial: FrozenTrial) -> Cell:
    return Cell(grids.text(trial.user_attrs["setting"]), trial.user_attrs["seed"])


class Study:
    """The trials of one iteration of one entry, by the name that says all that decides their results."""

    def __init__(self, storage: BaseStorage, name: str):
        with suppress(DuplicatedStudyError):
            storage.create_new_study([StudyDirection.MAXIMIZE], name)
        self.storage, self.study = storage, storage.get_study_id_from_name(name)
        self.seen: dict[tuple, float] = {}  # a running trial's signs of life, and when each was first seen here

    def standing(self) -> dict[Cell, FrozenTrial]:
        """The trial that stands for each cell."""
        found: dict[Cell, FrozenTrial] = {}
        for trial in self._trials():
            found.setdefault(cell_of(trial), trial)
        return found

    def _trials(self) -> list[FrozenTrial]:
        """All that have not failed, oldest first."""
        alive = tuple(state for state in TrialState if state != TrialState.FAIL)
        return self.storage.get_all_trials(self.study, deepcopy=False, states=alive)

    def done(self) -> dict[Cell, FrozenTrial]:
        """The finished ones."""
        return {cell: trial for cell, trial in self.standing().items() if trial.state == TrialState.COMPLETE}

    def claim(self, cells: Mapping[Cell, Setting]) -> Claim | None:
        """Take the first of these cells that nobody has taken; None when all are done or being worked on."""
        self._bury()
        self._line_up(cells)
        standing = self.standing()
        for cell in cells:
            trial = standing.get(cell)  # none if it has failed this very moment
            if trial and trial.state == TrialState.WAITING:
                with suppress(UpdateFinishedTrialError):
                    number = self._id(trial)
                    if self.storage.set_trial_state_values(number, TrialState.RUNNING):
                        return Claim(self.storage, number, cell)
        return None

    def _id(self, trial: FrozenTrial) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study, trial.number)

    def _line_up(self, cells: Mapping[Cell, Setting]) -> None:
        """A waiting trial for every cell without one; of two for the same cell the second fails."""
        standing = self.standing()
        for cell, setting in cells.items():
            if cell not in standing:
                self.storage.create_new_trial(
                    self.study,
                    create_trial(state=TrialState.WAITING, user_attrs={"setting": setting, "seed": cell.seed}),
                )
        first: dict[Cell, int] = {}
        for trial in self._trials():
            if first.setdefault(cell_of(trial), trial.number) != trial.number and trial.state == TrialState.WAITING:
                self._fail(trial)

    def _bury(self) -> None:
        """Fail the trials of workers that are gone, for others to take."""
        for trial in self.storage.get_all_trials(self.study, deepcopy=False, states=(TrialState.RUNNING,)):
            worker, beat = trial.user_attrs.get("worker", ""), trial.user_attrs.get("beat")
            since = self.seen.setdefault((trial.number, worker, beat), time.monotonic())
            if _gone(worker) or time.monotonic() - since > GRACE:
                self._fail(trial)

    def _fail(self, trial: FrozenTrial) -> None:
        with suppress(UpdateFinishedTrialError):  # another has come first
            self.storage.set_trial_state_values(self._id(trial), TrialState.FAIL)


def _gone(worker: str) -> bool:
    """A process of this host can be looked up; of another one, only its signs of life are known."""
    process, _, host = worker.partition("@")
    if host != socket.gethostname():
        return False
    try:
        return psutil.Process(int(process)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Claim:
    """A trial while it is worked on: it shows signs of life, and left unfinished it fails, for others to take."""

    def __init__(self, storage: BaseStorage, number: int, cell: Cell):
        self.storage, self.number, self.cell = storage, number, cell
        self._over = Event()
        self._pulse = Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claim:
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(self.number, "worker", f"{os.getpid()}@{socket.gethostname()}")
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._pulse.join()
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(self.number, TrialState.FAIL)

    def finish(self, utility: float, **found: Any) -> bool:
        """Store a result; False when the trial was given to another worker in the meantime, whose result counts."""
        try:
            for name, value in found.items():
                self.storage.set_trial_user_attr(self.number, name, value)
            return self.storage.set_trial_state_values(self.number, TrialState.COMPLETE, [utility])
        except UpdateFinishedTrialError:
            return False

    def _beat(self) -> None:
        for beat in range(1 << 62):
            if self._over.wait(BEAT):
                return
            try:
                self.storage.set_trial_user_attr(self.number, "beat", beat)
            except UpdateFinishedTrialError:
                return
            except StorageInternalError:  # a database that cannot be reached for a moment
                continue
