"""The published scorers' own packages side by side with ours, in a Python environment of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.errors import BenchError, UsageError
from bench.runtime.progress import track

METRICS = ("hpsv2", "hpsv21", "imagereward")
DEFAULT = ("hpsv2", "imagereward")
DRIVER = Path(__file__).with_name("driver.py")
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
VOCABULARY = "bert-base-uncased"  # by which name image-reward asks for it


def require(names: Sequence[str], python: str | None) -> None:
    """Refuse what no official package scores, and packages that are not installed, before anything is scored."""
    for name in names:
        if name not in METRICS:
            raise UsageError(f"--backend official: no package scores '{name}'; there are {', '.join(METRICS)}")
    found = _run({"metrics": {name: {} for name in names}, "rows": [], "device": "cpu"}, python, 0)
    _refuse_missing(found["missing"], python)


def compare(
    images: Path,
    table: pd.DataFrame,
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
    device: str,
    python: str | None,
) -> dict[str, Any]:
    """Score the rows of `table` that have no problem with the official packages, and compare.

    Adds a column `<metric>_official` to the table. Returns versions and, by metric, the largest absolute and
    relative difference, the image of the former, how many images were compared, and what the package refused.
    """
    metrics = {name: checkpoint(name, options[name].get("weights", "official")) for name in names}
    usable = table.index[table["problem"] == ""]
    rows = [[str((images / table.at[row, "file_name"]).resolve()), table.at[row, "prompt"]] for row in usable]
    if not rows:
        raise BenchError("--backend official: no image could be scored, so there is nothing to compare")
    found = _run({"metrics": metrics, "rows": rows, "device": device}, python, len(rows) * len(names))
    _refuse_missing(found["missing"], python)
    differences = {}
    for name in names:
        table[f"{name}_official"] = pd.Series(found["scores"][name], usable, np.float64)
        differences[name] = difference(table, name) | {
            "refused": {table.at[usable[int(row)], "file_name"]: why for row, why in found["problems"][name].items()}
        }
    return {"versions": found["versions"], "differences": differences}


def checkpoint(name: str, weights: str) -> dict[str, str]:
    """The files that both sides read, found as ours finds them."""
    from bench import registry
    from bench.metrics.base import find_weights

    if weights == "mini":
        raise UsageError(
            "--backend official: the packages know their own sizes only, not the miniatures; "
            f"use --weights official, or --set {name}.weights=FILE"
        )
    published = registry.metric(name).published
    path = Path(find_weights(weights, "", published))
    path = path / published.file if path.is_dir() else path
    if name != "imagereward":
        return {"checkpoint": str(path)}
    from bench.metrics.imagereward import config_path

    return {"checkpoint": str(path), "med_config": str(config_path(path))}


def difference(table: pd.DataFrame, name: str) -> dict[str, Any]:
    """Between the columns `name` and `<name>_official`."""
    both = table[[name, f"{name}_official"]].dropna().astype(float)
    if both.empty:
        return {"images": 0}
    gap = (both[name] - both[f"{name}_official"]).abs()
    relative = gap / both[f"{name}_official"].abs()
    return {
        "images": len(both),
        "largest_absolute": float(gap.max()),
        "largest_relative": float(relative.max()),
        "image": str(table.at[gap.idxmax(), "file_name"]),
    }


def summary(found: Mapping[str, Any]) -> str:
    """The largest differences, and what the official packages refused."""
    lines = ["official packages: " + ", ".join(f"{name} {number}" for name, number in found["versions"].items())]
    for name, one in found["differences"].items():
        lines.append(
            f"  {name:<18} no image scored by both"
            if not one["images"]
            else f"  {name:<18} largest difference {one['largest_absolute']:.3g} absolute ({one['image']}), "
            f"{one['largest_relative']:.3g} relative, {one['images']} images"
        )
        lines += [f"  {image}: refused by the official {name}: {why}" for image, why in one["refused"].items()]
    return "\n".join(lines)


def _run(job: dict[str, Any], python: str | None, rows: int) -> dict[str, Any]:
    """What the driver answers; it works in an empty folder that holds BERT's vocabulary where ours has it."""
    interpreter = str(Path(python).absolute()) if python else sys.executable
    # What this environment adds to its path is not for another one.
    environment = {name: value for name, value in os.environ.items() if not python or name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        if "imagereward" in job["metrics"] and job["rows"]:
            _lend_vocabulary(Path(job["metrics"]["imagereward"]["checkpoint"]).parent, folder)
        with (folder / "errors").open("w+", encoding="utf-8", errors="replace") as errors:
            try:
                process = subprocess.Popen(
                    [interpreter, str(DRIVER), "job.json", "result.json"],
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            except OSError as error:
                raise UsageError(f"--official-python {python}: {error.strerror}") from error
            with process:
                for _ in track(process.stdout, "official packages", total=rows, unit="score") if rows else ():
                    pass
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
        if process.returncode or not (folder / "result.json").is_file():
            raise BenchError(f"the official packages' process ended with status {process.returncode}: {last[:300]}")
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def _lend_vocabulary(beside: Path, folder: Path) -> None:
    """image-reward asks for bert-base-uncased: given from the folders in which ours looks, else left to the hub."""
    from bench.metrics.imagereward import TOKENIZER

    places = [beside]
    if os.environ.get("BENCH_WEIGHTS"):
        root = Path(os.environ["BENCH_WEIGHTS"]).expanduser()
        places += [root / TOKENIZER, root / VOCABULARY]
    for place in places:
        if (place / "vocab.txt").is_file():
            (folder / VOCABULARY).mkdir()
            shutil.copy(place / "vocab.txt", folder / VOCABULARY)
            return


def _refuse_missing(missing: Mapping[str, str], python: str | None) -> None:
    if not missing:
        return
    name, why = next(iter(missing.items()))
    raise BenchError(
        f"the official package of {', '.join(missing)} does not run in {python or sys.executable} ({name}: {why}); its "
        f"pins conflict with this project's, so give it an environment of its own: `python3.11 -m venv official && "
        f"official/bin/pip install -r {REQUIREMENTS}`, then --official-python official/bin/python"
    )
