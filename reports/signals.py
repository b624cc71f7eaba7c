"""The signals of training that runs declare in their protocols."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bench.methods.signals import UNDECLARED, Signal


def declared(protocols: Iterable[Mapping[str, Any]]) -> dict[str, Signal]:
    """Every signal by name, as the first run that has it declares it; older runs logged some without saying so."""
    found: dict[str, Signal] = {}
    for protocol in protocols:
        records = protocol.get("signals")
        for signal in UNDECLARED if records is None else map(Signal.read, records):
            found.setdefault(signal.name, signal)
    return found


def ranges(columns: Iterable[str], name: str) -> dict[str, tuple[int, int]]:
    """The columns that hold a signal in a range of timesteps, and the first and last timestep of each."""
    pattern = re.compile(rf"{re.escape(name)}_t(\d+)_(\d+)")
    matches = {column: pattern.fullmatch(str(column)) for column in columns}
    return {column: (int(match[1]), int(match[2])) for column, match in matches.items() if match}
