"""The five bundled scorers: they load, they are small, and they tell better from worse as their records say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import registry
from bench.mini import MINI_WEIGHTS
from bench.mini.__main__ import PLAN
from bench.mini.pools import Pool, pair_pool, pairwise

NAMES = ("pickscore", "hpsv2", "imagereward", "aesthetic", "clip")
PAIRS = 300
MOST_BYTES = 15e6
absent = [name for name in NAMES if not (MINI_WEIGHTS / name).is_dir()]


def stored(name: str) -> dict:
    """What the builder measured: agreement with the exact utility on 2000 held-out pairs."""
    if name in absent:
        pytest.skip(f"the miniature {name} is not built")
    return json.loads((MINI_WEIGHTS / name / "accuracy.json").read_text())["drawings"]["pairwise"]


@pytest.fixture(scope="module")
def fresh() -> Pool:
    """Pairs that neither the trainings (seed 0) nor the builder's measurement (seed 1) saw."""
    return pair_pool(20261123, PAIRS, "validation")


@pytest.mark.skipif(bool(absent), reason=f"not built: {', '.join(absent)}")
def test_together_they_stay_small():
    files = [path for name in NAMES for path in (MINI_WEIGHTS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_they_load_and_score(name, fresh):
    stored(name)
    metric = registry.metric(name).load()
    scores = metric.score(fresh.images[:6], fresh.captions[:6])
    assert scores.dtype == np.float32 and np.isfinite(scores).all() and np.ptp(scores) > 0
    info = metric.info()
    assert info["checkpoint"].startswith("mini") and all(info.values())
    assert metric.count_truncated(fresh.captions) == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_accuracy_holds_on_fresh_pairs(name, fresh):
    recorded = stored(name)
    scores = registry.metric(name).load().score(fresh.images, fresh.captions)
    found = pairwise(scores, fresh.utility)
    share = recorded["accuracy"]
    noise = np.sqrt(share * (1 - share) * (1 / found["pairs"] + 1 / recorded["pairs"]))
    assert abs(found["accuracy"] - share) < 3 * noise, (found, recorded)
    assert found["interval"][0] > 0.5  # better than a guess, whatever the record says


def test_records_have_intervals():
    """Of drawings, and of their round trips through the autoencoder where these were measured."""
    for name in set(NAMES) - set(absent):
        report = json.loads((MINI_WEIGHTS / name / "accuracy.json").read_text())
        for seen in report.values():
            low, high = seen["pairwise"]["interval"]
            assert low < seen["pairwise"]["accuracy"] < high and seen["pairwise"]["pairs"] == 2000


@pytest.mark.skipif(bool(absent), reason=f"not built: {', '.join(absent)}")
def test_records_say_who_labelled_the_training_images():
    """As the builder's plan has it: drawings, round trips of half of them, and two samples a prompt at two scales."""
    drawn = {
        "clip": PLAN["clip"]["pool"],
        "aesthetic": PLAN["aesthetic"]["pool"],
        "pickscore": 2 * PLAN["pickscore"]["pairs"],
        "imagereward": 2 * PLAN["imagereward"]["pairs"],
        "hpsv2": 4 * PLAN["hpsv2"]["rankings"],
    }
    for name in NAMES:
        judged = 0 if name == "clip" else 4 * PLAN["samples"]["prompts"]
        images = drawn[name] * 3 // 2 + judged
        record = json.loads((MINI_WEIGHTS / name / "training.json").read_text())
        assert record == {"images": images, "labelled_by_judge": judged, "share": round(judged / images, 4)}
