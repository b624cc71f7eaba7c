"""Find runs on disk and put the comparable ones into one long table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from bench.errors import BenchError, UsageError, did_you_mean, first_line
from bench.metrics.columns import Column
from bench.reports import columns, foreign
from bench.reports.comparable import mismatch, with_defaults
from bench.storage import runs as stored
from bench.storage import verify
from bench.storage.runs import Result

BASE = stored.BASE.method
COLUMNS = ["method", "iteration", "prompt_set", "prompt_id", "seed", "guidance", "metric", "value"]
RESULT = ["method", "iteration", "step"]  # what tells the models of a run apart
KEYS = [*RESULT, "train_seed", *COLUMNS[2:-1]]
METHOD_ORDER = (BASE, "sft", "diffusion_dpo", "spin")


@dataclass
class Runs:
    """Comparable runs, newest first.

    scores: long table, one row a score: run, model (label), method, iteration, step (optimizer steps since the
    base), train_seed (NA for the base), prompt_set, prompt_id, seed (of sampling), guidance, metric, value.
    history: the logged training signals with run, model (the first result that a row leads to) and train_seed.
    models: what each label stands for, in the order of tables. columns: what stands in metric, in the order of every
    table. problems: one line for each thing left out or in doubt.
    """

    scores: pd.DataFrame
    history: pd.DataFrame
    protocols: dict[str, dict]
    costs: dict[str, dict]
    folders: dict[str, Path]
    models: dict[str, Result]
    columns: tuple[Column, ...]
    problems: list[str] = field(default_factory=list)
    arrays: dict = field(default_factory=dict, repr=False)  # scores by setting, kept by tables.group_scores
    agreements: dict = field(default_factory=dict, repr=False)  # kept by agreement.setting

    @property
    def protocol(self) -> dict:
        """The newest run's protocol; in everything that matters for a comparison the others equal it."""
        return next(iter(self.protocols.values()))

    @property
    def evaluation(self) -> dict:
        return self.protocol.get("suite", {}).get("evaluation", {})

    @property
    def groups(self) -> list[tuple[str, float]]:
        """(prompt set, guidance) as the suite orders them."""
        found = {(str(s), float(g)) for s, g in self.scores[["prompt_set", "guidance"]].drop_duplicates().values}
        order = list(self.evaluation.get("prompt_sets", {}))
        return sorted(found, key=lambda g: (order.index(g[0]) if g[0] in order else len(order), g))

    def column(self, metric: str) -> Column:
        """What is known of a metric's column, or of an average."""
        return next(column for column in (*self.columns, *columns.AVERAGES) if column.name == metric)

    def title(self, method: str) -> str:
        titles = (p.get("method_title") for p in self.protocols.values() if p.get("method") == method)
        return next((t for t in titles if t), method)

    def resolve(self, name: str) -> str:
        """A model's label from its label, or from METHOD[:ITERATION][@STEP].

        STEP counts within the iteration. Where it or the iteration is left out, the last there is.
        """
        folded = {label.casefold(): label for label in self.models}
        if name.casefold() in folded:
            return folded[name.casefold()]
        rest, _, step = name.partition("@")
        method, _, iteration = rest.partition(":")
        found = [
            label
            for label, result in self.models.items()
            if result.method.casefold() == method.casefold()
            and iteration in ("", str(result.iteration))
            and step in ("", str(result.within))
        ]
        if found:
            return found[-1]
        options = [*self.models, *(result.method for result in self.models.values())]
        raise UsageError(
            f"no model '{name}' in these runs{did_you_mean(name, options)}; there are {', '.join(self.models)}"
        )


def load_runs(paths: Sequence[Path] | None = None, root: Path = Path("results/runs")) -> Runs:
    """Read the runs at `paths` (folders or ids under `root`; None: all under `root`).

    The newest run decides what the others must equal; a run of another suite is set apart with a reason, an
    unreadable one named and passed over. Fails when nothing is left.
    """
    problems: list[str] = []
    read = []
    for folder in _folders(paths, Path(root)):
        try:
            read.append(foreign.checked(_read(folder, problems)))
        except Exception as error:  # whatever lies in one folder, the others are reported
            problems.append(f"{folder.name}: left out, {_reason(error)}")
    if not read:
        detail = f" ({'; '.join(problems)})" if problems else ""
        raise BenchError(f"no finished run under {root}{detail}; make one with `bench run --method spin`")
    read.sort(key=lambda run: (str(run["protocol"].get("created", "")), run["id"]), reverse=True)
    kept: list[dict] = []
    for run in read:
        reason = mismatch(run, kept)
        if reason:
            problems.append(f"{run['id']}: set apart, {reason}")
        else:
            kept.append(run)
    return _join(kept, problems)


