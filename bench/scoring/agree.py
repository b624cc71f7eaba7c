"""Scorers against people: how often each one prefers the picture that people prefer, beside what was published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.data.parquet import Shards
from bench.data.preferences import Choices, Preferences
from bench.errors import BenchError, UsageError
from bench.reports import layouts
from bench.runtime.progress import track
from bench.scoring import pairwise
from bench.scoring.evaluate import Scorers
from bench.scoring.named import beyond_their_world, is_mini, named

FILE = Path(__file__).with_name("published_accuracy.csv")
CHUNK = 64  # judgements whose pictures are in memory at a time
LOGITS = ("pickscore",)  # columns for which the probabilities of PickScore's thresholds are defined
TRUTH, PEOPLE = "exact utility", "people"


@dataclass(frozen=True)
class Scored:
    """Judgements whose pictures could be read, by row of the set; their scores by column, the higher the better."""

    preferences: Preferences
    rows: list[int]
    scores: dict[str, list[list[float]]]
    left_out: Counter[str]

    @property
    def ranks(self) -> list[tuple[float, ...]]:
        return [self.preferences.judgements[row].ranks for row in self.rows]

    @property
    def prompts(self) -> list[str]:
        return [self.preferences.judgements[row].prompt for row in self.rows]


@dataclass(frozen=True)
class Agreement:
    """table: one row a column of a scorer, shares in [0, 1] with 95 % intervals. notes: what a reader has to know.

    metrics: what the scorers say of themselves; warning: one line, or "".
    """

    table: pd.DataFrame
    notes: list[str]
    metrics: dict[str, dict[str, Any]]
    warning: str


@lru_cache
def published() -> pd.DataFrame:
    """schema, metric (a scorer's or "people"), accuracy in per cent as printed, protocol, source."""
    return pd.read_csv(FILE, dtype=str, keep_default_na=False)


def score(preferences: Preferences, scorers: Scorers) -> Scored:
    """Score every picture of a set against its prompt; a judgement with one that cannot be read is left out."""
    rows: list[int] = []
    left_out = Counter(preferences.left_out)
    scores: dict[str, list[list[float]]] = {column.name: [] for column in scorers.columns}
    starts = range(0, len(preferences.judgements), CHUNK)
    for start in track(starts, f"scoring {preferences.spec}", total=len(starts), unit="chunk"):
        chunk = list(range(start, min(start + CHUNK, len(preferences.judgements))))
        read = dict(zip(chunk, preferences.pictures(chunk), strict=True))
        left_out.update(found for found in read.values() if isinstance(found, str))
        whole = {row: found for row, found in read.items() if not isinstance(found, str)}
        prompts = [preferences.judgements[row].prompt for row, found in whole.items() for _ in found]
        values = scorers.score([picture for found in whole.values() for picture in found], prompts)
        ends = np.cumsum([len(found) for found in whole.values()], dtype=int)
        for column in scorers.columns:
            ours = column.sign * values[column.name].astype(np.float64)
            scores[column.name] += [part.tolist() for part in np.split(ours, ends)[:-1]]
        rows += whole
    if not rows:
        raise BenchError(f"{preferences.spec}: no judgement can be scored; left out: {_counted(left_out)}")
    return Scored(preferences, rows, scores, left_out)


def tuning_split(preferences: Preferences) -> str | None:
    """The validation split beside a test split of Pick-a-Pic, on which its tie threshold was tuned; None if none."""
    if not isinstance(preferences, Choices) or not preferences.shards.split.startswith("test"):
        return None
    source, split = preferences.shards.source, preferences.shards.split.replace("test", "validation", 1)
    try:
        return f"pickapic:{source}#{split}" if Shards(source, split).paths != preferences.shards.paths else None
    except BenchError:
        return None


def agreement(preferences: Preferences, scorers: Scorers, tuning: Preferences | None = None) -> Agreement:
    """Accuracies of all scorers' columns, as the set's authors count. tuning: pairs to tune a tie threshold on."""
    protocol = pairwise.PROTOCOLS[preferences.schema]
    if tuning and not (protocol.tuned and tuning.schema == preferences.schema):
        raise UsageError(f"--tune: {preferences.spec} has no tie threshold that {tuning.spec} could tune")
    scored = score(preferences, scorers)
    tuned = score(tuning, scorers) if tuning else None
    infos = scorers.protocol()
    rows = []
    for metric, info in infos.items():
        for column in scorers.metrics[metric].table_columns():
            threshold = _threshold(tuned, column.name) if tuned else 0.0
            known = {} if is_mini(info) else _published(preferences.schema, column.name)
            rows.append(
                {"metric": column.name, "title": named(column.title, info)}
                | _row(scored, scored.scores[column.name], threshold)
                | {"threshold": threshold if tuned else np.nan, **known}
            )
    truth = [preferences.truth(row) for row in scored.rows]
    if all(truth):
        rows.append({"metric": TRUTH, "title": TRUTH} | _row(scored, truth, 0.0))
    columns = ["published", "published_protocol", "published_source"]
    table = pd.DataFrame(rows).assign(dataset=preferences.spec, schema=preferences.schema)
    table = table.reindex(columns=[*dict.fromkeys([*table.columns, *columns])])
    return Agreement(table, _notes(scored, tuned, table), infos, beyond_their_world(scored.prompts, infos))


def _row(scored: Scored, scores: Sequence[Sequence[float]], threshold: float) -> dict[str, Any]:
    """Accuracy by the set's own protocol, and over decided pairs."""
    found: dict[str, Any] = {}
    own = pairwise.PROTOCOLS[scored.preferences.schema].count
    for name, count in (("accuracy", own), ("decided", pairwise.decided)):
        counts = [count(ranks, one, threshold) for ranks, one in zip(scored.ranks, scores, strict=True)]
        estimate = pairwise.accuracy(counts, scored.prompts)
        found |= {name: estimate.value[0], f"{name}_low": estimate.low[0], f"{name}_high": estimate.high[0]}
    pairs = [len(ranks) * (len(ranks) - 1) // 2 for ranks in scored.ranks]
    return found | {
        "judgements": len(pairs),
        "pairs": sum(pairs),
        "decided_pairs": int(sum(one.out_of for one in counts)),
        "prompts": len(set(scored.prompts)),
    }


def _threshold(tuned: Scored, column: str) -> float:
    ranks, scores = np.array(tuned.ranks), np.array(tuned.scores[column])
    return pairwise.tuned_threshold(
        np.sign(ranks[:, 1] - ranks[:, 0]), scores[:, 0] - scores[:, 1], logits=column in LOGITS
    )


def _published(schema: str, metric: str) -> dict[str, Any]:
    rows = published().query("schema == @schema and metric == @metric")
    return {
        name: value
        for row in rows.itertuples()
        for name, value in (
            ("published", float(row.accuracy)),
            ("published_protocol", row.protocol),
            ("published_source", row.source),
        )
    }


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in left_out.most_common()) or "nothing"


def _notes(scored: Scored, tuned: Scored | None, table: pd.DataFrame) -> list[str]:
    preferences, first = scored.preferences, table.iloc[0]
    protocol = pairwise.PROTOCOLS[preferences.schema]
    notes = [
        f"{preferences.spec}: {first['judgements']} judgements of {first['prompts']} prompts, {first['pairs']} pairs, "
        f"{first['decided_pairs']} of them decided; left out: {_counted(scored.left_out)}.",
        f"Accuracy: {protocol.said}. Decided: pairs that people ranked differently, equal scores 1/2. In brackets 95 % "
        "intervals over prompts, whose judgements are drawn together; they do not compare one scorer with another.",
    ]
    if protocol.tuned and tuned:
        notes.append(f"Tie thresholds were tuned on {tuned.preferences.spec} ({len(tuned.rows)} pairs).")
    elif protocol.tuned:
        notes.append("No tie was called: there are no other pairs to tune a threshold on; name some with --tune.")
    if (table["metric"] == TRUTH).any():
        notes.append(f"{TRUTH}: what these people choose by; it errs where their noise decided, as any scorer must.")
    people = _published(preferences.schema, PEOPLE)
    if people:
        notes.append(
            f"People: {people['published']:g} % ({people['published_protocol']}; {people['published_source']})."
        )
    cited = table.dropna(subset="published")
    for source, rows in cited.groupby("published_source", sort=False):
        protocols = "; ".join(dict.fromkeys(rows["published_protocol"]))
        notes.append(f"Published {', '.join(rows['metric'])}: {source} ({protocols}).")
    return notes


# --- output ---


def render(found: Agreement, layout: str) -> str:
    """As text, csv (tidy rows) or json (rows, notes, and what the scorers say of themselves)."""
    if layout == "csv":
        return found.table.to_csv(index=False, lineterminator="\n", float_format="%.8g").rstrip("\n")
    if layout == "json":
        rows = found.table.astype(object).where(found.table.notna(), None).to_dict("records")
        return json.dumps({"rows": rows, "notes": found.notes, "metrics": found.metrics}, indent=1, allow_nan=False)
    header = ["scorer", "accuracy, %", "decided, %", "tie threshold", "published, %"]
    body = [
        [
            row.title,
            *(_estimate(getattr(row, n), getattr(row, f"{n}_low"), getattr(row, f"{n}_high")) for n in SHARES),
            "-" if np.isnan(row.threshold) else f"{row.threshold:.3g}",
            "-" if np.isnan(row.published) else f"{row.published:.1f}",
        ]
        for row in found.table.itertuples()
    ]
    return "\n".join([*layouts.wrapped(header, body), *found.notes])


SHARES = ("accuracy", "decided")


def _estimate(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{layouts.number(100 * value, 1)} {layouts.interval(100 * low, 100 * high, 1)}"
