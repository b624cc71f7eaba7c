"""Failure signatures: each is red where it should be, green where nothing is wrong, and honest without data."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import fake_runs
import pandas as pd
import pytest
from PIL import Image

from bench.methods.signals import GRAD_NORM, Limit, Signal
from bench.reports import signatures
from bench.reports.load import load_runs
from bench.reports.plots import colours
from bench.reports.sections import training

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
    [
        (0.7, "green", "told apart"),
        (0.93, "amber", "too easy"),
        (0.99, "red", "too easy"),
        (0.52, "amber", "too hard"),
        (0.4, "red", "too hard"),
    ],
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
    assert (found.level, found.number) == ("red", "10% [10%, 10%] of the base's diversity")


def test_gaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fake_runs.EFFECTS, "diffusion_dpo", (0.2,))
    falling = {**fake_runs.METRICS, "clip": (0.33, 0.03, 0.001, -0.5)}
    found = verdicts(tmp_path, metrics=falling)
    gamed = next(one for name, one in found.items() if name.startswith("Metric gaming") and "judge" not in name)
    fair = next(one for name, one in found.items() if name.startswith("Metric gaming") and "judge" in name)
    assert gamed.level == "red" and "CLIP falls" in gamed.reading
    assert fair.level == "green"


def declare(folder: Path, *declared: Signal) -> None:
    protocol = json.loads((folder / "protocol.json").read_text())
    protocol["signals"] = [asdict(signal) for signal in (*declared, GRAD_NORM)]
    (folder / "protocol.json").write_text(json.dumps(protocol))


@pytest.mark.parametrize(
    ("value", "level", "said"),
    [
        (0.5, "green", "fine (green 0.1 to 1)"),
        (0.05, "amber", "low"),
        (-1.0, "red", "lowest"),
        (1.5, "amber", "high"),
        (2.5, "red", "highest"),
    ],
)
def test_a_plug_ins_own_signal_is_judged_by_the_limits_it_declares(tmp_path: Path, value, level, said) -> None:
    """Its name says nothing: what is drawn and judged is in the run's protocol, and only that."""
    own = Signal(
        "zeal",
        "zeal of the policy",
        "how eager it is",
        below=Limit(0.1, 0.0, "low", "lowest"),
        fine="fine",
        above=Limit(1.0, "patience", "high", "highest"),
    )
    folder = fake_runs.write_run(tmp_path, "diffusion_dpo", guidance=(3.0,))
    history = pd.read_parquet(folder / "history.parquet").assign(zeal=value, patience=2.0, silent=1.0)
    history.to_parquet(folder / "history.parquet")
    declare(folder, own, Signal("patience", "patience", ""))
    runs = load_runs(None, tmp_path)
    (found,) = [one for one in signatures.signatures(runs, GROUP) if one.name == "zeal of the policy"]
    assert (found.level, found.number) == (level, f"zeal of the policy {value:.2f}, patience 2.00")
    assert found.reading.startswith(said)
    panels = [title for title, _ in training(runs, colours(runs.models))]
    assert panels == ["loss, Diffusion-DPO", "zeal of the policy", "patience", "gradient norm"]


def test_a_signal_by_timestep_is_judged_in_its_ranges(tmp_path: Path) -> None:
    own = Signal("zeal", "zeal", "", by_timestep=True, above=Limit(1.0, 9.0, "", ""))
    folder = fake_runs.write_run(tmp_path, "diffusion_dpo", guidance=(3.0,))
    ranges = {"zeal": 0.9, "zeal_t0_499": 1.5, "zeal_t500_999": 0.3}
    history = pd.read_parquet(folder / "history.parquet").assign(**ranges)
    history.to_parquet(folder / "history.parquet")
    declare(folder, own)
    found = [one for one in signatures.signatures(load_runs(None, tmp_path), GROUP) if "timesteps" in one.name]
    assert [(one.level, one.number) for one in found] == [("amber", "+1.5 at timesteps 0 to 499")]
    assert "zeal is above 1 in 1 of 2 ranges" in found[0].reading
