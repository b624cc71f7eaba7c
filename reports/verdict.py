"""Who won, and how sure one may be: one finding for each prompt set and guidance."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from reports import stats
from reports.load import BASE, Runs
from reports.stats import Estimate
from reports.tables import default_protocol, group_scores, lead_metric


@dataclass(frozen=True)
class Finding:
    """The best model of a setting by the lead metric.

    gain: its paired difference to the base. rival: the best model of another method, and the paired
    difference to it. Either is None where there is nothing to compare with.
    """

    group: tuple[str, float]
    best: str
    value: Estimate
    gain: Estimate | None
    winrate: Estimate | None
    rival: str | None
    margin: Estimate | None

    @property
    def beats_base(self) -> bool:
        return self.gain is not None and self.gain.low > 0

    @property
    def beats_rival(self) -> bool:
        return self.margin is None or self.margin.low > 0

    @property
    def clear(self) -> bool:
        """Whether the best model is clear of everything else."""
        return self.best == BASE or ((self.gain is None or self.beats_base) and self.beats_rival)

    @property
    def headline(self) -> str:
        if self.best == BASE:
            return "No method improves on the base model"
        if self.gain is not None and not self.beats_base:
            return "No method is clearly better than the base model"
        if not self.beats_rival:
            return f"{self.best} leads, but not clearly over {self.rival}"
        return f"{self.best} wins"


def findings(runs: Runs) -> list[Finding]:
    """One finding a setting; the page opens with the first (first prompt set, highest guidance)."""
    sets = list(dict.fromkeys(name for name, _ in runs.groups))
    order = sorted(runs.groups, key=lambda group: (sets.index(group[0]), -group[1]))
    return [_finding(runs, group) for group in order]


def headline(found: list[Finding]) -> str:
    """What the page opens with: one winner, or, where the guidance scales of the first prompt set name different
    models, each of them."""
    same = [finding for finding in found if finding.group[0] == found[0].group[0]]
    if len({finding.best for finding in same}) == 1:
        return found[0].headline
    verb = "wins" if all(finding.clear for finding in same) else "leads"
    named = ["no method" if finding.best == BASE else finding.best for finding in same]
    named[0] = f"{named[0].replace('no', 'No') if same[0].best == BASE else named[0]} {verb}"
    return ", ".join(f"{name} at guidance {finding.group[1]:g}" for name, finding in zip(named, same, strict=True))


def _finding(runs: Runs, group: tuple[str, float]) -> Finding:
    scores, lead, protocol = group_scores(runs, group), lead_metric(runs), default_protocol(runs)
    plain = stats.compare(scores, lead, "mean", None, protocol).set_index("model")
    best = str(plain["value"].idxmax())
    method = runs.models[best][0]
    rivals = [model for model in plain.index if runs.models[model][0] not in (method, BASE)]
    rival = str(plain.loc[rivals, "value"].idxmax()) if rivals else None
    gain = winrate = None
    if BASE in plain.index and best != BASE:
        gain = _row(stats.compare(scores, lead, "mean", BASE, protocol), best)
        winrate = _row(stats.compare(scores, lead, "winrate", BASE, protocol), best)
    margin = _row(stats.compare(scores, lead, "mean", rival, protocol), best) if rival else None
    return Finding(
        group, best, _row(plain.reset_index(), best), gain, winrate, rival if margin else None, margin
    )


def _row(rows: pd.DataFrame, model: str) -> Estimate | None:
    found = rows[rows["model"] == model]
    return Estimate(*found[["value", "low", "high"]].iloc[0]) if len(found) else None
