"""A run made again from its own protocol, and where the two first differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file

from bench.errors import BenchError, UsageError
from bench.experiment import Interrupted, execute
from bench.runtime import processes
from bench.scoring import evaluate
from bench.shared import Shared
from bench.storage import runs, verify
from bench.storage.integrity import expecting, read_array
from bench.storage.runs import BASE, Run
from bench.suites import stored_suite
from bench.suites.keys import flat

MADE_WITH = ("git_commit", "versions", "device", "threads", "processes")
"""What protocol.json keeps of every process that worked on a run, and what may decide the last bits of a number."""
MADE_FROM = ("model", "data", "metrics", "prompt_sets")
PACE = ["pairs_per_s", "images_per_s"]  # of history.parquet: the machine's, not the numbers'


class Part(NamedTuple):
    """One thing that a run made: files of the same name in both runs, and what differs in two such files."""

    name: str
    files: list[Path]
    difference: Callable[[Path, Path], str]


class Replay(NamedTuple):
    """Two runs side by side: parts compared, those that differ (in the order in which they are made), what the two
    records say otherwise, and the folder of the second run."""

    run: str
    equal: list[str]
    differing: dict[str, str]
    circumstances: list[str]
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "folder": str(self.folder), "bit_equal": not self.differing}


def replay(name: str) -> Replay | None:
    """Make a finished run again, with a cache of its own, below results/replays, and compare; None on processes other
    than the main one.

    Equal to the last bit, the second run is removed; else it is left to be looked at. One that was cut short is gone on
    with. UsageError for a run that has not come to its end, BenchError for one whose files are damaged.
    """
    run, record = recorded(runs.find(name))
    root = runs.REPLAYS / run.folder.name
    with runs.apart(root):
        shared = Shared(run.suite, [run.method])
        begun = shared.processes.once(runs.ids)
        again = (
            runs.load(begun[-1])
            if begun
            else shared.processes.once(lambda: runs.create(run.method, run.suite, run.seed, run.iterations))
        )
        if shared.processes.main:
            click.echo(f"{run.id} again, {'gone on with' if begun else 'begun'} in {again.folder}", err=True)
        try:
            execute(again, shared)
        except Interrupted:
            raise Interrupted(f"the replay of {run.id} was stopped; to go on: the same command") from None
        made = again.folder
    shared.processes.end()
    if not shared.processes.main:
        return None
    found = compare(run, made, record)
    if not found.differing:
        shutil.rmtree(root)
    return found


def recorded(folder: Path) -> tuple[Run, dict[str, Any]]:
    """A finished run as its protocol describes it, and the protocol."""
    if not runs.finished(folder):
        raise UsageError(f"{folder.name} has not come to its end: bench run --resume {folder.name}")
    if processes.index() == 0:
        verify.expect_whole(folder, verify.verify(folder, []).damage)
    path = folder / "protocol.json"
    with expecting(path):
        record = json.loads(path.read_text())
        suite = stored_suite(record["suite"])
        return Run(folder.name, record["method"], record["seed"], record["iterations"], suite), record


def compare(run: Run, again: Path, record: dict[str, Any]) -> Replay:
    """What is equal to the last bit in two folders of one run, and what is not."""
    equal, differing = [], {}
    for part in parts(run):
        if not part.files:
            continue
        found = [
            part.difference(run.folder / file, again / file) if (again / file).exists() else f"{file} is missing"
            for file in part.files
        ]
        unequal = [one for one in found if one]
        if unequal:
            more = f" ({len(unequal)} of {len(found)} files)" if len(found) > 1 else ""
            differing[part.name] = f"{unequal[0]}{more}"
        else:
            equal.append(part.name)
    after = json.loads((again / "protocol.json").read_text())
    return Replay(run.id, equal, differing, circumstances(record, after), again)


def parts(run: Run) -> Iterator[Part]:
    """All that decides a number of a run, in the order in which it is made."""

    def files(pattern: str) -> list[Path]:
        return sorted(path.relative_to(run.folder) for path in run.folder.glob(pattern))

    def evaluated(result: runs.Result) -> Iterator[Part]:
        pictures = [
            path
            for name in run.suite.evaluation.prompt_sets
            for guidance in run.suite.evaluation.guidance
            for path in files(f"{evaluate.image_folder(Path(), name, guidance, result)}/*.png")
        ]
        yield Part(f"images of {result.title}", pictures, pixels)
        yield Part(
            f"scores of {result.title}",
            [Path("scores.parquet")],
            lambda *pair: scores(*pair, result.iteration, result.step),
        )

    yield from evaluated(BASE)
    for iteration in range(1, run.iterations + 1):
        yield Part(f"opponent's latents of iteration {iteration}", files(f"stages/opponent{iteration}/*.npy"), arrays)
        yield Part(f"training signals of iteration {iteration}", files(f"iter{iteration}/history.parquet"), history)
        for result in run.results:
            if result.iteration == iteration:
                yield Part(f"weights of {result.title}", files(f"{result.name}/unet/*.safetensors"), weights)
                yield from evaluated(result)


def arrays(first: Path, second: Path) -> str:
    """What differs in two .npy files; "" where nothing does."""
    return _unequal(first.name, read_array(first), read_array(second))


def weights(first: Path, second: Path) -> str:
    """The first tensor that differs in two files of weights, and how many do."""
    ours, theirs = load_file(first), load_file(second)
    if ours.keys() != theirs.keys():
        return f"{first.name} holds other tensors"
    found = [text for name in ours if (text := _unequal(name, ours[name], theirs[name]))]
    return f"{found[0]}, {len(found)} of {len(ours)} tensors" if found else ""


def pixels(first: Path, second: Path) -> str:
    """How far two images are apart, in grey levels."""
    with Image.open(first) as ours, Image.open(second) as theirs:
        return _unequal(first.name, np.asarray(ours, dtype=np.int16), np.asarray(theirs, dtype=np.int16))


def history(first: Path, second: Path) -> str:
    """The first step whose signals differ."""
    ours, theirs = (pd.read_parquet(path).drop(columns=PACE, errors="ignore") for path in (first, second))
    if list(ours) != list(theirs) or len(ours) != len(theirs):
        return "other signals or steps"
    unequal = (ours != theirs) & ~(ours.isna() & theirs.isna())
    if not unequal.to_numpy().any():
        return ""
    row = int(unequal.any(axis=1).to_numpy().argmax())
    name = unequal.columns[unequal.iloc[row].to_numpy().argmax()]
    return f"{name} of step {ours['step'].iloc[row]}: {ours[name].iloc[row]!r}, not {theirs[name].iloc[row]!r}"


def scores(first: Path, second: Path, iteration: int, step: int) -> str:
    """How many scores of a model differ, and by how much."""
    ours, theirs = (
        table[(table["iteration"] == iteration) & (table["step"] == step)]
        .drop(columns="run")
        .sort_values(sorted(set(evaluate.COLUMNS) - {"run", "value"}), ignore_index=True)
        for table in map(pd.read_parquet, (first, second))
    )
    if not ours.drop(columns="value").equals(theirs.drop(columns="value")):
        return "other rows"
    return _unequal("scores", ours["value"].to_numpy(), theirs["value"].to_numpy())


def _unequal(name: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{name}: {ours.dtype}{list(ours.shape)}, not {theirs.dtype}{list(theirs.shape)}"
    if ours.tobytes() == theirs.tobytes():
        return ""
    apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return f"{name}: {np.count_nonzero(apart)} of {apart.size} values, by up to {np.nanmax(apart):.3g}"


def circumstances(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What two protocols say otherwise of what the numbers were made from and with, a line each."""
    told = []
    ours, theirs = (
        flat({name: record.get(name) for name in MADE_FROM}) | _made_with(record) for record in (before, after)
    )
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            told.append(f"{name}: {_text(ours.get(name))} then, {_text(theirs.get(name))} now")
    return told


