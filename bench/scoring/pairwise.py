"""How often a scorer agrees with people, counted as each preference set's authors count, with clustered intervals.

pickapic     the scorer calls a tie where two scores differ by at most a threshold; a pair gives 1 where the call is the
             label, 1/2 where one of the two is a tie and the other not, 0 else; mean over pairs. The threshold is the
             best on other pairs (PickScore, trainer/scripts/eval_preference_predictor.py).
hpdv2        of each ranking 1 - the share of its pairs that the scorer orders the other way; pairs that people ranked
             equal count as agreement; mean over rankings (HPSv2, inversion_score in training/train.py).
imagereward  pairs that people ranked differently, of all rankings together: the share that the scorer orders the same
             way; equal scores are wrong (ImageReward, acc in test.py).
world        pairs, none of them tied: the share ordered as the person did.

Beside it, for every set alike, `decided`: pairs that people ranked differently, no threshold, an equal score 1/2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from bench.reports.uncertainty import Estimates, estimates

PROBABILITIES = np.arange(11) / 10
"""PickScore's thresholds, of the difference of the two softmax probabilities; an equal one of logits is 2 artanh."""


class Counts(NamedTuple):
    """Points and what they are out of, of one judgement: pairs, or the ranking itself."""

    points: float
    out_of: float


class Protocol(NamedTuple):
    count: Callable[[Sequence[float], Sequence[float], float], Counts]
    said: str
    tuned: bool = False


def _pairs(ranks: Sequence[float], scores: Sequence[float], threshold: float = 0.0) -> list[tuple[int, int]]:
    """Of every two pictures what people say and what the scorer says: 1 the first is better, -1 the second, 0 a tie."""
    said = []
    for i, j in combinations(range(len(ranks)), 2):
        difference = scores[i] - scores[j]
        said.append(
            (int(np.sign(ranks[j] - ranks[i])), 0 if abs(difference) <= threshold else int(np.sign(difference)))
        )
    return said


def with_ties(ranks: Sequence[float], scores: Sequence[float], threshold: float) -> Counts:
    """Pick-a-Pic's: 1 - |label - call| / 2 a pair."""
    pairs = _pairs(ranks, scores, threshold)
    return Counts(sum(1 - abs(label - call) / 2 for label, call in pairs), len(pairs))


def inversions(ranks: Sequence[float], scores: Sequence[float], threshold: float = 0.0) -> Counts:
    """HPDv2's, of one ranking. An equal score of what people order is half an inversion (theirs breaks it anyhow)."""
    pairs = _pairs(ranks, scores)
    return Counts(1 - sum(abs(label - call) / 2 for label, call in pairs if label) / len(pairs), 1)


def strict(ranks: Sequence[float], scores: Sequence[float], threshold: float = 0.0) -> Counts:
    """ImageReward's."""
    decided = [(label, call) for label, call in _pairs(ranks, scores) if label]
    return Counts(sum(label == call for label, call in decided), len(decided))


def decided(ranks: Sequence[float], scores: Sequence[float], threshold: float = 0.0) -> Counts:
    """Pairs that people decided; an equal score is worth 1/2."""
    pairs = [(label, call) for label, call in _pairs(ranks, scores) if label]
    return Counts(sum(1 - abs(label - call) / 2 for label, call in pairs), len(pairs))


PROTOCOLS = {
    "pickapic": Protocol(
        with_ties, "a tie called where scores differ by no more than a threshold; a tie on one side 1/2", True
    ),
    "hpdv2": Protocol(
        inversions, "mean over rankings of 1 - share of inverted pairs; pairs ranked equal count as agreement"
    ),
    "imagereward": Protocol(strict, "pairs ranked differently, all rankings together; equal scores wrong"),
    "world": Protocol(decided, "pairs, ordered as the person did; equal scores 1/2"),
}


def accuracy(counts: Sequence[Counts], prompts: Sequence[str]) -> Estimates:
    """Points over what they are out of, with a 95 % interval over prompts, whose judgements are drawn together.

    A ratio of sums over C prompts, linearised: prompt c stands for p + C (points_c - p out_of_c) / out_of, values whose
    mean is p and whose standard error is the ratio's; to them the one model of uncertainty applies (Wilson's interval).
    """
    _, place = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    points, out_of = (np.bincount(place, [one[field] for one in counts]) for field in range(2))
    there = out_of > 0  # a prompt without a decided pair says nothing
    points, out_of = points[there], out_of[there]
    if not len(points):
        return Estimates(*np.full((5, 1), np.nan))
    share = points.sum() / out_of.sum()
    values = share + len(points) * (points - share * out_of) / out_of.sum()
    return estimates(values[None, None, :], "winrate")


def tuned_threshold(labels: np.ndarray, differences: np.ndarray, logits: bool) -> float:
    """The difference of scores up to which calling a tie agrees best with people; of equally good ones the smallest.

    labels [N]: 1 the first is better, -1 the second, 0 a tie; differences [N]: of the scores, first less second.
    logits: try PickScore's eleven thresholds, which are of probabilities; else, where scores have no such scale, every
    difference there is, and none.
    """
    size = np.abs(differences)
    with np.errstate(divide="ignore"):
        tried = 2 * np.arctanh(PROBABILITIES) if logits else np.unique(np.append(size, 0))
    order = np.argsort(size, kind="stable")
    called = (1 - np.abs(labels - np.sign(differences)) / 2)[order]
    tied = (1 - np.abs(labels) / 2)[order]
    gain = np.append(0, np.cumsum(tied - called))
    return float(tried[np.argmax(gain[np.searchsorted(size[order], tried, "right")])])
