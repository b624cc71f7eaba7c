"""Which columns come first, which decides who won, and which are averaged; by hand."""

from __future__ import annotations

import pytest

from bench import registry
from bench.metrics.columns import Column
from bench.reports import columns


def test_order_is_that_of_the_columns_then_of_their_names() -> None:
    given = [Column("z", "Z", order=1), Column("b", "B"), Column("a", "A"), Column("judge/utility", "u", order=1001)]
    assert [column.name for column in columns.ordered(reversed(given))] == ["z", "a", "b", "judge/utility"]


def test_the_first_that_reads_the_truth_leads_else_the_first() -> None:
    taste, truth, other = Column("a", "A"), Column("b", "B", truth=True), Column("c", "C", truth=True)
    assert columns.lead([taste, truth, other]) == truth and columns.lead([taste]) == taste


def test_the_newest_protocol_decides_and_a_metric_without_description_is_known_by_name() -> None:
    record = {"name": "mine", "title": "New", "decimals": 2}
    protocols = [
        {"metrics": {"mine": {"columns": [record]}}},
        {"metrics": {"mine": {"columns": [{**record, "title": "Old"}]}, "theirs": {"version": "1"}}},
    ]
    found = columns.described(protocols, ["theirs", "mine", "clip"])
    assert found == (registry.metric("clip").columns[0], Column("mine", "New", decimals=2), Column("theirs", "theirs"))


@pytest.mark.parametrize(
    ("column", "heading"),
    [
        (Column("a", "A"), "A"),
        (Column("a", "A", unit="%"), "A, %"),
        (Column("a", "A", unit="ms", higher_is_better=False), "A, ms ↓"),
    ],
)
def test_headings(column: Column, heading: str) -> None:
    assert column.heading == heading


def test_the_papers_four_are_averaged_and_the_judges_come_last() -> None:
    built_in = columns.ordered(
        column for name in registry.BUILT_IN["metrics"] for column in registry.metric(name).table_columns()
    )
    assert [column.name for column in columns.averaged(built_in)] == ["pickscore", "hpsv2", "imagereward", "aesthetic"]
    taste = [column.truth for column in built_in]
    assert taste == sorted(taste) and columns.lead(built_in).name == "judge/utility"
    assert [column.name for column in built_in if column.truth and column.higher_is_better] == [
        f"{judge}/{part}" for judge in ("judge", "judge2") for part in ("utility", "alignment", "aesthetics")
    ]
