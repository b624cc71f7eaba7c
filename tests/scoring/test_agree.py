"""`bench agree`: what the scorers say of a set against what its people said, in numbers that can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import fake_pickapic
import numpy as np
import pandas as pd
import pytest

from bench import registry
from bench.commands import agree as command
from bench.commands import cli
from bench.data.preferences import load_preferences
from bench.errors import BenchError, UsageError
from bench.metrics.base import Images, Metric
from bench.metrics.columns import Column
from bench.scoring import agree, pairwise
from bench.scoring.evaluate import Scorers


class Redness(Metric):
    """How red a picture is, as PickScore's published checkpoint would say it, and how blue, which is a fault."""

    name, title = "redness", "Redness"
    columns = (Column("red", "Redness"), Column("blue", "Blueness", higher_is_better=False))

    @classmethod
    def load(cls, weights: str = "official", device: str = "cpu") -> Redness:
        metric = cls()
        metric.weights = weights
        return metric

    def score(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        means = np.array([np.asarray(image.convert("RGB")).mean((0, 1)) for image in images], np.float32)
        return {"red": means.reshape(-1, 3)[:, 0] / 100, "blue": means.reshape(-1, 3)[:, 2] / 100}

    def info(self) -> dict[str, str]:
        return {"checkpoint": f"{self.weights} (0123456789ab)"}


@pytest.fixture(autouse=True)
def known(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "redness", "test_agree:Redness")
    monkeypatch.setattr(agree, "CHUNK", 2)
    monkeypatch.chdir(tmp_path)
    if "agree" not in cli.cli.commands:
        monkeypatch.setitem(cli.cli.commands, "agree", command.agree)


def write(folder: Path, labels: Sequence[float], split: str, prompts: Sequence[str] | None = None) -> Path:
    """Image 0 is red and image 1 blue, the darker the later the row: redness differs by 2.55, 2.23, 1.91, ..."""
    prompts = prompts or [f"prompt {k}" for k in range(len(labels))]
    rows = [
        fake_pickapic.row(prompt, label, 4 * k) for k, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
    ]
    return fake_pickapic.write(folder, [rows], split)


def found(spec: str, weights: str = "official", tuning: str | None = None) -> agree.Agreement:
    cache = Path("cache")
    scorers = Scorers.load(["redness"], {"redness": {"weights": weights}})
    tuned = load_preferences(tuning, cache=cache) if tuning else None
    return agree.agreement(load_preferences(spec, cache=cache), scorers, tuned)


def test_agreement_is_what_can_be_counted_by_hand(tmp_path):
    write(tmp_path / "pick", [1, 1, 0, 0.5, 1], "test_unique")
    rows = found(f"pickapic:{tmp_path / 'pick'}").table.set_index("metric")
    red = rows.loc["redness/red"]
    assert red["accuracy"] == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 5)  # no tie is called: that pair gives 1/2
    assert red["decided"] == pytest.approx(3 / 4)
    assert (red["judgements"], red["pairs"], red["decided_pairs"], red["prompts"]) == (5, 5, 4, 5)
    assert red["accuracy_low"] < red["accuracy"] < red["accuracy_high"]
    # less blue is better: the same pictures, the same calls
    assert rows.loc["redness/blue", "accuracy"] == red["accuracy"]


