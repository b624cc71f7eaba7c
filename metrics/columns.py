"""What a metric says of its numbers. Imports nothing, so that reports can read it back from protocol.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

Reads = Literal["image", "image and prompt"]
LAST = 1000
"""The order of a column that has no place of its own among others."""


@dataclass(frozen=True)
class Column:
    """One number that a metric gives for an image, and how it is shown.

    name: as in tables and on the command line. A metric of one column calls it by the metric's own name; of several,
    tables know each as `<metric>/<name>`.
    title, unit: its heading; the unit "" for a number without one.
    higher_is_better: which way a difference is a gain.
    decimals: the most that a score or a mean is shown with; None: what its interval shows to be known.
    order: places it among the columns of all metrics, smallest first; equal ones by name.
    truth: whether it reads what the drawn world says is right; the first such column decides who won.
    averaged: whether it is of the SPIN-Diffusion paper's four, whose mean is its "Average".
    detail: left out of tables and plots that do not ask for it.
    """

    name: str
    title: str
    unit: str = ""
    higher_is_better: bool = True
    decimals: int | None = None
    order: int = LAST
    truth: bool = False
    averaged: bool = False
    detail: bool = False

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Column:
        """The column that a protocol describes; what a later version says beyond that is passed over."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    @property
    def heading(self) -> str:
        """Over a column of a table: title, unit, and an arrow where less is better."""
        return self.title + (f", {self.unit}" if self.unit else "") + ("" if self.higher_is_better else " ↓")

    @property
    def sign(self) -> int:
        """By which a value is multiplied to be the better the higher it is."""
        return 1 if self.higher_is_better else -1
