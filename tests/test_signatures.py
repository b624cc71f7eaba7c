"""Failure signatures: each is red where it should be, green where nothing is wrong, and honest without data."""

from __future__ import annotations

from pathlib import Path

import fake_runs
import pandas as pd
import pytest
from PIL import Image

from reports import signatures
from reports.load import load_runs

GROUP = ("test", 3.0)


def verdicts(root: Path, history: dict | None = None, **options) -> dict:
    folder = fake_runs.write_run(root, "diffusion_dpo", guidance=(3.0,), count=24, **options)
    if history:
        path = folder / "history.parquet"
        pd.read_parquet(path).assign(**history).to_parquet(path)
    found = signatures.signatures(load_runs(None, root), GROUP)
    return {one.name.split(":")[0] + ("" if "judge" not in one.name else " judge"): one for one in found}


@pytest.mark.parametrize(
    ("accuracy", "level", "said"),
    [(0.7, "green", "told apart"), (0.93, "amber", "too easy"), (0.99, "red", "too easy"),
     (0.52, "amber", "too hard"), (0.4, "red", "too hard")],
)
def test_competition(tmp_path: Path, accuracy: float, level: str, said: str) -> None:
    found = verdicts(tmp_path, {"implicit_accuracy": accuracy})["Competition too easy or too hard"]
    assert (found.level, found.number) == (level, f"implicit accuracy {accuracy:.2f}") and said in found.reading


@pytest.mark.parametrize(("winner", "loser", "level"), [(-0.1, 0.2, "green"), (0.1, 0.2, "amber"), (0.2, 0.1, "red")])
def test_drift(tmp_path: Path, winner: float, loser: float, level: str) -> None:
    found = verdicts(tmp_path, {"winner_drift": winner, "loser_drift": loser})
    assert found["Error drift"].level == level and f"{winner:+.2g}" in found["Error drift"].number
    assert found["Unweighted timesteps"].level == "unknown"


def test_timesteps_where_they_are_recorded(tmp_path: Path) -> None:
    buckets = {"winner_drift_t0_249": -0.2, "winner_drift_t250_499": 0.3, "winner_drift_t500_999": -0.1}
    found = verdicts(tmp_path, buckets)["Unweighted timesteps"]
    assert (found.level, found.number) == ("amber", "+0.3 at timesteps 250 to 499")


def test_only_the_end_of_training_counts(tmp_path: Path) -> None:
    accuracy = [0.5] * 16 + [0.99] * 4
    assert verdicts(tmp_path, {"implicit_accuracy": accuracy})["Competition too easy or too hard"].level == "red"


def test_collapse_needs_several_seeds_and_pictures(tmp_path: Path) -> None:
    one = verdicts(tmp_path / "one", images=3)["Mode collapse"]
    assert (one.level, one.reading) == ("unknown", "needs more than one sampling seed")
    assert verdicts(tmp_path / "none", image_seeds=(5775709, 1))["Mode collapse"].level == "unknown"


def test_collapse_is_seen(tmp_path: Path) -> None:
    """Base pictures differ by seed; the model's are a tenth as far apart."""
    folder = fake_runs.write_run(tmp_path, "sft", guidance=(3.0,), image_seeds=(5775709, 1), images=4)
    for k, gap in ((0, 200), (1, 20)):
        for text in fake_runs.prompts(4):
            for seed, level in ((5775709, 20), (1, 20 + gap)):
                name = f"{fake_runs.prompt_id(text)}-{seed}.png"
                Image.new("RGB", (64, 64), (level,) * 3).save(folder / f"images/test/g3/iter{k}" / name)
    runs = load_runs(None, tmp_path)
    assert list(signatures.diversity(runs, GROUP, "base").values()) == pytest.approx([200 / 255] * 4)
    found = next(s for s in signatures.signatures(runs, GROUP) if s.name == "Mode collapse")
    assert (found.level, found.number) == ("red", "10% of the base's diversity")


def test_gaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fake_runs.EFFECTS, "diffusion_dpo", (0.2,))
    falling = {**fake_runs.METRICS, "clip": (0.33, 0.03, 0.001, -0.5)}
    found = verdicts(tmp_path, metrics=falling)
    gamed = next(one for name, one in found.items() if name.startswith("Metric gaming") and "judge" not in name)
    fair = next(one for name, one in found.items() if name.startswith("Metric gaming") and "judge" in name)
    assert gamed.level == "red" and "CLIP falls" in gamed.reading
    assert fair.level == "green"
