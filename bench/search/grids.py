"""What is tried: the settings of a grid, whether every entry is given as much, and where a grid would have to grow."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from bench.errors import UsageError, did_you_mean
from bench.methods.base import Method
from bench.suites import Iteration, Search, Suite, keys, options

Setting = dict[str, Any]  # all that an iteration is given, by name, without what is null
Side = Literal["low", "high"]
READOUTS = {"checkpoints"}  # of an iteration: what says when results are read, not how it is trained


def of(suite: Suite) -> Search:
    """The suite's search section; refuses a suite without one."""
    if suite.search is None:
        raise UsageError(f"suite '{suite.name}' has no search section; bench/suites/mini-measured.yaml shows one")
    return suite.search


def settings(suite: Suite, entry: str, number: int) -> list[Setting]:
    """Every combination of an iteration's grid, in order; what the grid does not name is as the entry lists it."""
    listed = suite.schedule(entry, number)[-1].model_dump(exclude=READOUTS)
    grid = of(suite).grids[entry][number - 1]
    changes = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    place = ("search", "grids", entry, str(number - 1))
    return [_resolved({**listed, **change}, suite.method(entry), place) for change in changes]


def _resolved(values: Setting, method: type[Method], place: tuple[str, ...]) -> Setting:
    """A setting as an iteration and the method's options take it; the name of what they do not."""
    try:
        iteration = Iteration.model_validate(values)
        options.resolve(method, iteration.options, place)
        return iteration.model_dump(exclude=READOUTS, exclude_none=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        entry = place[2]
        known = {"search": {"grids": {entry: {place[-1]: dict.fromkeys(Iteration.model_fields)}}}}
        raise UsageError(keys.explain({**problem, "loc": (*place, *problem["loc"])}, known)) from error


def text(setting: Mapping[str, Any]) -> str:
    """A setting as it is shown, and by which it is known: equal texts are equal settings."""
    return " ".join(f"{name}={digits(value)}" for name, value in setting.items())


def flow(setting: Mapping[str, Any]) -> str:
    """A setting as a line of a suite."""
    return "{" + ", ".join(f"{name}: {digits(value)}" for name, value in setting.items()) + "}"


def digits(value: Any) -> str:
    """A value in as few digits as tell it from others."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def check(suite: Suite) -> None:
    """Refuse a search that treats methods unequally, or grids that cannot be tried."""
    search = of(suite)
    if len(set(search.seeds)) < len(search.seeds):
        raise UsageError(f"search.seeds: {search.seeds} names a seed twice; one training is one training")
    for entry in search.grids:
        if entry not in suite.methods:
            raise UsageError(
                f"search.grids.{entry}: the suite has no such entry in methods{did_you_mean(entry, suite.methods)}"
            )
        for number in range(1, len(search.grids[entry]) + 1):
            tried = settings(suite, entry, number)
            if len({text(setting) for setting in tried}) < len(tried):
                raise UsageError(f"search.grids.{entry}.{number - 1}: names a setting twice")
    _check_budgets(suite)


def _check_budgets(suite: Suite) -> None:
    """The same for every entry: settings tried in an iteration, and pairs seen by all of them together."""
    given = {}
    for entry, grid in of(suite).grids.items():
        tried = [settings(suite, entry, number) for number in range(1, len(grid) + 1)]
        pairs = sum(setting["steps"] for iteration in tried for setting in iteration)
        given[entry] = ({len(iteration) for iteration in tried}, pairs * suite.training(entry).batch_size)
    if len({(tuple(counts), pairs) for counts, pairs in given.values()}) > 1 or any(
        len(counts) > 1 for counts, _ in given.values()
    ):
        told = "; ".join(
            f"{entry} {' or '.join(map(str, sorted(counts)))} settings an iteration, {pairs} pairs"
            for entry, (counts, pairs) in given.items()
        )
        raise UsageError(f"search.grids: every method must be given the same budget, but these differ: {told}")


class Edge(NamedTuple):
    """An end of a list of values at which the best one lies, and the value that would come next."""

    side: Side
    further: float


def edges(grid: Mapping[str, Sequence[Any]], chosen: Setting, ends: Mapping[str, Side]) -> dict[str, Edge]:
    """Where a setting lies at an end of its grid that could be moved, by the setting's name.

    A list of one value was not searched, and of what is no number there is no next one. `ends` are natural: beyond
    them is nothing to look for.
    """
    found = {}
    for name, values in grid.items():
        numbers = sorted({value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)})
        if len(numbers) < 2 or chosen.get(name) not in (numbers[0], numbers[-1]):
            continue
        side: Side = "low" if chosen[name] == numbers[0] else "high"
        further = _next(numbers if side == "high" else numbers[::-1])
        if ends.get(name) != side and further not in numbers and _possible({**chosen, name: further}):
            found[name] = Edge(side, further)
    return found


def _next(numbers: Sequence[float]) -> float:
    """The value after the last: as far again, by ratio where all are positive, in two digits."""
    before, last = numbers[-2:]
    further = last * last / before if min(numbers) > 0 else last + (last - before)
    rounded = float(f"{further:.2g}")
    return int(rounded) if all(isinstance(number, int) for number in numbers) else rounded


def _possible(setting: Setting) -> bool:
    try:
        Iteration.model_validate(setting)
    except ValidationError:
        return False
    return True
