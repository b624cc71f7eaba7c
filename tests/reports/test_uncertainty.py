"""The model of uncertainty: by hand, against scipy where there is one seed, and where there is nothing to estimate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from bench.reports import stats
from bench.reports.uncertainty import _Error, _pseudo_values, estimates

RNG = np.random.default_rng(11)


def series(seeds: int, prompts: int, n: int = 200) -> np.ndarray:
    """Differences whose seeds and prompts both vary, many of them near the edge of p = .05."""
    shared, own = RNG.standard_normal((n, 1, prompts)), RNG.standard_normal((n, seeds, prompts))
    return 0.2 * RNG.standard_normal((n, seeds, 1)) + shared + own + RNG.uniform(-1, 1, (n, 1, 1))


def test_three_seeds_and_two_prompts_by_hand() -> None:
    """Means of seeds 2, 5, 5 and of prompts 2, 6; residuals +-1, 0, -+1.

    B = 3 / 3, V = 8 / 2, R = (4 / 2) / 6, variance B + V - R = 14/3, of which 3/14 lie between seeds (2 degrees of
    freedom; 1 between prompts).
    """
    found = estimates(np.array([[[1.0, 3], [3, 7], [2, 8]]]))
    distance, share = 4 / math.sqrt(14 / 3), 3 / 14
    p = share * (1 - distance / math.sqrt(2 + distance**2)) + (1 - share) * (1 - 2 / math.pi * math.atan(distance))
    assert found.value[0] == 4 and found.p[0] == pytest.approx(p)
    half = (found.high[0] - found.low[0]) / 2
    at_edge = half / math.sqrt(14 / 3)  # what lies half an interval away has p = .05
    assert share * 2 * reference.t.sf(at_edge, 2) + (1 - share) * 2 * reference.t.sf(at_edge, 1) == pytest.approx(0.05)


def test_two_seeds_by_hand() -> None:
    """Means of seeds 2, 5 and of prompts 2, 4, 4.5; residuals +-.5, -+.5, 0.

    B = 4.5 / 2, V = 1.75 / 3, R = (1 / 2) / 6. Of the variance B + V - R = 2.75 all counts as between seeds: one
    degree of freedom.
    """
    found = estimates(np.array([[[1.0, 2, 3], [3, 6, 6]]]))
    assert found.p[0] == pytest.approx(1 - 2 / math.pi * math.atan(3.5 / math.sqrt(2.75)))
    assert found.high[0] - found.value[0] == pytest.approx(reference.t.ppf(0.975, 1) * math.sqrt(2.75))


def test_seeds_that_differ_by_more_than_prompts_allow_have_the_t_interval_over_their_means() -> None:
    data = np.array([-3.0, 1.0, 4.0])[None, :, None] + 1e-6 * RNG.standard_normal((1, 3, 80))
    found = estimates(data)
    low, high = reference.t.interval(0.95, 2, data.mean(), reference.sem(data.mean(axis=2)[0]))
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), rel=1e-5)
    assert found.p[0] == pytest.approx(reference.ttest_1samp(data.mean(axis=2)[0], 0).pvalue, rel=1e-5)


def test_one_seed_has_the_t_interval_over_prompts() -> None:
    data = RNG.standard_normal((5, 1, 40)) + 0.3
    test = reference.ttest_1samp(data[:, 0], 0, axis=1)
    found = estimates(data)
    np.testing.assert_allclose(found.p, test.pvalue)
    np.testing.assert_allclose([found.low, found.high], test.confidence_interval(0.95))
    errors = found.detectable / (data.std(axis=2, ddof=1)[:, 0] / 40**0.5)
    power = reference.nct.sf(reference.t.ppf(0.975, 39), 39, errors)
    assert (power > 0.802).all() and (power < 0.81).all()  # above .8 by c4: the standard error is low on average


def test_one_seed_is_no_more_sure_than_its_equal_copies() -> None:
    """What repeats the same scores is one sample: seeds that do not differ add nothing."""
    data = RNG.standard_normal((1, 1, 40))
    once, thrice = estimates(data), estimates(np.repeat(data, 3, axis=1))
    np.testing.assert_allclose(thrice, once, rtol=1e-9)


@pytest.mark.parametrize(("prompts", "close"), [(9, 0.03), (10, 0.1), (301, 0.03)])
def test_medians_have_the_standard_error_of_the_bootstrap(prompts: int, close: float) -> None:
    """That of 20,000 resamples; of an even number, whose two middle values the bootstrap averages, nearly so."""
    data = RNG.exponential(size=(1, 1, prompts))
    found = estimates(data, "median")
    assert found.value[0] == pytest.approx(np.median(data))
    error = (found.high[0] - found.low[0]) / 2 / reference.t.ppf(0.975, prompts - 1)
    resampled = np.median(RNG.choice(data[0, 0], (20000, prompts)), axis=1)
    assert error == pytest.approx(resampled.std(), rel=close)


def test_standard_error_of_a_median_by_hand() -> None:
    """A resample of 0, 1, 5 has the median 1 with probability 13 / 27, either other one with 7 / 27."""
    found = estimates(np.array([[[0.0, 1, 5]]]), "median")
    mean = (13 + 7 * 5) / 27
    error = math.sqrt((13 + 7 * 25) / 27 - mean**2)
    assert (found.value[0], found.high[0]) == pytest.approx((1, 1 + error * reference.t.ppf(0.975, 2)))


def test_pseudo_values_have_the_median_as_mean_among_ties_and_far_from_zero() -> None:
    tied = np.array([[[0.0, 0, 0, 1, 2], [0, 0, 0, -1, -2]]])
    np.testing.assert_allclose(_pseudo_values(tied).mean(axis=2), 0, atol=1e-15)
    data = series(2, 30, 20)
    near, far = estimates(data, "median"), estimates(data + 1e9, "median")
    np.testing.assert_allclose(far.high - far.low, near.high - near.low, rtol=1e-5)


def test_prompts_shared_by_seeds_count_once_in_medians_too() -> None:
    """Seeds that rank all prompts alike: ten of them know their median no better than one."""
    data = RNG.standard_normal((50, 1, 60))
    one, ten = estimates(data, "median"), estimates(data + np.zeros((1, 10, 1)), "median")
    np.testing.assert_allclose(ten.high - ten.low, one.high - one.low)
    own = estimates(RNG.standard_normal((50, 10, 60)), "median")
    assert np.mean(own.high - own.low) < 0.5 * np.mean(one.high - one.low)


def test_win_rates_by_hand() -> None:
    """Five wins of five: as of four prompts, low = 4 / (4 + t^2), t = 2.7764; p of one half at 2 standard errors."""
    found = estimates(np.ones((1, 1, 5)), "winrate")
    assert (found.value[0], found.low[0], found.high[0]) == pytest.approx((1, 4 / (4 + 2.7764451**2), 1))
    assert found.p[0] == pytest.approx(2 * reference.t.sf(2, 4))
    assert np.isnan(found.detectable[0])  # four prompts cannot tell any rate from one half with 80 % power
    wilson = reference.binomtest(330, 600).proportion_ci(method="wilson")
    many = estimates((np.arange(600) < 330).astype(float)[None, None], "winrate")
    assert (many.low[0], many.high[0]) == pytest.approx((wilson.low, wilson.high), abs=2e-4)


def test_ties_make_win_rates_surer_and_few_decided_prompts_do_not() -> None:
    tied = np.r_[np.full(45, 0.5), np.ones(5)][None, None]
    decided = np.r_[np.zeros(20), np.full(5, 0.5), np.ones(25)][None, None]
    found, other = estimates(tied, "winrate"), estimates(decided, "winrate")
    assert found.value[0] == other.value[0] == 0.55
    assert found.p[0] < 0.05 < other.p[0]
    assert estimates(np.r_[np.full(49, 0.5), np.ones(1)][None, None], "winrate").p[0] > 0.3


@pytest.mark.parametrize(("seeds", "prompts"), [(2, 500), (2, 3), (3, 50), (10, 4)])
def test_quantiles_are_exact_whatever_lies_between_seeds(seeds: int, prompts: int) -> None:
    share = np.r_[0, np.geomspace(1e-6, 1, 60)]
    error = _Error(np.ones(61), share, seeds, prompts)
    np.testing.assert_allclose(error.p(error.quantile), 0.05, rtol=1e-12)


@pytest.mark.parametrize("seeds", [1, 2, 3, 10])
@pytest.mark.parametrize("stat", stats.STATS)
def test_p_is_below_5_percent_exactly_where_the_interval_excludes_nothing(stat: str, seeds: int) -> None:
    data = series(seeds, 40, 400)
    data, null = (stats.wins(data, 0.0), 0.5) if stat == "winrate" else (data, 0.0)
    found = estimates(data, stat)
    excluded = (found.low > null) | (found.high < null)
    np.testing.assert_array_equal(found.p < 0.05, excluded)
    assert (0 if seeds == 2 else 40) <= excluded.sum() < 390  # of two seeds intervals are wide
    assert (found.low <= found.value).all() and (found.value <= found.high).all()


@pytest.mark.parametrize("stat", stats.STATS)
def test_both_sides_of_a_comparison_say_the_same(stat: str) -> None:
    data = series(3, 20)
    data, turned, centre = (data, -data, 0) if stat != "winrate" else (wins := stats.wins(data, 0.0), 1 - wins, 1)
    forth, back = estimates(data, stat), estimates(turned, stat)
    np.testing.assert_allclose(back.low, centre - forth.high, atol=1e-9)
    np.testing.assert_allclose(back.p, forth.p, atol=1e-9)
    np.testing.assert_allclose(back.detectable, forth.detectable)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3), min_size=1, max_size=12))
@settings(deadline=None, max_examples=100)
def test_win_rates_stay_rates(rows: list[list[float]]) -> None:
    found = estimates(np.array(rows).T[None], "winrate")
    assert 0 <= found.low[0] <= found.value[0] <= found.high[0] <= 1 and 0 <= found.p[0] <= 1


def test_p_values_go_as_low_as_the_evidence() -> None:
    """Holm's correction over many pairs asks for them; no number of resamples is their floor."""
    data = 1 + RNG.standard_normal((1, 1, 500))
    assert 0 < estimates(data).p[0] < 1e-20
    assert 0 < estimates(stats.wins(data, 0.0), "winrate").p[0] < 1e-20


def test_where_there_is_nothing_to_estimate() -> None:
    nothing, constant = estimates(np.zeros((1, 3, 20))), estimates(np.full((1, 3, 20), 0.25))
    assert (nothing.low[0], nothing.high[0], nothing.p[0]) == (0, 0, 1)
    assert (constant.low[0], constant.high[0], constant.p[0]) == (0.25, 0.25, 0)
    for stat in ("mean", "median"):  # one prompt has no spread
        one = estimates(np.full((1, 3, 1), 2.0), stat)
        assert one.value[0] == 2 and np.isnan([one.low[0], one.high[0], one.p[0], one.detectable[0]]).all()
    rate = estimates(np.ones((1, 1, 1)), "winrate")
    assert (rate.low[0], rate.high[0], rate.p[0]) == (0, 1, 1)


def test_series_estimated_together_are_those_estimated_alone() -> None:
    data = series(3, 30, 7)
    for stat in ("mean", "median"):
        alone = [estimates(data[i : i + 1], stat) for i in range(7)]
        np.testing.assert_allclose(np.concatenate(alone, axis=1), estimates(data, stat), rtol=1e-12)
