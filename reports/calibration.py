"""How often the intervals of `bench.reports.uncertainty` hold, by simulation: `python -m bench.reports.calibration`.

Differences d[seed, prompt] = effect + a[seed] + b[prompt] + e[seed, prompt] are drawn with known effect, thousands of
data sets a setting, and given to the functions that make every table. Written to results/measured/calibration.csv and
.png. Columns:

* noise: how b and e are distributed (`NOISE`); prompts, seeds: of a data set; ratio: standard deviation of a over the
  standard error that b + e give to the mean of one seed's prompts; data_sets: how many.
* about: "method", whose effect is that of all seeds; "model" where there is one seed and its a is 0, so that the effect
  is that of these weights. With one seed and a ratio the rows show what becomes of such an interval when it is read as
  one about the method.
* coverage: share of the 95 % intervals that hold the effect, here none; false_better, false_worse: of those that lie
  above and below it.
* effect, power: the mean `detectable` of these data sets, and the share of intervals that exclude none when it is true.
  None where some data set has no detectable win rate.
* told_apart: share of pages on which any of a base and three methods, all equal, differ after Holm's correction of
  their six comparisons; the ratio is that of two methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.reports import significance, stats
from bench.reports.uncertainty import LEVEL, Estimates, estimates

FOLDER = Path("results/measured")
SEEDS, DATA_SETS = (1, 2, 3, 5, 10), {50: 10_000, 500: 4_000}  # of so many prompts
RATIOS = (0.0, 0.5, 1.0, 1.6, 2.0, 2.5, 3.0, 4.3, 5.2, 7.0)
METHODS, CHUNK = 3, 500


class Noise(NamedTuple):
    """Distribution of b + e, of variance 1: b's share of it, and whether both are exponential instead of normal."""

    shared: float
    skewed: bool = False


NOISE = {"normal": Noise(0.5), "mostly own": Noise(0.1), "mostly shared": Noise(0.9), "skewed": Noise(0.5, True)}


def simulate(noise: str, prompts: int, seeds: int, ratio: float, count: int, stat: str = "mean") -> dict:
    """One row of the file, without told_apart. Medians and win rates: of normal noise, which makes them 0 and .5."""
    null = 0.5 if stat == "winrate" else 0.0
    found = _estimated(stat, differences(noise, prompts, seeds, ratio, count))
    effect = float(found.detectable.mean())
    if stat == "winrate":
        shift = _shift(effect, prompts, ratio)
        low = _estimated(stat, (data + shift for data in differences(noise, prompts, seeds, ratio, count))).low
    else:
        low = found.low + effect  # what a shift of the data does to it
    return {
        "stat": stat,
        "noise": noise,
        "prompts": prompts,
        "seeds": seeds,
        "ratio": ratio,
        "data_sets": count,
        "about": "model" if seeds == 1 and ratio == 0 else "method",
        "coverage": np.mean((found.low <= null) & (null <= found.high)),
        "false_better": np.mean(found.low > null),
        "false_worse": np.mean(found.high < null),
        "effect": effect,
        "power": np.mean(low > null) if np.isfinite(effect) else np.nan,
    }


def differences(noise: str, prompts: int, seeds: int, ratio: float, count: int) -> Iterator[np.ndarray]:
    """Data sets without effect [<= CHUNK, seeds, prompts], the same every time."""
    rng, (shared, skewed) = np.random.default_rng([prompts, seeds]), NOISE[noise]
    draw = (lambda shape: rng.standard_exponential(shape) - 1) if skewed else rng.standard_normal
    for n in _chunks(count):
        of_seeds = ratio / np.sqrt(prompts) * rng.standard_normal((n, seeds, 1))
        yield of_seeds + np.sqrt(shared) * draw((n, 1, prompts)) + np.sqrt(1 - shared) * draw((n, seeds, prompts))