def prompt_texts(runs: Runs, prompt_set: str) -> dict[str, str]:
    """Prompt id -> text, from `images/<prompt set>/prompts.json` of the runs (empty if no run has it)."""
    texts: dict[str, str] = {}
    for folder in reversed(runs.folders.values()):
        try:
            texts.update(json.loads((folder / "images" / prompt_set / "prompts.json").read_text("utf-8")))
        except (OSError, ValueError):
            continue
    return texts


def _folders(paths: Sequence[Path] | None, root: Path) -> list[Path]:
    if not paths:
        return sorted(p for p in root.iterdir() if (p / "protocol.json").exists()) if root.is_dir() else []
    folders: list[Path] = []
    for path in map(Path, paths):
        path = path if path.is_dir() else root / path
        if not path.is_dir():
            names = [p.name for p in root.iterdir()] if root.is_dir() else []
            raise UsageError(f"no run '{path.name}' under {root}{did_you_mean(path.name, names)}")
        inside = sorted(p for p in path.iterdir() if (p / "protocol.json").exists())
        folders += [path] if (path / "protocol.json").exists() or not inside else inside
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no {Path(error.filename).name} (unfinished?)" if error.filename else "unfinished?"
    return first_line(error)[:200]


def _read(folder: Path, problems: list[str]) -> dict[str, Any]:
    verify.expect_whole(folder, verify.record_damage(folder))
    protocol = _judge_as_metric(_json(folder / "protocol.json"))
    if not (folder / "scores.parquet").exists():
        raise ValueError("no scores.parquet (unfinished?)")
    scores = pd.read_parquet(folder / "scores.parquet")
    missing = [name for name in COLUMNS if name not in scores]
    if missing:
        raise ValueError(f"scores.parquet lacks {', '.join(missing)}")
    results = _results(protocol, int(scores["iteration"].max()))
    if "step" not in scores:  # of before a training could have results inside it
        ends = {result.iteration: result.step for result in results}
        scores = scores.assign(step=scores["iteration"].map(ends).fillna(0))
    scores = scores[[*RESULT, *COLUMNS[2:]]].astype(
        {"iteration": "int64", "step": "int64", "seed": "int64", "guidance": float, "value": float}
    )
    finite = scores["value"].notna() & scores["value"].abs().ne(float("inf"))
    if not finite.all():
        problems.append(f"{folder.name}: {int((~finite).sum())} scores are not numbers and are ignored")
        scores = scores[finite]
    if scores.empty:
        raise ValueError("scores.parquet is empty")
    wanted, done = protocol.get("iterations"), int(scores["iteration"].max())
    if wanted and done < wanted:
        problems.append(f"{folder.name}: {done} of {wanted} iterations so far (unfinished?)")
    problems += [str(warning) for warning in protocol.get("warnings", []) if warning not in problems]
    scores["run"] = folder.name
    seed = pd.Series(int(protocol["seed"]), index=scores.index, dtype="Int64")
    scores["train_seed"] = seed.mask(scores["method"].eq(BASE))
    try:
        cost = _json(folder / "cost.json")
    except (OSError, ValueError) as error:
        cost = {}
        problems.append(f"{folder.name}: no cost shown, {_reason(error)}")
    return {
        "id": folder.name,
        "folder": folder,
        "protocol": protocol,
        "suite": with_defaults(protocol.get("suite", {})),
        "scores": scores,
        "results": results,
        "cost": cost,
        "history": _history(folder, int(protocol["seed"])),
    }


def _results(protocol: dict, iterations: int) -> list[Result]:
    """What a run leaves, as its protocol says; in one of before there were checkpoints, the ends of its iterations."""
    if "results" in protocol:
        try:
            return [Result(**result) for result in protocol["results"]]
        except TypeError as error:
            raise ValueError(f"protocol.json: results are not as bench writes them ({error})") from error
    method, found, step = protocol.get("method", ""), [], 0
    listed = protocol.get("suite", {}).get("methods", {}).get(method, {}).get("iterations") or [{}]
    for iteration in range(1, iterations + 1):
        within = int(listed[min(iteration, len(listed)) - 1].get("steps", 0))
        step += within
        found.append(Result(method, iteration, step, within))
    return found


def _json(path: Path) -> dict:
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def _judge_as_metric(protocol: dict) -> dict:
    """The protocol of a run from when the judge was no metric yet, as it is written now."""
    if not isinstance(protocol.get("judge"), dict):
        return protocol
    return {**protocol, "metrics": {**protocol.get("metrics", {}), "judge": protocol["judge"]}, "judge": None}


