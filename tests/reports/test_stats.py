"""Statistics: protocols, averages, win rates and what is paired with what."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.reports import columns, stats

RNG = np.random.default_rng(7)


def long(values: dict[str, np.ndarray], metric: str = "pickscore") -> pd.DataFrame:
    """Arrays [prompts, sampling seeds] of each model as long rows, training seed 0, the base untrained."""
    frames = []
    for model, array in values.items():
        prompts, seeds = np.indices(array.shape)
        frames.append(
            pd.DataFrame(
                {
                    "model": model,
                    "train_seed": pd.array([pd.NA if model == "base" else 0] * array.size, "Int64"),
                    "prompt_id": [f"p{i}" for i in prompts.ravel()],
                    "seed": seeds.ravel(),
                    "metric": metric,
                    "value": array.ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def gather(rows: pd.DataFrame, models: list[str], **options) -> stats.Scores:
    """The rows with the columns that the metrics of these names describe."""
    return stats.gather(rows, models, columns.described([], rows["metric"].unique()), **options)


def compare(values: dict[str, np.ndarray], **options) -> pd.DataFrame:
    return stats.compare(gather(long(values), list(values)), "pickscore", **options).set_index("model")


def test_row_order_changes_nothing() -> None:
    rows = long({"base": RNG.standard_normal((20, 2)), "a": RNG.standard_normal((20, 2))})
    for stat in stats.STATS:
        against = "base" if stat == "winrate" else None
        tables = [
            stats.compare(gather(order, ["base", "a"]), "pickscore", stat, against, "mean")
            for order in (rows, rows.sample(frac=1, random_state=1))
        ]
        pd.testing.assert_frame_equal(*tables)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=25)
def test_win_rates_of_both_sides_add_up_to_one(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(side, float)[:, None] for side in zip(*pairs, strict=True))
    forth = compare({"a": a, "b": b}, stat="winrate", against="b").loc["a"]
    back = compare({"a": a, "b": b}, stat="winrate", against="a").loc["b"]
    assert forth["value"] + back["value"] == pytest.approx(1)
    assert forth["low"] + back["high"] == pytest.approx(1)
    assert forth["value"] == pytest.approx(np.mean([(x > y) + 0.5 * (x == y) for x, y in pairs]))


def test_protocols_by_hand() -> None:
    a = np.array([[1.0, 3.0, 2.0], [6.0, 4.0, 5.0]])
    judge = np.array([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])
    rows = pd.concat([long({"a": a}), long({"a": judge}, "judge/utility")])
    scores = gather(rows, ["a"], image_seeds=[2, 0, 1])
    reduced = {name: stats.per_prompt(scores, name)[0, 0] for name in stats.PROTOCOLS}
    np.testing.assert_array_equal(reduced["one"][:, :2], [[2, 30], [5, 60]])  # the suite's first seed is 2
    np.testing.assert_array_equal(reduced["mean"][:, :2], [[2, 20], [5, 50]])
    np.testing.assert_array_equal(reduced["best"][:, :2], [[3, 20], [6, 40]])  # the judge does not choose


def test_best_of_several_images_is_that_of_the_highest_average_not_of_the_first_metric() -> None:
    """Prompt 0: 20 + 5 against 19 + 7. Prompt 1: 22 + 5 against 21 + 5.5. All scores are those of the image chosen."""
    parts = {"pickscore": [[20.0, 19], [22, 21]], "aesthetic": [[5, 7], [5, 5.5]], "judge/utility": [[1, 2], [3, 4]]}
    rows = pd.concat([long({"a": np.array(values, float)}, name) for name, values in parts.items()])
    scores = gather(rows, ["a"])
    best = dict(zip(scores.metrics, stats.per_prompt(scores, "best")[0, 0].T.tolist(), strict=True))
    assert best["pickscore"] == [19, 22] and best["aesthetic"] == [7, 5] and best["judge/utility"] == [2, 3]
    assert best["average"] == [13, 13.5]


def test_where_less_is_better_it_wins_and_is_the_best_of_several() -> None:
    """Of a defect: 1 beats 2, and the better of two pictures is the one with less; differences keep their sign."""
    rows = long({"base": np.array([[2.0, 4], [3, 5]]), "a": np.array([[1.0, 3], [3, 6]])}, "judge/fade")
    scores = gather(rows, ["base", "a"])
    assert stats.compare(scores, "judge/fade", "winrate", "base", "one")["value"].tolist() == [0.75]
    assert stats.compare(scores, "judge/fade", "mean", "base", "one")["value"].tolist() == [-0.5]
    assert stats.per_prompt(scores, "best")[1, 0, :, 0].tolist() == [1, 3]


def test_best_is_of_nothing_where_nothing_selects() -> None:
    """A model without one of the averaged scores has no best image, rather than its first one."""
    rows = [long({"a": np.ones((3, 2)), "b": np.ones((3, 2))}), long({"a": np.ones((3, 2))}, "aesthetic")]
    scores = gather(pd.concat(rows), ["a", "b"])
    best = stats.per_prompt(scores, "best")[..., scores.metrics.index("pickscore")]
    assert np.isfinite(best[0]).all() and np.isnan(best[1]).all()


@pytest.mark.parametrize("names", [["pickscore"], ["pickscore", "clip", "judge/utility"], ["clip"], ["judge/utility"]])
def test_there_is_no_average_of_fewer_than_two_of_the_papers_scores(names: list[str]) -> None:
    scores = gather(pd.concat([long({"a": np.ones((3, 1))}, name) for name in names]), ["a"])
    assert list(scores.metrics) == names


def test_average_is_the_mean_of_the_papers_scores() -> None:
    parts = {"pickscore": 20.0, "aesthetic": 6.0, "clip": 0.3, "judge/utility": 1.0}
    rows = pd.concat([long({"a": np.full((3, 1), value)}, name) for name, value in parts.items()])
    scores = gather(rows, ["a"])
    assert scores.metrics[-1] == "average"
    np.testing.assert_allclose(scores.values[..., -1], 13.0)


def test_seeds_are_paired_and_the_base_counts_once() -> None:
    """A difference between two methods that share each seed's luck is free of that luck."""
    luck = np.array([-5.0, 0.0, 5.0])
    frames = [long({"base": np.zeros((30, 1))})]
    for seed, shift in enumerate(luck):
        rows = long({"a": np.full((30, 1), shift), "b": np.full((30, 1), shift + 1)})
        frames.append(rows.assign(train_seed=pd.array([seed] * len(rows), "Int64")))
    scores = gather(pd.concat(frames), ["base", "a", "b"])
    paired = stats.compare(scores, "pickscore", "mean", "a").set_index("model")
    assert paired.loc["b", ["value", "low", "high", "p"]].tolist() == pytest.approx([1, 1, 1, 0])
    assert stats.compare(scores, "pickscore").set_index("model")["n_seeds"].to_dict() == {"base": 1, "a": 3, "b": 3}
    assert paired.loc["base", "high"] - paired.loc["base", "low"] > 5


def test_only_prompts_that_every_model_has_are_compared() -> None:
    rows = long({"base": np.zeros((10, 1)), "a": np.arange(10.0)[:, None]})
    rows = rows[~((rows["model"] == "a") & (rows["prompt_id"] == "p9"))]
    found = stats.compare(gather(rows, ["base", "a"]), "pickscore").set_index("model")
    assert found["n_prompts"].tolist() == [9, 9]
    assert found.loc["a", "value"] == 4


def test_columns_and_when_they_are_known() -> None:
    values = {"base": RNG.standard_normal((30, 1)), "a": RNG.standard_normal((30, 1))}
    plain, gain = compare(values), compare(values, against="base")
    assert list(gain) == ["value", "low", "high", "n_prompts", "n_seeds", "p", "detectable"] == list(plain)
    assert plain[["p", "detectable"]].isna().all(axis=None) and gain[["p", "detectable"]].notna().all(axis=None)
