"""The way through a search: rounds of trials, the choice that opens the next round, and what was found in the end."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from bench.errors import BenchError, UsageError
from bench.search import choice, grids
from bench.search.choice import Choice
from bench.search.grids import Setting
from bench.search.queue import Cell, Study, cell_of
from bench.search.trials import Round, Trials
from bench.suites import Suite
from bench.training.signals import Broken

POLL = 2.0  # seconds between two looks for a trial that may be taken
Say = Callable[[str], None]


class Search:
    """The search of some entries of a suite; every worker has one, and they meet in the storage alone."""

    def __init__(self, suite: Suite, entries: Sequence[str], storage: BaseStorage):
        self.suite, self.entries, self.storage = suite, entries, storage
        self.settings = grids.of(suite)
        self.trials = Trials(suite, entries)
        self.identities = {entry: self.trials.identity(entry) for entry in entries}
        self._studies: dict[str, Study] = {}

    def study(self, this: Round) -> Study:
        """The trials of a round."""
        if this.name not in self._studies:
            self._studies[this.name] = Study(self.storage, f"{self.suite.name}: {this.name}")
        return self._studies[this.name]

    def cells(self, this: Round) -> dict[Cell, Setting]:
        """All that a round is to try: every setting with every seed; seed by seed, which share their opponent."""
        tried = grids.settings(self.suite, this.entry, this.number)
        return {Cell(grids.text(setting), seed): setting for seed in self.settings.seeds for setting in tried}

    def rounds(self, entry: str) -> Iterator[tuple[Round, Choice | None]]:
        """An entry's rounds as far as they are open, each with its choice once all of it is tried.

        An iteration starts from what the last one settled on, so none is begun after a choice that is not yet one.
        """
        settled: list[Setting] = []
        for number, grid in enumerate(self.settings.grids[entry], start=1):
            this = Round(entry, number, tuple(settled), self.identities[entry])
            tried = grids.settings(self.suite, entry, number)
            made = choice.choose(
                tried, self.settings.seeds, self.study(this).done(), grid, self.settings.ends if number > 1 else {}
            )
            if made and not math.isfinite(made.utility):
                raise BenchError(
                    f"search.grids.{entry}.{number - 1}: every setting breaks a training, which says: "
                    f"{self._broken(this)}"
                )
            yield this, made
            if made is None or made.edges:
                return
            settled.append(made.best)

    def _broken(self, this: Round) -> str:
        told = (trial.user_attrs.get("broken") for trial in self.study(this).done().values())
        return next(filter(None, told), "nothing")

    def open_rounds(self) -> list[Round]:
        """The rounds in which something is left to do, one an entry at most."""
        return [this for entry in self.entries for this, made in self.rounds(entry) if made is None]

    def work(self, say: Say) -> None:
        """Do trials until none is left; while others do the last of a round, wait for what comes after it."""
        while rounds := self.open_rounds():
            if not any(self._one(this, say) for this in rounds):
                time.sleep(POLL)

    def _one(self, this: Round, say: Say) -> bool:
        """Do one trial of a round; False when there is none to take."""
        claim = self.study(this).claim(self.cells(this))
        if claim is None:
            return False
        with claim:
            began = time.monotonic()
            found = self._do(this, claim.cell)
            kept = claim.finish(**found, seconds=time.monotonic() - began)
        self._tidy(this)
        told = found.get("broken") or f"{found['utility']:.4f}, {found['gain']:+.4f}"
        told = told if kept else "given to another worker in the meantime"
        say(f"{this.entry} {this.number}, {claim.cell.setting}, seed {claim.cell.seed}: {told}; {self.progress()}")
        return True

    def _do(self, this: Round, cell: Cell) -> dict[str, Any]:
        """A trial's result. A training that breaks or collapses is one too, below all others."""
        try:
            return self.trials.do(this, self.cells(this)[cell], cell.seed)
        except Broken as error:
            return {"utility": -math.inf, "gain": -math.inf, "broken": str(error).partition(";")[0]}
        except BenchError as error:
            raise BenchError(f"{this.entry} {this.number}, {cell.setting}, seed {cell.seed}: {error}") from error

    def _tidy(self, this: Round) -> None:
        """Remove the folders of finished trials, but of the one that a next iteration would go on from.

        What a setting scored is in the storage. Of a round that is over the trunks go too.
        """
        done, cells = self.study(this).done(), self.cells(this)
        ranked = choice.best(grids.settings(self.suite, this.entry, this.number), self.settings.seeds, done)
        last = this.number == len(self.settings.grids[this.entry])
        whole = {grids.text(setting) for setting in (ranked if last else ranked[1:])}
        for cell in done.keys() & cells.keys():
            if last or cell.setting in whole:
                shutil.rmtree(this.folder(cell.seed, cells[cell]), ignore_errors=True)
        if done.keys() >= cells.keys():
            for seed in self.settings.seeds:
                shutil.rmtree(this.folder(seed), ignore_errors=True)

    def progress(self) -> str:
        """How far the whole search is, and how long it may still take at the pace of the trials that were timed."""
        left, workers, finished, paces = {}, 0, 0, {}
        for entry in self.entries:
            seconds: list[float] = []
            total = sum(
                len(grids.settings(self.suite, entry, number)) * len(self.settings.seeds)
                for number in range(1, len(self.settings.grids[entry]) + 1)
            )
            for this, _ in self.rounds(entry):
                standing, cells = self.study(this).standing(), self.cells(this)
                done = [
                    standing[cell] for cell in cells if cell in standing and standing[cell].state == TrialState.COMPLETE
                ]
                workers += sum(trial.state == TrialState.RUNNING for trial in standing.values())
                seconds += [trial.user_attrs["seconds"] for trial in done if "seconds" in trial.user_attrs]
                total -= len(done)
                finished += len(done)
            left[entry], paces[entry] = total, float(np.mean(seconds)) if seconds else None
        known = [pace for pace in paces.values() if pace is not None]
        mean = float(np.mean(known)) if known else 0.0
        ahead = sum(count * (mean if paces[entry] is None else paces[entry]) for entry, count in left.items())
        return f"{finished} of {finished + sum(left.values())}, about {_duration(ahead / (workers + 1))} left"

    def adopt(self, rows: pd.DataFrame) -> int:
        """Take results from a table of an earlier search instead of doing the trials; how many were taken."""
        known = {(row["entry"], row["iteration"], row["after"], cell): row for row, cell in _rows(rows)}
        for row in known.values():
            identity = self.identities.get(row["entry"], row["identity"])
            if row["identity"] != identity:
                raise UsageError(
                    f"{row['entry']} was searched with another suite, data, model or scorer (identity "
                    f"{row['identity']}, here {identity})"
                )
        taken = 0
        while news := sum(self._adopted(this, known) for this in self.open_rounds()):
            taken += news
        return taken

    def _adopted(self, this: Round, known: Mapping[tuple, Mapping[str, Any]]) -> int:
        cells = {
            cell: setting
            for cell, setting in self.cells(this).items()
            if (this.entry, this.number, this.after, cell) in known
        }
        taken = 0
        while claim := self.study(this).claim(cells):
            row = known[this.entry, this.number, this.after, claim.cell]
            found = {
                name: value
                for name, value in row.items()
                if name in ("utility", "gain") or (name.startswith("gain_g") and not pd.isna(value))
            }
            if isinstance(row.get("prompts"), (list, np.ndarray)):
                found["prompts"] = list(map(float, row["prompts"]))
            with claim:
                taken += claim.finish(**found)
        return taken

    def table(self) -> pd.DataFrame:
        """Everything tried in the rounds that are open or over, also what is no longer in their grids."""
        rows = [
            self._row(this, trial)
            for entry in self.entries
            for this, _ in self.rounds(entry)
            for trial in self.study(this).done().values()
        ]
        return choice.table(rows)

    def _row(self, this: Round, trial: FrozenTrial) -> dict[str, Any]:
        found, cell = trial.user_attrs, cell_of(trial)
        batch = self.suite.training(this.entry).batch_size
        return {
            **found,
            "entry": this.entry,
            "iteration": this.number,
            "seed": cell.seed,
            "utility": trial.value,
            "pairs": found["setting"]["steps"] * batch,
            "after": this.after,
            "identity": this.identity,
        }

    def verdicts(self) -> tuple[list[str], dict[str, list[Setting]], list[str]]:
        """A line for every choice, what was chosen for the entries that have all, and what must first be widened."""
        lines, chosen, wide = [], {}, []
        for entry in self.entries:
            choices = [(this, made) for this, made in self.rounds(entry) if made]
            for this, made in choices:
                tried = {cell.setting for cell in self.study(this).done()}
                lines.append(
                    choice.verdict(
                        f"{entry} {this.number}",
                        made,
                        self.settings.metric,
                        f"{len(tried)} settings with {len(self.settings.seeds)} seeds",
                    )
                )
                if made.edges:
                    wide.append(f"{entry} {this.number}: {choice.widening(made)}")
            if len(choices) == len(self.settings.grids[entry]) and not choices[-1][1].edges:
                chosen[entry] = [made.best for _, made in choices]
        return lines, chosen, wide


def _rows(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], Cell]]:
    """The rows of a table with the cell that each belongs to."""
    missing = [name for name in (*choice.FIRST, *choice.LAST, *choice.END) if name not in table]
    if missing:
        raise UsageError(f"no column {', '.join(missing)}: not a table of bench search -o")
    after = table["after"].astype(object).fillna("")
    for row in table.assign(after=after).to_dict("records"):
        yield row, Cell(grids.text(choice.settings_in(row)), int(row["seed"]))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