def _history(folder: Path, seed: int) -> pd.DataFrame:
    path = folder / "history.parquet"
    history = pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=["method", "iteration", "step"])
    return history.assign(run=folder.name, train_seed=seed)


def _join(kept: list[dict], problems: list[str]) -> Runs:
    problems += _base_disagreements(kept)
    scores = pd.concat([run["scores"] for run in kept], ignore_index=True)
    repeats = scores.duplicated(KEYS)
    twice = scores[repeats & scores["method"].ne(BASE)]
    for run in twice["run"].unique():
        problems.append(f"{run}: repeats a method and seed of a newer run, which is the one used")
    scores = scores[~repeats].reset_index(drop=True)
    trained = [run["history"] for run in kept if len(run["history"])]  # what was given as it is has no log
    history = pd.concat(trained or [kept[0]["history"]], ignore_index=True)
    protocols = {run["id"]: run["protocol"] for run in kept}
    runs = Runs(
        scores,
        history,
        protocols,
        {run["id"]: run["cost"] for run in kept},
        {run["id"]: run["folder"] for run in kept},
        {},
        columns.described(protocols.values(), scores["metric"].unique()),
        problems,
    )
    runs.models = _labels(runs, [result for run in kept for result in run["results"]])
    labels = pd.DataFrame([(*result[:3], label) for label, result in runs.models.items()], columns=[*RESULT, "model"])
    runs.scores = runs.scores.merge(labels, how="left")
    runs.history = _led_to(runs.history, labels)
    used = set(runs.scores["run"])
    runs.history = (
        runs.history[runs.history["run"].isin(used)].drop_duplicates([*RESULT, "train_seed"]).reset_index(drop=True)
    )
    for name in ("run", "model", "method", "prompt_set", "prompt_id", "metric"):
        runs.scores[name] = runs.scores[name].astype("category")
    return runs


def _base_disagreements(kept: list[dict]) -> list[str]:
    """Runs of one suite share the base model, prompts and seeds, so their base scores must agree."""
    on = ["prompt_set", "prompt_id", "seed", "guidance", "metric"]
    bases = [(run["id"], run["scores"].query("method == @BASE").set_index(on)["value"]) for run in kept]
    found = []
    for name, base in bases[1:]:
        gap = (base - bases[0][1]).abs().max()
        if gap > 1e-2 * max(bases[0][1].abs().max(), 1.0):
            found.append(f"{name}: base scores differ from those of {bases[0][0]} by up to {gap:.2g}")
    return found


def _led_to(history: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Every row of the log with the first result that it leads to: the next of its iteration."""
    if history.empty:
        return history.assign(model="")
    rows = history.assign(row=range(len(history)), step=history["step"].astype("int64")).sort_values("step")
    found = pd.merge_asof(rows, labels.sort_values("step"), on="step", by=["method", "iteration"], direction="forward")
    return found.sort_values("row", ignore_index=True).drop(columns="row")


def _labels(runs: Runs, known: Sequence[Result]) -> dict[str, Result]:
    """Label -> result, ordered as in every table: base, one-shot methods, then the iterated.

    SFT, or SFT@100 where a method of one iteration has results inside it; SPIN-2 and SPIN-2@50 where there are
    several iterations.
    """
    there = {(str(m), int(i), int(s)) for m, i, s in runs.scores[RESULT].drop_duplicates().values}
    named = {result[:3]: result for result in (stored.BASE, *reversed(known))}
    results = [named.get(key, Result(*key, within=key[2])) for key in there]
    iterations = {result.method: {r.iteration for r in results if r.method == result.method} for result in results}
    divided = {result.method for result in results if not result.end}

    def order(result: Result) -> tuple:
        rank = METHOD_ORDER.index(result.method) if result.method in METHOD_ORDER else len(METHOD_ORDER)
        several = len(iterations[result.method]) > 1
        return result.method != BASE, several, rank, result.method, result.iteration, result.step

    labels: dict[str, Result] = {}
    for result in sorted(results, key=order):
        several = len(iterations[result.method]) > 1
        inside = not result.end or (result.method in divided and not several)
        label = BASE if result.method == BASE else runs.title(result.method)
        if several or inside:
            label = label.removesuffix("-Diffusion")
        label += f"-{result.iteration}" * several + f"@{result.within}" * inside
        labels[label if label not in labels else f"{label} ({result.method})"] = result
    return labels
