"""The long table and the image files, with scorers made of plain arithmetic."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bench import registry
from bench.data import PromptSet
from bench.errors import BenchError, UsageError
from bench.metrics.base import Metric
from bench.metrics.columns import Column
from bench.scoring import evaluate
from bench.scoring.evaluate import COLUMNS, Scorers
from bench.storage.runs import BASE, Result

PROMPTS = PromptSet("file", ("a cat", "a dog", "a cat"))
SEEDS = [7, 5775709]


class Brightness(Metric):
    name = "brightness"
    title = "Brightness"

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32, scale: float = 1.0):
        metric = cls()
        metric.scale = scale
        return metric

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        return np.array(
            [self.scale * image.mean() + len(prompt) for image, prompt in zip(images, prompts, strict=True)], np.float32
        )

    def info(self):
        return {"version": "1"}


class Judged(Metric):
    """A metric of two columns, the second better when lower."""

    name = "judged"
    title = "Judged"
    columns = (Column("utility", "utility"), Column("fade", "fade", higher_is_better=False))

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32):
        return cls()

    def score(self, images, prompts):
        return {"fade": np.zeros(len(images), np.float32), "utility": np.linspace(0, 1, len(images), dtype=np.float32)}

    def info(self):
        return {"version": "2"}


def sampled() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def rows_of(images: np.ndarray, scorers: Scorers) -> pd.DataFrame:
    scores = scorers.score(images, [prompt for prompt in PROMPTS.prompts for _ in SEEDS])
    identity = {"run": "r", "method": "spin", "iteration": 2, "step": 150, "prompt_set": "test", "guidance": 3.0}
    return evaluate.table_rows(scores, PROMPTS.ids, SEEDS, identity)


def test_the_long_table_has_a_row_for_every_image_and_score():
    images = sampled()
    table = rows_of(images, Scorers({"brightness": Brightness.load(), "judged": Judged.load()}))
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 3 * 6
    assert list(dict.fromkeys(table["metric"])) == ["brightness", "judged/utility", "judged/fade"]  # as declared
    assert table.loc[table["metric"] == "judged/utility", "value"].tolist() == pytest.approx(np.linspace(0, 1, 6))
    # A repeated prompt has an id of its own.
    assert not table.duplicated(["prompt_id", "seed", "metric"]).any()
    constant = table[["run", "method", "iteration", "step", "prompt_set", "guidance"]].drop_duplicates()
    assert constant.values.tolist() == [["r", "spin", 2, 150, "test", 3.0]]
    chosen = table.query("metric == 'brightness' and prompt_id == @PROMPTS.ids[1] and seed == 5775709")
    assert chosen["value"].item() == pytest.approx(images[3].mean() + 5, rel=1e-6)


def test_the_table_survives_parquet(tmp_path):
    table = rows_of(sampled(), Scorers({"brightness": Brightness.load()}))
    table.to_parquet(tmp_path / "scores.parquet", index=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "scores.parquet"), table, check_dtype=False)


def test_no_scores_give_an_empty_table():
    assert list(evaluate.table_rows({}, PROMPTS.ids, SEEDS, {}).columns) == list(COLUMNS)


def test_images_are_read_back_as_written(tmp_path):
    folder = evaluate.image_folder(tmp_path, "test", 3.0, Result("spin", 2, 200, 100))
    assert folder == tmp_path / "images" / "test" / "g3" / "iter2"
    assert evaluate.image_folder(tmp_path, "test", 7.5, BASE).parts[-2:] == ("g7.5", "iter0")
    assert evaluate.image_folder(tmp_path, "test", 1.0, Result("spin", 2, 150, 50, end=False)).name == "iter2@50"
    images = sampled()
    paths = evaluate.image_paths(folder, PROMPTS.ids, SEEDS)
    evaluate.write_images(paths, images)
    assert (folder / f"{PROMPTS.ids[0]}-7.png").is_file() and len(list(folder.iterdir())) == 6
    np.testing.assert_array_equal(evaluate.read_images(paths), images)
    (folder / f"{PROMPTS.ids[2]}-7.png").unlink()
    with pytest.raises(BenchError, match=rf"1 of 6 images are missing, first .*{PROMPTS.ids[2]}-7\.png"):
        evaluate.read_images(paths)


def test_images_of_one_colour_or_nearly_all_at_the_ends_show_nothing():
    """Of 8 x 8 x 3 = 192 values 1 may lie between 0 and 255: 191 / 192 > 0.99 > 190 / 192."""
    images = sampled()
    images[0] = 0
    images[1] = (10, 200, 30)
    images[2] = np.where(images[2] > 127, 255, 0)
    images[3] = np.where(images[3] > 127, 255, 0)
    images[2, 0, 0, 0] = images[3, 0, 0, 0] = images[3, 5, 5, 2] = 7
    images[4, :, :, :] = images[4, :1, :, :]  # stripes show something
    assert evaluate.blank(images).tolist() == [True, True, True, False, False, False]
    assert evaluate.blank_warning("sft 1, test", ["a cat", "b"], 6) == (
        "sft 1, test: 2 of 6 images show nothing (one colour, or over 99% of their values at 0 or 255), the first for "
        "'a cat'"
    )


def test_scorers_are_loaded_by_name_with_their_options(monkeypatch):
    monkeypatch.setattr(registry, "metric", lambda name: Brightness)
    scorers = Scorers.load(["brightness"], options={"brightness": {"scale": 2.0}})
    assert scorers.metrics["brightness"].scale == 2.0
    assert scorers.info() == {"brightness": {"version": "1"}}
    with pytest.raises(UsageError, match=r"metric_options\.brightness: .*'scales'"):
        Scorers.load(["brightness"], options={"brightness": {"scales": 2.0}})


@pytest.mark.parametrize(
    ("name", "value"), [("brightness", np.nan), ("brightness", np.inf), ("judged/utility", np.nan)]
)
def test_a_score_that_is_not_finite_is_refused_with_metric_and_prompt(monkeypatch, name, value):
    part = Brightness if name == "brightness" else Judged
    score = part.score

    def broken(self, images, prompts):
        values = score(self, images, prompts)
        (values["utility"] if part is Judged else values)[[2, 4]] = value
        return values

    monkeypatch.setattr(part, "score", broken)
    with pytest.raises(BenchError, match=f"^{name}: 2 of 6 scores are not finite, first {value} for 'c'; check"):
        Scorers({"brightness": Brightness.load(), "judged": Judged.load()}).score(sampled(), list("abcdef"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"utility": np.zeros(6)}, "metric 'judged' declares the columns utility, fade, but its score gave utility"),
        (np.zeros(6), "metric 'judged' declares the columns utility, fade, but its score gave one array"),
        ({"utility": np.zeros(6), "fade": np.zeros((6, 1))}, r"metric 'judged': fade has shape \[6, 1\] for 6 images"),
    ],
)
def test_scores_that_are_not_as_declared_are_refused(monkeypatch, given, expected):
    monkeypatch.setattr(Judged, "score", lambda self, images, prompts: given)
    with pytest.raises(BenchError, match=f"^{expected}"):
        Scorers({"judged": Judged.load()}).score(sampled(), list("abcdef"))


def test_the_protocol_has_what_a_metric_says_of_itself_and_the_hash_has_not():
    scorers = Scorers({"brightness": Brightness.load(), "judged": Judged.load()})
    assert scorers.info() == {"brightness": {"version": "1"}, "judged": {"version": "2"}}
    said = scorers.protocol()
    assert said["brightness"]["version"] == "1" and said["brightness"]["reads"] == "image and prompt"
    assert (
        [Column.read({**record, "of a later version": 1}) for metric in said.values() for record in metric["columns"]]
        == scorers.columns
        == [
            Column("brightness", "Brightness"),
            Column("judged/utility", "utility"),
            Column("judged/fade", "fade", higher_is_better=False),
        ]
    )


def test_a_metric_of_its_own_name_does_not_inherit_the_columns_of_another():
    class Other(Judged):
        name = "other"
        title = "Other"

    assert Other.table_columns() == (Column("other", "Other"),)


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", True])
def test_a_batch_size_that_is_none_is_refused_before_anything_is_scored(monkeypatch, size):
    monkeypatch.setattr(registry, "metric", lambda name: Brightness)
    with pytest.raises(UsageError, match=r"^metric_options\.brightness\.batch_size: expected an integer of at least 1"):
        Scorers.load(["brightness"], options={"brightness": {"batch_size": size}})


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x"])
def test_a_device_that_is_not_there_is_said_in_one_line(device):
    with pytest.raises(UsageError, match=f"^device {device} cannot be used here: .+") as caught:
        Scorers.load([], device=device)
    assert "\n" not in str(caught.value)


def test_equal_images_share_one_pass_of_equal_backbones(monkeypatch):
    from bench.metrics import sharing

    inside = []

    class Watching(Brightness):
        def score(self, images, prompts):
            inside.append(sharing._made is not None)
            return super().score(images, prompts)

    Scorers({"watching": Watching.load()}).score(sampled(), ["a"] * 6)
    assert inside == [True] and sharing._made is None
