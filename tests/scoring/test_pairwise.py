"""Agreement as each set's authors count it: by hand, against their own code's numbers, and its intervals simulated."""

from __future__ import annotations

import numpy as np
import pytest

from bench.reports.uncertainty import estimates
from bench.scoring import pairwise
from bench.scoring.pairwise import PROBABILITIES, Counts, accuracy, decided, inversions, strict, with_ties


def test_a_pair_with_ties_by_hand() -> None:
    first, second, tie = (0, 1), (1, 0), (0.5, 0.5)
    scores = (21.0, 20.5)
    expected = {
        (first, 0.0): 1,
        (second, 0.0): 0,
        (tie, 0.0): 0.5,
        (first, 0.5): 0.5,
        (second, 0.6): 0.5,
        (tie, 0.6): 1,
    }
    assert {key: with_ties(key[0], scores, key[1]).points for key in expected} == expected
    assert with_ties(first, (3.0, 3.0), 0.0) == (0.5, 1)  # an equal score is a tie under any threshold


def test_a_ranking_by_hand() -> None:
    ranks, scores = (1, 2, 2, 4), (0.9, 0.1, 0.5, 0.6)
    # pairs: 01 right, 02 right, 03 right, 12 tied by people, 13 inverted, 23 inverted
    assert inversions(ranks, scores) == Counts(pytest.approx(1 - 2 / 6), 1)
    assert strict(ranks, scores) == (3, 5) and decided(ranks, scores) == (3, 5)
    equal = (0.9, 0.1, 0.5, 0.1)  # 13 equal: half an inversion, wrong, and half right
    assert inversions(ranks, equal) == Counts(pytest.approx(1 - 0.5 / 6), 1)
    assert strict(ranks, equal) == (4, 5) and decided(ranks, equal) == (4.5, 5)
    assert strict((1, 1), (0.2, 0.3)) == (0, 0)


def rankings() -> list[tuple[list[int], list[float]]]:
    rng = np.random.default_rng(5)
    found = []
    for _ in range(60):
        size = int(rng.integers(2, 8))
        ranks = rng.integers(1, 6, size).tolist()
        scores = (rng.normal(size=size) - 0.3 * np.array(ranks)).tolist()
        if len(set(ranks)) > 1:
            found.append((ranks, scores))
    return found


def test_rankings_are_counted_as_the_authors_code_counts() -> None:
    """HPSv2's inversion_score (hpsv2/src/training/train.py at 866735ec) and ImageReward's acc (test.py at c1392c6d)."""
    one_a_prompt = [str(index) for index in range(59)]
    ours = {
        name: accuracy([count(*ranking) for ranking in rankings()], one_a_prompt).value[0]
        for name, count in (("hpdv2", inversions), ("imagereward", strict))
    }
    assert ours == pytest.approx({"hpdv2": 0.6921711057304277, "imagereward": 0.6289592760180995}, abs=1e-12)


def pairs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(6)
    labels = rng.choice([1, 0, 0.5], 300, p=[0.42, 0.42, 0.16])
    scores = rng.normal(21, 1, (300, 2))
    scores[:, 0] += 1.2 * (labels - 0.5)
    return labels, scores


def test_thresholds_are_those_of_pickscores_evaluation() -> None:
    """calc_acc of trainer/scripts/eval_preference_predictor.py at 11584a54, threshold by threshold, and its best."""
    labels, scores = pairs()
    theirs = [0.67166667, 0.69833333, 0.68166667, 0.68666667, 0.67166667, 0.65333333]
    theirs += [0.66333333, 0.64666667, 0.64, 0.61, 0.59166667]
    with np.errstate(divide="ignore"):
        thresholds = 2 * np.arctanh(PROBABILITIES)
    ranks = [(1 - label, label) for label in labels]
    ours = [
        np.mean([with_ties(rank, score, limit).points for rank, score in zip(ranks, scores, strict=True)])
        for limit in thresholds
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-8)
    signs, differences = 2 * labels - 1, scores[:, 0] - scores[:, 1]
    assert pairwise.tuned_threshold(signs, differences, logits=True) == pytest.approx(2 * np.arctanh(0.1))


def test_without_logits_the_best_of_all_differences_is_found() -> None:
    labels, scores = pairs()
    signs, differences = 2 * labels - 1, (scores[:, 0] - scores[:, 1]) / 1000  # the scale does not matter

    def reached(limit: float) -> float:
        calls = np.where(abs(differences) <= limit, 0, np.sign(differences))
        return (1 - abs(signs - calls) / 2).mean()

    found = pairwise.tuned_threshold(signs, differences, logits=False)
    tried = np.unique(np.append(abs(differences), 0))
    best = [limit for limit in tried if reached(limit) == pytest.approx(max(map(reached, tried)), abs=1e-12)]
    assert found == pytest.approx(best[0], abs=1e-12) and reached(found) > reached(0) + 0.01


def test_nothing_is_called_a_tie_where_people_call_none() -> None:
    signs, differences = np.array([1, -1, 1, 1]), np.array([0.2, -0.1, 0.4, 0.3])
    assert pairwise.tuned_threshold(signs, differences, logits=False) == 0
    assert pairwise.tuned_threshold(signs, differences, logits=True) == 0


def test_one_pair_a_prompt_is_the_ordinary_rate() -> None:
    wins = np.random.default_rng(0).random(40) < 0.7
    found = accuracy([Counts(float(win), 1) for win in wins], [f"p{k}" for k in range(40)])
    expected = estimates(wins[None, None, :].astype(float), "winrate")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_copies_of_a_prompt_add_nothing() -> None:
    """Ten times the same judgements of the same prompts have the same interval; ten times the pairs would shrink it."""
    wins = np.random.default_rng(1).random(40) < 0.7
    prompts = [f"p{k}" for k in range(40)]
    once = accuracy([Counts(float(win), 1) for win in wins], prompts)
    often = accuracy([Counts(float(win), 1) for win in wins] * 10, prompts * 10)
    np.testing.assert_allclose([once.low, once.high], [often.low, often.high])


def test_intervals_cover_where_pairs_of_a_prompt_hang_together() -> None:
    """Prompts of 1 to 12 pairs, easy or hard as a whole: 95 % intervals cover, those over single pairs do not."""
    rng, covered, naive, repeats = np.random.default_rng(2), 0, 0, 400
    sizes = rng.integers(1, 13, 80)
    truth = 0.7
    for _ in range(repeats):
        chance = rng.beta(1.4, 0.6, 80)  # mean 0.7
        points = rng.binomial(sizes, chance)
        found = accuracy([Counts(*one) for one in zip(points, sizes, strict=True)], [str(k) for k in range(80)])
        covered += found.low[0] <= truth <= found.high[0]
        share, error = points.sum() / sizes.sum(), np.sqrt(truth * (1 - truth) / sizes.sum())
        naive += abs(share - truth) <= 1.96 * error
    assert 0.92 <= covered / repeats <= 0.98
    assert naive / repeats < 0.8


def test_prompts_without_a_decided_pair_say_nothing() -> None:
    counts = [Counts(1, 1), Counts(0, 1), Counts(0, 0), Counts(1, 1)]
    with_it, without = accuracy(counts, list("abcd")), accuracy([counts[0], counts[1], counts[3]], list("abd"))
    np.testing.assert_allclose(np.array(with_it), np.array(without))
    assert np.isnan(accuracy([Counts(0, 0)], ["a"]).value[0])
