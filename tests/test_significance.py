"""Tests and detectable differences: by hand, and against what they promise on simulated data."""

from __future__ import annotations

import fake_runs
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stats import long

from reports import significance, stats, tables
from reports.load import load_runs


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(significance.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(significance.holm([0.9, 0.8]), [1, 1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_holm_keeps_the_order_and_never_helps(p: list[float]) -> None:
    adjusted = significance.holm(p)
    assert (adjusted >= np.array(p)).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_tests_by_hand() -> None:
    assert significance.sign(np.array([1, 2, 3, 4, 5, 0])) == pytest.approx(2 / 32)
    assert significance.wilcoxon(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(2 / 32)
    assert significance.sign(np.zeros(4)) == significance.wilcoxon(np.zeros(4)) == 1
    swapped = np.random.default_rng(0).standard_normal(30) + 0.3
    assert significance.wilcoxon(swapped) == pytest.approx(significance.wilcoxon(-swapped))


def test_false_alarms_and_power_are_as_promised() -> None:
    """500 comparisons of 60 prompts: 5 % alarms without an effect, 80 % finds of the detectable one."""
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((500, 1, 60))
    alarms = np.mean([significance.wilcoxon(row[0]) < 0.05 for row in noise])
    assert 0.03 < alarms < 0.075
    low, high, _ = stats.estimates(noise, resamples=400)
    effect = float(np.median(significance.detectable(low, high)))
    low, _, _ = stats.estimates(noise + effect, resamples=400)
    assert 0.75 < np.mean(low > 0) < 0.86


def test_tables_carry_them(tmp_path) -> None:
    runs = load_runs(None, fake_runs.write_all(tmp_path, guidance=(3.0,), count=40))
    plain = tables.table(runs)
    assert plain["p"].isna().all()
    tidy = tables.table(runs, against="base", metrics=["pickscore", "clip", "aesthetic", "average", "average_z"])
    by = tidy.set_index(["model", "metric"])
    family = by.loc["SFT"].drop(list(stats.AVERAGES))
    np.testing.assert_allclose(family["p_holm"], significance.holm(family["p"]))
    assert by.loc[("SFT", "average"), "p_holm"] != by.loc[("SFT", "average"), "p_holm"]
    np.testing.assert_allclose(tidy["detectable"], (tidy["high"] - tidy["low"]) * 2.8016 / 3.92, rtol=1e-3)
    rates = tables.table(runs, "winrate", metrics=["pickscore"])
    assert rates["p"].between(0, 1).all()


def test_the_scale_free_average_weighs_metrics_alike() -> None:
    rng = np.random.default_rng(1)
    small, large = rng.standard_normal((2, 50, 1))
    frames = [
        long({"base": small, "a": small + 1}, "aesthetic"),
        long({"base": 100 * large, "a": 100 * large}, "pickscore"),
    ]
    found = stats.compare(stats.gather(pd.concat(frames), ["base", "a"]), stats.ZSCORE, against="base")
    assert found["value"].tolist() == pytest.approx([0.5 / small.std()])
