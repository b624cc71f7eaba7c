"""Measured numbers in prose: written from results/measured/ into Markdown, never typed.

A text is a Jinja template beside what it quotes; `python -m bench.reports.quotes` renders every template, and a test
renders them again and compares, so that a digit in a text that no file in results/measured/ says fails.
"""

from __future__ import annotations

import json
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from bench.errors import BenchError
from bench.storage.stages import atomic_write

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "results" / "measured"
LEAD = "judge/utility"
# where a template's text stands: a file of its own, or a file in which it fills the lines between two marks
WHOLE = {"findings.md.j2": MEASURED / "README.md"}
INSIDE = {"summary.md.j2": ROOT / "README.md"}
BEGIN, END = "<!-- measured: written by `make quotes` -->", "<!-- /measured -->"


class Quotes:
    """What a template may ask of the files in a folder; a question without exactly one answer is an error."""

    def __init__(self, folder: Path = MEASURED):
        self.folder = folder

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """Rows of mini_comparison.csv, as `bench table --format csv` writes them."""
        return pd.read_csv(self.folder / "mini_comparison.csv", keep_default_na=False, na_values=[""]).fillna(
            {"against": ""}
        )

    def table(self, name: str) -> pd.DataFrame:
        """Another CSV of the folder; lines that start with # are its protocol."""
        return pd.read_csv(self.folder / name, comment="#")

    def row(
        self, model: str, against: str = "", guidance: float = 1, metric: str = LEAD, stat: str = "mean"
    ) -> pd.Series:
        """One row of the comparison: a model's value, or its paired difference to another, on the test prompts."""
        return _only(
            "mini_comparison.csv",
            self.comparison,
            stat=stat,
            metric=metric,
            model=model,
            against=against,
            guidance=guidance,
        )

    def value(self, model: str, digits: int = 3, **which: Any) -> str:
        """ "0.670": without its interval, for a base or a defect that is told beside others."""
        return f"{self.row(model, **which)['value']:.{digits}f}"

    def difference(self, model: str, against: str = "base", digits: int = 3, sign: str = "+", **which: Any) -> str:
        """ "+0.090 [0.079, 0.102]"."""
        row = self.row(model, against, **which)
        return f"{row['value']:{sign}.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"

    def clear(self, model: str, against: str = "base", **which: Any) -> int:
        """1 where the interval of the difference lies above 0, -1 below, 0 where it contains 0."""
        row = self.row(model, against, **which)
        return int(row["low"] > 0) - int(row["high"] < 0)

    def best(self, guidance: float, metric: str = LEAD) -> str:
        """The model with the highest mean."""
        rows = self.comparison
        own = rows[
            (rows["stat"] == "mean")
            & (rows["against"] == "")
            & (rows["guidance"] == guidance)
            & (rows["metric"] == metric)
        ]
        return str(own.loc[own["value"].idxmax(), "model"])

    @cached_property
    def protocols(self) -> list[dict[str, Any]]:
        """The protocol of every run behind the comparison, with what it cost."""
        return json.loads((self.folder / "mini_comparison.protocols.json").read_text("utf-8"))

    def cost(self, method: str, what: str) -> float:
        """A sum of cost.json (train_flops, sample_flops, pairs_seen) of a method's runs, mean over seeds."""
        found = [run["cost"][what] for run in self.protocols if run["method"] == method]
        if not found:
            raise BenchError(f"mini_comparison.protocols.json has no run of {method}")
        return sum(found) / len(found)

    def agreement(self, metric: str, unit: str, guidance: float) -> str:
        """ "0.51 [0.48, 0.55]": a metric's rank correlation with the judge over images, changes to base, or models."""
        name = "mini_agreement.csv"
        row = _only(name, self.table(name), first=metric, second=LEAD, unit=unit, guidance=guidance)
        return f"{row['spearman']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"

    def judged(self, quantity: str, first: str, second: str, guidance: float, model: str = "all") -> str:
        """ "0.95 [0.93, 0.96]": Spearman's correlation of two readings of generated images, or of models ("order")."""
        row = _only(
            "judge.csv",
            self.table("judge.csv"),
            quantity=quantity,
            statistic="spearman",
            first=first,
            second=second,
            guidance=guidance,
            model=model,
        )
        interval = "" if pd.isna(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
        return f"{row['value']:.2f}{interval}"

    def seeds(self) -> int:
        """Training seeds behind every trained model; all must have the same number."""
        counts = set(self.comparison.loc[self.comparison["model"] != "base", "n_seeds"])
        if len(counts) != 1:
            raise BenchError(f"models of mini_comparison.csv have different numbers of training seeds: {counts}")
        return int(counts.pop())


def _only(name: str, rows: pd.DataFrame, **which: Any) -> pd.Series:
    """The one row of a file whose columns have these values."""
    found = rows[np.logical_and.reduce([rows[column] == value for column, value in which.items()])]
    if len(found) != 1:
        asked = ", ".join(f"{column} {value!r}" for column, value in which.items())
        raise BenchError(f"{name} has {len(found)} rows with {asked}; one is needed")
    return found.iloc[0]


def render(template: Path, folder: Path = MEASURED) -> str:
    """The text of a template over the files in `folder`; `q` in it is Quotes."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template.read_text("utf-8")).render(q=Quotes(folder))


def texts() -> dict[Path, str]:
    """Every file that quotes, with the text it should have."""
    found = {target: render(MEASURED / name) for name, target in WHOLE.items()}
    for name, target in INSIDE.items():
        old = target.read_text("utf-8")
        parts = re.split(f"{re.escape(BEGIN)}.*?{re.escape(END)}", old, flags=re.DOTALL)
        if len(parts) != 2:
            raise BenchError(
                f"{target} has {len(parts) - 1} places for measured text; one is needed, between {BEGIN} and {END}"
            )
        found[target] = f"{parts[0]}{BEGIN}\n{render(MEASURED / name)}{END}{parts[1]}"
    return found


def main() -> None:
    """Write every text that is not as it should be; say which were changed."""
    for path, text in texts().items():
        if not path.exists() or path.read_text("utf-8") != text:
            atomic_write(path, text)
            sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
