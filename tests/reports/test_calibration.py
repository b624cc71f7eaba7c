"""Intervals keep their promises: a few settings simulated here, all of them in results/measured/calibration.csv."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from bench.reports import calibration, uncertainty

FILE = calibration.FOLDER / "calibration.csv"
KEYS = ["stat", "noise", "prompts", "seeds", "ratio"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(FILE)


@pytest.mark.parametrize(
    ("stat", "noise", "seeds", "ratio"),
    [
        ("mean", "normal", 1, 0.0),
        ("mean", "normal", 3, 0.5),
        ("mean", "normal", 3, 2.5),
        ("mean", "mostly own", 3, 0.5),
        ("mean", "mostly shared", 3, 5.2),
        ("mean", "normal", 10, 7.0),
        ("median", "normal", 3, 2.0),
        ("winrate", "normal", 3, 3.0),
        ("winrate", "normal", 1, 0.0),
    ],
)
def test_coverage_false_claims_and_power(stat: str, noise: str, seeds: int, ratio: float) -> None:
    """2,000 data sets: the standard error of a coverage is .005. Resampled seeds covered .89 at 2.5 and .83 at 5.2."""
    found = calibration.simulate(noise, 50, seeds, ratio, 2000, stat)
    assert 0.93 < found["coverage"] < 0.98
    assert found["false_better"] < 0.04 and found["false_worse"] < 0.04
    assert not found["power"] < 0.75 and not found["power"] > 0.85  # some have no detectable win rate


def test_satterthwaites_degrees_of_freedom_are_too_sure() -> None:
    """Why p is a mixture: of the same 10,000 data sets, effects at p = .05 and far out."""
    data = np.concatenate(list(calibration.differences("normal", 50, 3, 4.3, 10_000)))
    error, mixed = uncertainty._Error.of(data), uncertainty.estimates(data).p
    df = 1 / (error.share**2 / 2 + (1 - error.share) ** 2 / 49)
    usual = 2 * t.sf(np.abs(data.mean(axis=(1, 2))) / np.sqrt(error.variance), df)
    assert np.mean(mixed < 0.05) < 0.055 and np.mean(mixed < 0.001) < 0.0025
    assert np.mean(usual < 0.05) > 0.065 and np.mean(usual < 0.001) > 0.01


def test_equal_methods_are_not_told_apart() -> None:
    assert calibration.told_apart(50, 3, 3.0, 1000) < 0.07


def test_the_file_is_what_the_code_gives(table: pd.DataFrame) -> None:
    for stat in ("mean", "median", "winrate"):
        (row,) = table[(table[KEYS] == [stat, "normal", 50, 3, 2.5]).all(axis=1)].to_dict("records")
        found = calibration.simulate("normal", 50, 3, 2.5, row["data_sets"], stat)
        for name in ("coverage", "false_better", "false_worse", "effect"):
            assert found[name] == pytest.approx(row[name], rel=2e-3, nan_ok=True), (stat, name)


def test_the_file_holds_what_is_promised(table: pd.DataFrame) -> None:
    """Every setting there; with three seeds or more and with one seed that speaks of itself."""
    assert len(table) == 2 * len(calibration.SEEDS) * len(calibration.RATIOS) * (len(calibration.NOISE) + 2)
    assert (table["data_sets"] >= 2000).all() and not table.duplicated(KEYS).any()
    several = table[table["seeds"] >= 3]
    assert several["coverage"].between(0.93, 0.97).all()
    claims = table[(table["seeds"] > 1) | (table["about"] == "model")]
    assert (claims[["false_better", "false_worse"]] <= 0.06).all(axis=None)
    assert several["power"].dropna().between(0.75, 0.9).all()
    assert several["told_apart"].dropna().max() <= 0.06


def test_the_docstring_says_what_the_file_says(table: pd.DataFrame) -> None:
    text = " ".join((uncertainty.__doc__ or "").split())
    method = table[table["about"] == "method"]
    several, two, one = (method[rule] for rule in (method["seeds"] >= 3, method["seeds"] == 2, method["seeds"] == 1))
    model = table[table["about"] == "model"]
    for said in (
        f"cover {span(several['coverage'])}",
        f'say "better" of nothing in {span(several["false_better"])},',
        f"tell equal methods apart on {span(several['told_apart'])} of pages",
        f"is found with power {span(several['power'])}.",
        f"With two seeds they cover {span(two['coverage'])}, and {span(two['told_apart'])} of pages",
        f"One seed covers {span(model['coverage'])} of its own weights; "
        f"read as one of the method {span(one['coverage'])}.",
    ):
        assert said in text, said


def span(values: pd.Series) -> str:
    """ ".94 to .97"."""
    return " to ".join(f"{value:.2f}".lstrip("0") for value in (values.min(), values.max()))