def _made_with(record: dict[str, Any]) -> dict[str, Any]:
    """By name, the values that the processes of a run had; a list where they had several."""
    known = [flat({name: one.get(name) for name in MADE_WITH}) for one in record.get("processes") or [record]]
    values = {name: list(dict.fromkeys(str(one.get(name)) for one in known)) for one in known for name in one}
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def summary(found: Replay) -> str:
    """Both runs side by side, for people."""
    lines = [f"{name}: equal to the last bit" for name in found.equal]
    lines += [f"{name}: {difference}" for name, difference in found.differing.items()]
    lines += [f"other circumstances: {told}" for told in found.circumstances] or ["the circumstances are the same"]
    return "\n".join(lines)


def replay_run(name: str, layout: str) -> None:
    """`bench run --replay`: print the two runs side by side; BenchError with the first difference, and what may have
    caused it."""
    found = replay(name)
    if found is None:
        return
    click.echo(json.dumps(found.as_dict(), indent=1) if layout == "json" else summary(found))
    if not found.differing:
        return
    name, difference = next(iter(found.differing.items()))
    cause = "; ".join(found.circumstances) or (
        "none of the recorded circumstances differs: the code, or the device, does not compute the same twice"
    )
    raise BenchError(f"{found.run} is not what it was; first the {name}: {difference} ({cause}); see {found.folder}")
