"""One trial: train a setting from what earlier iterations settled on, and judge it on the validation prompts.

A trial is a run as any other, in a folder of its own. All trials of a round and seed branch off one trunk, a run that
holds the earlier iterations and, in self-play, the samples of the opponent, which are the same for every setting.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import walk
from bench.data import load_prompts
from bench.errors import UsageError, did_you_mean
from bench.experiment import Experiment, build_method
from bench.methods.base import Pairing
from bench.runtime.progress import quiet
from bench.search import grids
from bench.search.grids import Setting
from bench.shared import Shared
from bench.storage import pieces
from bench.storage.runs import Run
from bench.storage.stages import fingerprint, link, temporary
from bench.suites import Iteration, Prompts, Suite
from bench.training.recipe import NEUTRAL

FOLDER = Path("results/search")
PROMPT_SET = "validation"


@dataclass(frozen=True)
class Round:
    """The search of one iteration of an entry, from what its earlier iterations settled on."""

    entry: str
    number: int
    settled: tuple[Setting, ...]
    identity: str  # of all else that decides results

    @property
    def after(self) -> str:
        return "; ".join(map(grids.text, self.settled))

    @property
    def name(self) -> str:
        return f"{self.entry} {self.number} [{self.identity}]" + (f" after {self.after}" if self.settled else "")

    def folder(self, seed: int, setting: Setting | None = None) -> Path:
        """Where a trial is kept, or without a setting the trunk of all of a seed."""
        place = FOLDER / f"{self.entry}{self.number}-{fingerprint([self.identity, self.after])[:8]}"
        return place / (f"s{seed}" if setting is None else f"s{seed}-{fingerprint(grids.text(setting))[:8]}")


@dataclass(frozen=True)
class Tried(Run):
    """A run of the search, which is kept apart from those that are compared."""

    place: Path

    @property
    def folder(self) -> Path:
        return self.place


def validation(suite: Suite) -> Suite:
    """The suite as it is searched: on the search's prompts, with the scorer alone whose number is judged."""
    search = grids.of(suite)
    prompts = Prompts(prompts=search.prompts, limit=search.limit)
    return suite.model_copy(
        update={
            "evaluation": suite.evaluation.model_copy(update={"prompt_sets": {PROMPT_SET: prompts}}),
            "metrics": [name for name in suite.metrics if name == search.metric.partition("/")[0]],
            "search": None,
        }
    )


def refuse_test_prompts(suite: Suite) -> None:
    """What settings were chosen on says nothing more about them: the evaluation must use other prompts."""
    search = grids.of(suite)
    sought = set(load_prompts(search.prompts, search.limit).prompts)
    for name, prompts in suite.evaluation.prompt_sets.items():
        both = sought.intersection(load_prompts(prompts.prompts, prompts.limit).prompts)
        if both:
            raise UsageError(
                f"search.prompts: {len(both)} of {len(sought)} prompts of {search.prompts} are in "
                f"evaluation.prompt_sets.{name} too; search on prompts that no evaluation uses"
            )


