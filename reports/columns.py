"""The columns of scores as their metrics described them in protocol.json: what each is called and how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.metrics.columns import Column

AVERAGE = Column("average", "Average")  # the paper's: plain mean of raw scores, in which PickScore's scale weighs most
ZSCORE = Column("average_z", "Mean z-score")  # the same scores, each in units of the base's spread over images
AVERAGES = (AVERAGE, ZSCORE)


def described(protocols: Iterable[Mapping[str, Any]], names: Iterable[str]) -> tuple[Column, ...]:
    """The columns of these names in the order of every table; of several protocols the first that knows one decides."""
    said: dict[str, Column] = {}
    for protocol in protocols:
        for metric in protocol.get("metrics", {}).values():
            for record in metric.get("columns", ()):
                said.setdefault(record["name"], Column.read(record))
    return ordered(said.get(name) or of_before(name) for name in names)


def ordered(columns: Iterable[Column]) -> tuple[Column, ...]:
    """Columns in the order of every table."""
    return tuple(sorted(columns, key=lambda column: (column.order, column.name)))


def of_before(name: str) -> Column:
    """A column of a run from before protocols described them: as its metric does now, or by its name alone."""
    from bench import registry  # a metric brings torch along, which reports do without
    from bench.errors import BenchError

    try:
        known = registry.metric(name.partition("/")[0]).table_columns()
    except BenchError:
        known = ()
    return next((column for column in known if column.name == name), Column(name, name))


def lead(columns: Sequence[Column]) -> Column:
    """Which of these, in order, decides who won: the first that reads the truth, else the first."""
    return next((column for column in columns if column.truth), columns[0])


def averaged(columns: Iterable[Column]) -> list[Column]:
    """The paper's metrics among these, which `AVERAGES` are of; none for fewer than two.

    An average of one score would be that score under another name.
    """
    found = [column for column in columns if column.averaged]
    return found if len(found) > 1 else []