def told_apart(prompts: int, seeds: int, ratio: float, count: int) -> float:
    """See the module's docstring. Every comparison of two methods has normal noise, half of it shared."""
    rng, found = np.random.default_rng([prompts, seeds, METHODS]), []
    for n in _chunks(count):
        methods = [
            ratio / np.sqrt(2 * prompts) * rng.standard_normal((n, seeds, 1))
            + rng.standard_normal((n, 1, prompts)) / 2
            + rng.standard_normal((n, seeds, prompts)) / 2
            for _ in range(METHODS)
        ]
        base = np.broadcast_to(rng.standard_normal((n, 1, prompts)) / 2, methods[0].shape)
        p = np.stack([estimates(one - other).p for one, other in combinations([base, *methods], 2)], axis=1)
        found += [(significance.holm(row) < 1 - LEVEL).any() for row in p]
    return float(np.mean(found))


def _chunks(count: int) -> Iterator[int]:
    return (min(CHUNK, count - start) for start in range(0, count, CHUNK))


def _estimated(stat: str, data_sets: Iterator[np.ndarray]) -> Estimates:
    parts = [estimates(stats.wins(data, 0.0) if stat == "winrate" else data, stat) for data in data_sets]
    return Estimates(*map(np.concatenate, zip(*parts, strict=True)))


def _shift(effect: float, prompts: int, ratio: float) -> float:
    """What to add to normal differences for a win rate of one half and `effect`."""
    from scipy.special import ndtri

    return float(ndtri(0.5 + effect) * np.sqrt(1 + ratio**2 / prompts))


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Coverage, false "better" and power over the ratio, of normal noise."""
    import seaborn

    names = {"coverage": "95 % intervals that hold", "false_better": 'false "better"', "power": "power at detectable"}
    shown = rows[(rows["noise"] == "normal") & (rows["seeds"] > 1)].rename(columns=names)
    shown = shown.melt(["stat", "prompts", "seeds", "ratio"], list(names.values()))
    shown["seeds"] = shown["seeds"].astype(str)  # a colour for each, not a scale of them
    grid = seaborn.relplot(
        shown,
        x="ratio",
        y="value",
        hue="seeds",
        style="prompts",
        row="variable",
        col="stat",
        kind="line",
        markers=True,
        height=2.2,
        aspect=1.4,
        palette="colorblind",
        facet_kws={"sharey": "row", "margin_titles": True},
    )
    grid.set_titles(row_template="{row_name}", col_template="{col_name}")
    grid.set_axis_labels("deviation of seeds /\nstandard error over prompts", "")
    for axes, (low, high) in zip(grid.axes, ((0.93, 0.97), (0.0, 0.06), (0.75, 0.85)), strict=True):
        for one in axes:
            one.axhspan(low, high, color="0.92", zorder=0)
    grid.savefig(path, dpi=72)


def main() -> None:
    """Simulate every setting, about six minutes on one core."""
    rows, pages = [], []
    for prompts, seeds, ratio in product(DATA_SETS, SEEDS, RATIOS):
        count = DATA_SETS[prompts]
        cells = [(noise, "mean") for noise in NOISE] + [("normal", stat) for stat in stats.STATS[1:]]
        rows += [simulate(noise, prompts, seeds, ratio, count, stat) for noise, stat in cells]
        pages.append(
            {
                "stat": "mean",
                "noise": "normal",
                "prompts": prompts,
                "seeds": seeds,
                "ratio": ratio,
                "told_apart": told_apart(prompts, seeds, ratio, count),
            }
        )
    keys = ["stat", "noise", "prompts", "seeds", "ratio"]
    table = pd.DataFrame(rows).merge(pd.DataFrame(pages), how="left", on=keys).sort_values(keys)
    table.to_csv(FOLDER / "calibration.csv", index=False, lineterminator="\n", float_format="%.4g")
    draw(table, FOLDER / "calibration.png")


if __name__ == "__main__":
    main()
