"""The fault campaign: every trial a row of results/measured/faults.csv. `make faults`; a campaign cut short goes on.

A trial follows from its kind and its seed (where a killed process was, of one killed by the clock, does not).
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults.trials import BAD, KINDS, Found
from faults.workplace import Workplace, remove

COLUMNS = ("kind", "place", "seed", "outcome", "seconds", "note")


def trial(work: Workplace, kind: str, seed: int) -> Found:
    """One trial, in folders that are removed unless something is bad."""
    found = KINDS[kind][0](work, random.Random(f"{kind} {seed}"))
    if found.outcome not in BAD:
        for path in work.root.glob("trial-*"):
            remove(path)
    return found


def run(work: Workplace, rows: Path, wanted: dict[str, range]) -> None:
    """Make the trials that `rows` does not hold yet."""
    done = {(row["kind"], int(row["seed"])) for row in read(rows)}
    with open(rows, "a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            table.writeheader()
        for kind, seed in [(kind, seed) for kind, seeds in wanted.items() for seed in seeds]:
            if (kind, seed) in done:
                continue
            began = time.monotonic()
            found = trial(work, kind, seed)
            note = " ".join(found.note.replace(str(work.root), "").split()) if found.outcome in BAD else ""
            seconds = f"{time.monotonic() - began:.2f}"
            table.writerow(dict(zip(COLUMNS, (kind, found.place, seed, found.outcome, seconds, note), strict=True)))
            file.flush()
            if note:
                print(f"{kind} {seed}: {found.place}: {found.outcome}: {note}", file=sys.stderr, flush=True)


def read(rows: Path) -> list[dict[str, str]]:
    if not rows.exists():
        return []
    with open(rows, newline="") as file:
        return list(csv.DictReader(file))


def summary(rows: list[dict[str, str]]) -> str:
    """How often what came out of each kind, and of all."""
    outcomes = ("equal", "told", *BAD)
    counts = {kind: Counter(row["outcome"] for row in rows if row["kind"] == kind) for kind in KINDS}
    counts["all"] = sum(counts.values(), Counter())
    lines = [f"{'':<20}{'trials':>7}" + "".join(f"{outcome:>7}" for outcome in outcomes)]
    for kind, count in counts.items():
        lines.append(f"{kind:<20}{count.total():>7}" + "".join(f"{count[outcome]:>7}" for outcome in outcomes))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/measured/faults.csv"))
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these")
    parser.add_argument("--seeds", help="FIRST:LAST of every kind, instead of as many as `make faults` makes")
    options = parser.parse_args()
    kinds = options.kind or KINDS
    given = range(*map(int, options.seeds.split(":"))) if options.seeds else None
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        run(Workplace(Path(root)), options.output, {kind: given or range(KINDS[kind][1]) for kind in kinds})
    rows = read(options.output)
    print(summary(rows))
    sys.exit(any(row["outcome"] in BAD for row in rows))


if __name__ == "__main__":
    main()