def test_pairs_of_one_prompt_are_drawn_together(tmp_path):
    labels = [1, 1, 1, 0, 1, 0, 1, 1]
    write(tmp_path / "apart", labels, "test")
    write(tmp_path / "same", labels, "test", [f"prompt {k // 4}" for k in range(8)])
    apart, same = (found(f"pickapic:{tmp_path / name}#test").table.iloc[0] for name in ("apart", "same"))
    assert apart["accuracy"] == same["accuracy"] == 6 / 8 and (apart["prompts"], same["prompts"]) == (8, 2)
    counts = [pairwise.Counts(label, 1) for label in labels]
    expected = pairwise.accuracy(counts, [str(k // 4) for k in range(8)])
    assert (same["accuracy_low"], same["accuracy_high"]) == (expected.low[0], expected.high[0])


def test_the_tie_threshold_comes_from_other_pairs(tmp_path):
    write(tmp_path / "pick", [1, 1, 1, 0.5, 0.5, 0.5], "validation_unique")
    write(tmp_path / "pick", [1, 1, 1, 0.5, 0.5, 1], "test_unique")
    spec, tuning = (f"pickapic:{tmp_path / 'pick'}#{split}" for split in ("test_unique", "validation_unique"))
    preferences = load_preferences(spec, cache=Path("cache"))
    assert agree.tuning_split(preferences) == tuning
    told = found(spec, tuning=tuning)
    red = told.table.iloc[0]
    assert red["threshold"] == pytest.approx(1.59, abs=0.03)  # what row 3, the first tie of the validation split, has
    assert red["accuracy"] == pytest.approx((5 + 0.5) / 6) and red["decided"] == 1
    assert f"tuned on {tuning} (6 pairs)" in " ".join(told.notes)
    assert "No tie was called" in " ".join(found(spec).notes)


def test_no_split_is_its_own_validation(tmp_path):
    folder = write(tmp_path / "pick", [1, 0], "test")
    preferences = load_preferences(f"pickapic:{folder}#test", cache=Path("cache"))
    assert agree.tuning_split(preferences) is None
    (file,) = folder.rglob("*.parquet")  # one file has no splits
    assert agree.tuning_split(load_preferences(f"pickapic:{file}#test", cache=Path("cache"))) is None
    assert agree.tuning_split(load_preferences("world", cache=Path("cache"), limit=2)) is None
    with pytest.raises(UsageError, match="--tune: world:test has no tie threshold that world:train could tune"):
        found("world", tuning="world:train")


def test_published_accuracies_stand_beside_published_weights_alone(tmp_path, monkeypatch):
    class Stand(Redness):
        name, title = "pickscore", "PickScore"

        def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
            return super().score(images, prompts)["red"]

    monkeypatch.setattr(registry, "metric", lambda name: Stand)
    write(tmp_path / "pick", [1, 0], "test")
    spec = f"pickapic:{tmp_path / 'pick'}#test"
    official, mini = found(spec, "yuvalkirstain/PickScore_v1"), found(spec, "mini")
    assert official.table.iloc[0]["published"] == 70.2 and "pickapic_v1" in official.table.iloc[0]["published_source"]
    assert "Published pickscore: data card of yuvalkirstain/pickapic_v1" in " ".join(official.notes)
    assert "People: 68 %" in " ".join(mini.notes)
    assert np.isnan(mini.table.iloc[0]["published"]) and mini.table.iloc[0]["title"] == "PickScore (mini)"
    assert not official.warning and "2 of 2 prompts are not of it" in mini.warning


def test_every_published_accuracy_has_its_source():
    rows = agree.published()
    assert set(rows["schema"]) == {"pickapic", "hpdv2", "imagereward"} and (rows["source"] != "").all()
    assert set(rows["metric"]) <= {agree.PEOPLE, *registry.BUILT_IN["metrics"]}
    assert rows["accuracy"].astype(float).between(50, 100).all() and not rows.duplicated(["schema", "metric"]).any()


def test_broken_pictures_are_left_out_and_counted(tmp_path):
    rows = [fake_pickapic.row("whole", 1.0), fake_pickapic.row("broken", 1.0, 1, jpg_0=b"no picture")]
    fake_pickapic.write(tmp_path / "pick", [rows], "test")
    told = found(f"pickapic:{tmp_path / 'pick'}#test")
    assert told.table.iloc[0]["judgements"] == 1 and "left out: undecodable picture 1" in told.notes[0]
    fake_pickapic.write(tmp_path / "none", [rows[1:]], "test")
    with pytest.raises(BenchError, match="no judgement can be scored; left out: undecodable picture 1"):
        found(f"pickapic:{tmp_path / 'none'}#test")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["agree", *arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_the_embedded_default_agrees_with_its_people_better_than_a_coin(capsys):
    status, out, err = run(capsys, "world", "--metrics", "pickscore,judge", "--limit", "120", "--format", "json")
    told = json.loads(out)
    rows = {row["metric"]: row for row in told["rows"]}
    assert status == 0 and "warning" not in err
    assert rows["pickscore"]["title"] == "PickScore (mini)" and rows["pickscore"]["accuracy_low"] > 0.5
    assert rows["pickscore"]["published"] is None and rows["pickscore"]["threshold"] is None
    truth = load_preferences("world", limit=120, cache=Path("cache"))
    right = np.mean([truth.truth(row)[0] > truth.truth(row)[1] for row in range(120)])
    assert rows["exact utility"]["accuracy"] == pytest.approx(right)
    assert told["metrics"]["pickscore"]["checkpoint"].startswith("mini (")


def test_the_command_prints_a_table_and_its_rows(tmp_path, capsys):
    write(tmp_path / "pick", [1, 1, 0.5, 0], "test")
    spec = f"pickapic:{tmp_path / 'pick'}#test"
    status, out, err = run(capsys, spec, "--metrics", "redness", "--weights", "mini")
    assert status == 0 and "Redness (mini)" in out and "62.5 [" in out and "4 judgements of 4 prompts" in out
    assert err.strip().splitlines()[-1].startswith("warning: made for the drawn world alone: Redness (mini); 4 of 4")
    status, out, _ = run(capsys, spec, "--metrics", "redness", "--weights", "official", "--format", "csv")
    rows = pd.read_csv(StringIO(out))
    assert rows["title"].tolist() == ["Redness (official)", "Blueness (official)"]
    assert rows["accuracy"].tolist() == [0.625] * 2 and set(rows["schema"]) == {"pickapic"}
    assert run(capsys, "picapic:x")[2].startswith("bench: picapic:x: no such preference set (did you mean 'pickapic'?)")
    assert run(capsys, "world", "--metrics", "clip,clip")[::2] == (
        2,
        "bench: --metrics clip,clip: a metric is named twice\n",
    )