class Trials:
    """Does trials; everything that they share is loaded once."""

    def __init__(self, suite: Suite, entries: Sequence[str]):
        refuse_test_prompts(suite)
        self.searched, self.suite = grids.of(suite), validation(suite)
        for entry in entries:
            for number in range(1, len(self.searched.grids[entry]) + 1):
                for setting in grids.settings(suite, entry, number):
                    build_method(suite.kind(entry), Iteration(**setting))
        self.shared = Shared(self.suite, entries)
        self._refuse_metric(suite.metrics)

    def _refuse_metric(self, others: Sequence[str]) -> None:
        """Refuse to search by a number that no scorer gives, or that is not to grow."""
        metric = self.searched.metric
        columns = {column.name: column for column in self.shared.evaluator.scorers.columns}
        if metric not in columns:
            raise UsageError(f"search.metric: the suite has no '{metric}'{did_you_mean(metric, [*columns, *others])}")
        if not columns[metric].higher_is_better:
            raise UsageError(f"search.metric: of {metric} less is better; search by a number that is to grow")

    def identity(self, entry: str) -> str:
        """A hash of all that decides an entry's results but its settings, earlier ones and seed.

        What stands at its default is left out: a setting that a later version adds changes no hash.
        """
        changing = {"batch_size", "prompt_sets", "protocol"}
        return fingerprint(
            {
                "method": self.suite.kind(entry),
                "data": self.shared.encoded.key,
                "metric": self.searched.metric,
                "train": self.suite.training(entry).model_dump(
                    exclude=set(NEUTRAL) | {"micro_batch", "log_every"}, exclude_defaults=True
                ),
                "opponent": self.suite.opponents(entry).model_dump(exclude={"batch_size"}, exclude_defaults=True)
                if self.self_play(entry)
                else None,
                "evaluation": self.suite.evaluation.model_dump(exclude=changing, exclude_defaults=True),
                "prompts": self.shared.evaluator.prompt_sets[PROMPT_SET].ids,
                "metrics": self.shared.evaluator.scorers.info(),
            }
        )

    def self_play(self, entry: str) -> bool:
        return self.suite.method(entry).pairing is Pairing.SELF_PLAY

    def do(self, this: Round, setting: Setting, seed: int) -> dict[str, Any]:
        """Train and judge: utility, gain over the base, gain per guidance, and the utility of every prompt."""
        run = self._run(this, setting, seed, this.folder(seed, setting))
        with quiet():
            self._grow_trunk(this, setting, seed)
            _branch(this.folder(seed), run.folder)
            Experiment(run, self.shared).stages(_silent)
        return self._judged(run)

    def _run(self, this: Round, setting: Setting, seed: int, folder: Path) -> Run:
        iterations = [Iteration(**settings) for settings in (*this.settled, setting)]
        entry = self.suite.methods[this.entry].model_copy(update={"iterations": iterations})
        suite = self.suite.model_copy(update={"methods": {this.entry: entry}})
        return Tried(folder.name, this.entry, seed, this.number, suite, folder)

    def _grow_trunk(self, this: Round, setting: Setting, seed: int) -> None:
        """Earlier iterations, from the trial that won if it is here, and the opponent; made together by all who ask."""
        trunk = this.folder(seed)
        if this.settled:
            *before, last = this.settled
            _branch(Round(this.entry, this.number - 1, tuple(before), this.identity).folder(seed, last), trunk)
        if not self.self_play(this.entry):
            return
        experiment = Experiment(self._run(this, setting, seed, trunk), self.shared)
        for stage in walk.walk(experiment.suite, this.entry, this.number):
            if isinstance(stage, walk.Opponent) or isinstance(stage, walk.Training) and stage.iteration < this.number:
                experiment.do(stage, _silent)

    def _judged(self, run: Run) -> dict[str, Any]:
        """Means over sampling seeds and guidance scales of the last iteration beside the base, prompt by prompt."""
        rows = pd.read_parquet(run.folder / "scores.parquet").astype({"value": "float64"})
        rows = rows[rows["metric"] == self.searched.metric]
        values = rows.groupby(["iteration", "guidance", "prompt_id"])["value"].mean().unstack("prompt_id")
        values = values[list(self.shared.evaluator.prompt_sets[PROMPT_SET].ids)]
        last, base = values.loc[run.iterations], values.loc[0]
        gains = (last - base).mean(axis=1)
        return {
            "utility": float(last.to_numpy().mean()),
            "gain": float(gains.mean()),
            **{f"gain_g{guidance:g}": float(gain) for guidance, gain in gains.items()},
            "prompts": np.float32(last.mean()).tolist(),
        }


def _silent(name: str, value: float, step: int) -> None:
    """A trial has no record of sacred's."""


def _branch(source: Path, target: Path) -> None:
    """A folder that begins as another, without copying files where the file system allows it; once."""
    if target.exists() or not source.exists():
        return
    unfinished = temporary(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, copy_function=link, ignore=shutil.ignore_patterns(".*", pieces.FOLDER))
    try:
        os.rename(unfinished, target)
    except OSError:  # another worker was first
        shutil.rmtree(unfinished)
