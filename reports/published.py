"""Numbers that papers print, only where a readable source confirms them: `published.csv` beside this file."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

FILE = Path(__file__).with_name("published.csv")
PAPER = "SPIN-Diffusion (arXiv 2402.10210)"


class Published(NamedTuple):
    """One cell of a paper's table.

    text: its digits as printed. kind: verbatim (read in the source) or derived (computed from such).
    """

    value: float
    text: str
    kind: str
    protocol: str
    source: str


@lru_cache
def published(paper: str = PAPER) -> dict[tuple[int, str, str], Published]:
    """(table number, model as the paper names it, metric) -> its cell.

    Win rates are in per cent, as printed.
    """
    rows = pd.read_csv(FILE, keep_default_na=False, dtype=str)
    found = {}
    for row in rows[rows["paper"] == paper].itertuples():
        number = re.match(r"Table (\d+)\b", row.table)
        if number:
            key = (int(number[1]), row.model, row.metric)
            found[key] = Published(float(row.value), row.value, row.kind, row.protocol, row.source)
    return found
