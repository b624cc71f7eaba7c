"""Which models are told apart: pairs by hand, and on simulated models that are equal or not."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from bench.reports import stats
from bench.reports.apart import CHECKPOINTS, METHODS, Apart, told_apart
from bench.reports.columns import of_before
from bench.reports.significance import holm


def scores(values: np.ndarray, metric: str = "judge/utility") -> stats.Scores:
    """values [models, training seeds, prompts], the first model untrained."""
    names = ("base", *(f"m{i}" for i in range(1, len(values))))
    _, seeds, prompts = values.shape
    return stats.Scores(
        names,
        tuple(range(seeds)),
        tuple(map(str, range(prompts))),
        (0,),
        (of_before(metric),),
        frozenset({"base"}),
        values[:, :, :, None, None],
    )


def simulated(rng: np.random.Generator, gains: tuple[float, ...], prompts: int = 60) -> stats.Scores:
    """Equal spread between prompts, shared, and noise of each model's own; one training seed."""
    shared = rng.standard_normal(prompts)
    return scores(np.array([[shared + gain + rng.standard_normal(prompts)] for gain in (0.0, *gains)]))


def given(better: list[tuple[str, str]], models: tuple[str, ...]) -> Apart:
    """An `Apart` in which exactly these (better, worse) pairs are told apart."""
    rows = [
        (a, b, 0.0, 0.0, 0.0, 1, 1.0, 1.0, a if (a, b) in better else b if (b, a) in better else "")
        for b, a in combinations(models, 2)
    ]
    columns = ["first", "second", "value", "low", "high", "n_seeds", "p", "p_holm", "better"]
    return Apart(models, pd.DataFrame(rows, columns=columns), 1, 1.0)


def test_who_is_ahead_and_who_is_alike_by_hand() -> None:
    """a beats c and d, b and c beat d; nothing else is told apart."""
    apart = given([("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")], ("a", "b", "c", "d"))
    assert apart.beats == {"a": {"c", "d"}, "b": {"d"}, "c": {"d"}, "d": set()}
    assert apart.ahead == ["a", "b"]
    assert apart.alike(["a", "b", "c", "d"]) == [["a", "b"], ["b", "c"]]
    assert given([], ("a", "b")).ahead == [] and given([], ("a", "b")).alike(["b", "a"]) == [["b", "a"]]
    assert given([("b", "a")], ("a", "b")).alike(["b", "a"]) == []


def test_every_pair_is_corrected_over_all_pairs_of_all_scales() -> None:
    rng = np.random.default_rng(0)
    settings = [simulated(rng, (0.3, 0.5)), simulated(rng, (0.0, 0.6))]
    found = told_apart(settings, "judge/utility", "mean", "one")
    pairs = pd.concat([one.pairs for one in found])
    assert list(zip(pairs["first"], pairs["second"], strict=True)) == [("m1", "base"), ("m2", "base"), ("m2", "m1")] * 2
    np.testing.assert_allclose(pairs["p_holm"], holm(pairs["p"]))
    expected = [row.first if row.value > 0 else row.second for row in pairs.itertuples()]
    assert list(pairs["better"]) == list(np.where(pairs["p_holm"] < 0.05, expected, ""))
    difference = settings[1].values[2, 0, :, 0, 0] - settings[1].values[0, 0, :, 0, 0]
    assert found[1].pairs.loc[1, "value"] == pytest.approx(difference.mean()) and "m2" in found[1].ahead


@pytest.mark.parametrize("stat", stats.STATS)
def test_less_of_a_defect_is_better(stat: str) -> None:
    values = simulated(np.random.default_rng(1), (1.0,)).values[..., 0, 0]
    for metric, ahead in (("judge/utility", ["m1"]), ("judge/fade", ["base"])):
        (found,) = told_apart([scores(values, metric)], metric, stat, "one")
        assert found.ahead == ahead


@pytest.mark.parametrize("stat", stats.STATS)
def test_a_rounding_error_is_no_difference_however_sure(stat: str) -> None:
    """Every prompt better by some thousandths of the spread between prompts; ten times that is one."""
    rng = np.random.default_rng(2)
    prompts = rng.standard_normal(200)
    for size, ahead in ((0.003, []), (0.03, ["m1"])):
        values = np.array([[prompts], [prompts + size * (1 + 0.1 * rng.standard_normal(200))]])
        (found,) = told_apart([scores(values)], "judge/utility", stat, "one")
        assert found.pairs["p_holm"].item() < 1e-6 and found.ahead == ahead
        assert found.spread == pytest.approx(prompts.std(), rel=0.01)


def test_what_several_seeds_speak_of() -> None:
    """Of methods only where every pair shares two seeds: one that was trained once makes it checkpoints."""
    values = np.random.default_rng(3).standard_normal((3, 2, 20))
    values[0, 1] = values[0, 0]
    assert told_apart([scores(values)], "judge/utility", "mean", "one")[0].speaks_of == METHODS
    values[2, 1] = np.nan
    assert told_apart([scores(values)], "judge/utility", "mean", "one")[0].speaks_of == CHECKPOINTS
    assert told_apart([scores(values[:, :1])], "judge/utility", "mean", "one")[0].speaks_of == CHECKPOINTS


def test_a_metric_that_one_setting_lacks_is_told_apart_in_the_other() -> None:
    values = simulated(np.random.default_rng(4), (1.0,)).values[..., 0, 0]
    other, own = told_apart([scores(values, "clip"), scores(values)], "judge/utility", "mean", "one")
    assert other.ahead == [] and other.models == () and own.ahead == ["m1"]


def test_of_equal_models_none_is_told_apart_and_of_unequal_ones_some_are() -> None:
    """100 pages of four equal models at two guidance scales: 95 % say so, and uncorrected intervals far fewer."""
    rng = np.random.default_rng(5)
    clear = flat = found = 0
    for _ in range(100):
        tested = told_apart([simulated(rng, (0.0, 0.0, 0.0)) for _ in range(2)], "judge/utility", "mean", "one")
        clear += any(one.ahead for one in tested)
        flat += any(((one.pairs["low"] > 0) | (one.pairs["high"] < 0)).any() for one in tested)
    for _ in range(20):
        tested = told_apart([simulated(rng, (0.0, 0.0, 1.0))], "judge/utility", "mean", "one")
        found += tested[0].ahead == ["m3"]
    assert clear <= 9 and flat >= 25 and found >= 18
