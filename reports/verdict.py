"""What is clear, and what is not: one verdict for each prompt set and guidance, in words and as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.metrics.columns import Column
from bench.reports import layouts, stats, tables
from bench.reports.apart import METHODS, Apart
from bench.reports.load import BASE, Runs
from bench.reports.stats import Estimate

NAMED = 3  # more models than these are counted in a sentence


@dataclass(frozen=True)
class Verdict:
    """Which models of a setting are told apart by the lead metric (for how, see `bench.reports.apart`).

    order: the models, best mean first. value: the mean of the first of them, gain: its paired difference to the
    base, None where there is none. above, below: models told apart from the base. alike: the largest groups within
    which no two models are told apart; two models in no group together are told apart, in the order of their means.
    """

    group: tuple[str, float]
    column: Column
    apart: Apart
    order: list[str]
    value: Estimate
    gain: Estimate | None
    above: list[str]
    below: list[str]
    alike: list[list[str]]

    @property
    def metric(self) -> str:
        """The lead metric's name."""
        return self.column.name

    @property
    def best(self) -> str:
        """The best mean, told apart or not."""
        return self.order[0]

    @property
    def top(self) -> str:
        """What its mean is among the others'."""
        return "highest" if self.column.higher_is_better else "lowest"

    @property
    def speaks_of(self) -> str:
        return self.apart.speaks_of

    @property
    def statement(self) -> str:
        """What is clear, in one clause without a capital; its size is told elsewhere."""
        others = self.order[1:]
        near = [model for model in others if model not in self.apart.beats[self.best]]
        unclear = "not told apart from " + listed(near, f"{len(near)} others")
        if not others:
            return f"only {self.best} was scored"
        if BASE not in self.order:
            return f"{self.best} {self.top}, {unclear}" if near else f"{self._says([self.best])} than all others"
        if self.above == [self.best]:
            tail = f", {unclear}" if near else " and all others" if len(others) > 1 else ""
            return f"{self._says(self.above)} than {BASE}{tail}"
        if self.above:
            tail = f"{self.top}, {unclear}" if near else "above all others"
            return f"{self._says(self.above)} than {BASE}, {self.best} {tail}"
        noun = self.speaks_of.removesuffix("s")
        if self.below:
            return f"no {noun} is told apart above {BASE}, {self._says(self.below, higher=False)}"
        return f"no {noun} is told apart from {BASE}"

    def _says(self, models: Sequence[str], higher: bool = True) -> str:
        """ "SPIN-3 is better", "these checkpoints of SFT and SPIN-3 score lower", "all 5 methods are better"."""
        one, every = len(models) == 1, len(self.order) - 1
        many = f"{'all' if len(models) == every else f'{len(models)} of'} {every} {self.speaks_of}"
        if self.speaks_of == METHODS:
            return f"{listed(models, many)} {'is' if one else 'are'} {'better' if higher else 'worse'}"
        verb = f"score{'s' if one else ''} {'higher' if higher == self.column.higher_is_better else 'lower'}"
        if len(models) > NAMED:
            return f"{many} {verb}"
        return f"{'this checkpoint' if one else 'these checkpoints'} of {listed(models, many)} {verb}"

    @property
    def title(self) -> str:
        """The lead metric in words."""
        return self.column.title + (" (judge)" if self.column.truth else "")

    @property
    def told(self) -> int:
        """How many pairs are told apart."""
        return sum(map(len, self.apart.beats.values()))

    def shown(self, estimate: Estimate, sign: str = "") -> str:
        """ "+0.12 [+0.10, +0.14]", with the digits of its width."""
        rows = pd.DataFrame(
            [
                {
                    **estimate._asdict(),
                    "spread": self.apart.spread,
                    "against": sign and BASE,
                    "decimals": self.column.decimals,
                }
            ]
        )
        places = layouts.column_digits(rows)
        return f"{layouts.number(estimate.value, places, sign)} " + layouts.interval(*estimate[1:], places, sign)

    @property
    def listing(self) -> dict[str, str]:
        """Everything that is clear, for a line of text or a row of a table."""
        groups = "; ".join(", ".join(group) for group in self.alike) or "none, every pair is"
        clear = {f"above {BASE}": self.above, f"below {BASE}": self.below} if BASE in self.order else {}
        return {what: ", ".join(models) or "none" for what, models in clear.items()} | {"not told apart": groups}

    def as_dict(self) -> dict[str, Any]:
        """For programs: the above, and every pair with its estimate (first against second) and corrected p."""
        pairs = self.apart.pairs.astype({"n_seeds": int}).astype(object)
        return {
            "prompt_set": self.group[0],
            "guidance": self.group[1],
            "metric": self.metric,
            "speaks_of": self.speaks_of,
            "statement": self.statement,
            "highest_mean": self.best,
            "above_base": self.above,
            "below_base": self.below,
            "not_told_apart": self.alike,
            "pairs": pairs.where(pairs.notna(), None).to_dict("records"),
        }


def verdicts(runs: Runs) -> list[Verdict]:
    """One verdict a setting; the page opens with the first (first prompt set, highest guidance)."""
    sets = list(dict.fromkeys(name for name, _ in runs.groups))
    order = sorted(runs.groups, key=lambda group: (sets.index(group[0]), -group[1]))
    return [verdict(runs, group) for group in order]


def verdict(runs: Runs, group: tuple[str, float]) -> Verdict:
    """The verdict of one setting, by the lead metric."""
    scores, column, protocol = tables.group_scores(runs, group), tables.lead_column(runs), tables.default_protocol(runs)
    lead = column.name
    apart = tables.apart(runs, group, lead, "mean", protocol)
    plain = stats.compare(scores, lead, "mean", None, protocol)
    plain = plain.sort_values("value", ascending=not column.higher_is_better, kind="stable")
    order = list(plain["model"])
    gain = None
    if BASE in order and order[0] != BASE:
        gain = _row(stats.compare(scores, lead, "mean", BASE, protocol), order[0])
    above = [model for model in order if BASE in apart.beats[model]]
    below = [model for model in order if BASE in order and model in apart.beats[BASE]]
    return Verdict(group, column, apart, order, _row(plain, order[0]), gain, above, below, apart.alike(order))


def headline(found: Sequence[Verdict]) -> str:
    """What page and terminal open with: what is clear at every guidance scale of the first prompt set."""
    said: dict[str, list[str]] = {}
    for one in found:
        if one.group[0] == found[0].group[0]:
            said.setdefault(one.statement, []).append(f"{one.group[1]:g}")
    if len(said) > 1:
        text = "; ".join(f"at guidance {' and '.join(scales)} {statement}" for statement, scales in said.items())
    else:
        ((text, scales),) = said.items()
        text = f"at every guidance scale {text}" if len(scales) > 1 else text
    return text if text.startswith(tuple(found[0].order)) else text[0].upper() + text[1:]


def listed(models: Sequence[str], many: str) -> str:
    """ "SFT", "SFT and SPIN-3"; more than a sentence holds are `many`."""
    if len(models) > NAMED:
        return many
    return " and ".join([", ".join(models[:-1]), models[-1]] if len(models) > 1 else models)


def _row(rows: pd.DataFrame, model: str) -> Estimate | None:
    found = rows[rows["model"] == model]
    return Estimate(*found[["value", "low", "high"]].iloc[0]) if len(found) else None
