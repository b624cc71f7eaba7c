"""Several tests at once: Holm's correction by hand, and what tables carry of the model behind their intervals."""

from __future__ import annotations

import fake_runs
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stats import gather, long

from bench.reports import significance, stats, tables
from bench.reports.load import load_runs


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(significance.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(significance.holm([0.9, 0.8]), [1, 1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_holm_keeps_the_order_and_never_helps(p: list[float]) -> None:
    adjusted = significance.holm(p)
    assert (adjusted >= np.array(p)).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_tables_carry_them(tmp_path) -> None:
    runs = load_runs(None, fake_runs.write_all(tmp_path, guidance=(3.0,), count=40))
    plain = tables.table(runs)
    assert plain["p"].isna().all()
    tidy = tables.table(runs, against="base", metrics=["pickscore", "clip", "aesthetic", "average", "average_z"])
    by = tidy.set_index(["model", "metric"])
    family = by.loc["SFT"].drop(list(stats.AVERAGES))
    np.testing.assert_allclose(family["p_holm"], significance.holm(family["p"]))
    assert by.loc[("SFT", "average"), "p_holm"] != by.loc[("SFT", "average"), "p_holm"]
    # of one seed: the noncentrality of t with 39 degrees of freedom that has 80 % power, over c4
    half = (tidy["high"] - tidy["low"]) / 2
    np.testing.assert_allclose(tidy["detectable"], half * 2.87298 / 0.99361 / 2.02269, rtol=1e-5)
    for rows, null in ((tidy, 0), (tables.table(runs, "winrate", metrics=["pickscore", "clip"]), 0.5)):
        assert ((rows["p"] < 0.05) == ((rows["low"] > null) | (rows["high"] < null))).all()


def test_what_has_no_p_is_not_counted(tmp_path) -> None:
    rows = pd.DataFrame({"model": "a", "metric": ["clip", "pickscore", "aesthetic"], "p": [0.01, np.nan, 0.04]})
    np.testing.assert_allclose(significance.annotate(rows)["p_holm"], [0.02, np.nan, 0.04])


def test_the_scale_free_average_weighs_metrics_alike() -> None:
    rng = np.random.default_rng(1)
    small, large = rng.standard_normal((2, 50, 1))
    frames = [
        long({"base": small, "a": small + 1}, "aesthetic"),
        long({"base": 100 * large, "a": 100 * large}, "pickscore"),
    ]
    found = stats.compare(gather(pd.concat(frames), ["base", "a"]), stats.ZSCORE, against="base")
    assert found["value"].tolist() == pytest.approx([0.5 / small.std()])
