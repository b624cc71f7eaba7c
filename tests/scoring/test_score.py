"""`bench score`: pairing, what is broken, the cache, and the files it writes; scorers are plain arithmetic."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bench import registry
from bench.commands import cli
from bench.errors import BenchError, UsageError
from bench.metrics.base import Metric
from bench.scoring import score
from bench.scoring.pairing import collect


class Brightness(Metric):
    name, title = "brightness", "Brightness"
    loads, scored = 0, 0

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32, factor: float = 1.0):
        Brightness.loads += 1
        metric = cls()
        metric.factor = factor
        return metric

    def score(self, images, prompts):
        Brightness.scored += len(images)
        return np.array(
            [
                self.factor * np.asarray(image).mean() + len(prompt)
                for image, prompt in zip(images, prompts, strict=True)
            ],
            np.float32,
        )

    def info(self):
        return {"version": "1", "truncates": "prompts after 5 letters"}

    def count_truncated(self, prompts):
        return sum(len(prompt) > 5 for prompt in prompts)


@pytest.fixture(autouse=True)
def known(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "brightness", "test_score:Brightness")
    monkeypatch.setattr(registry, "metric", lambda name: Brightness)
    monkeypatch.setattr(score, "CHUNK", 2)
    monkeypatch.chdir(tmp_path)
    Brightness.loads = Brightness.scored = 0


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.jpg", "c.webp", "more/d.PNG")):
        Image.new("RGB", (8, 6), (40 * index, 0, 0)).save(folder / name)
    return folder


def scored(folder: Path, prompts: Path | None = None, options: dict | None = None) -> tuple[pd.DataFrame, dict]:
    return score.score_folder(collect(folder, prompts), ["brightness"], options or {}, "cpu", Path("cache.sqlite"))


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".txt":
        path.write_text("\n".join(row["prompt"] for row in rows))
    else:
        frame = pd.DataFrame(rows)
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


ROWS = [
    {"file_name": name, "prompt": prompt}
    for name, prompt in (("a.png", "one"), ("b.jpg", "three"), ("c.webp", "007"), ("more/d.PNG", "a longer one"))
]


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl", "p.parquet"])
def test_every_kind_of_prompts_file(folder, tmp_path, name):
    table, protocol = scored(folder, write(tmp_path / name, ROWS))
    assert table["file_name"].tolist() == [row["file_name"] for row in ROWS]
    assert table["prompt"].tolist() == [row["prompt"] for row in ROWS] and not table["problem"].any()
    expected = [np.asarray(Image.open(folder / row["file_name"])).mean() + len(row["prompt"]) for row in ROWS]
    np.testing.assert_allclose(table["brightness"], expected, rtol=1e-6)
    assert (
        protocol["metrics"]["brightness"]
        == {**Brightness.description(), "version": "1", "truncates": "prompts after 5 letters", "truncated_prompts": 1}
        and protocol["scored"] == 4
    )


def test_metadata_in_the_folder_is_found(folder):
    write(folder / "metadata.jsonl", [{"file_name": row["file_name"], "text": row["prompt"]} for row in ROWS])
    assert scored(folder)[0]["prompt"].tolist() == [row["prompt"] for row in ROWS]
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(UsageError, match="--prompts is missing"):
        collect(folder, None)


def test_what_is_broken_is_named_and_the_rest_scored(folder, tmp_path):
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:100])
    rows = [ROWS[0], ROWS[1], {"file_name": "c.webp", "prompt": " "}, {"file_name": "gone.png", "prompt": "x"}, ROWS[0]]
    table, protocol = scored(folder, write(tmp_path / "p.csv", rows))
    problems = [(row.file_name, row.problem) for row in table.itertuples() if row.problem]
    assert [name for name, _ in problems] == ["b.jpg", "c.webp", "gone.png", "a.png", "more/d.PNG"]
    told = ["broken image", "empty prompt", "no such image", "named twice", "no prompt for this image"]
    assert all(problem.startswith(text) for (_, problem), text in zip(problems, told, strict=True))
    assert protocol["scored"] == 1 and table["brightness"].notna().sum() == 1
    assert "b.jpg: broken image" in score.summary(table, ["brightness"], protocol)


def test_metadata_is_not_trusted(folder, tmp_path, capsys):
    """Names that lead out of the folder, pipes, links to nothing, names no file can have, what draws on terminals."""
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(tmp_path / "nowhere")
    names = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "pipe.png",
        "link.png",
        "nul\0",
        "x" * 300 + ".png",
        "\x1b]0;owned\x07.png",
    ]
    Image.new("RGB", (8, 8)).save(os.fsencode(folder) + b"/latin-\xe9.png")
    prompts = write(tmp_path / "p.jsonl", [ROWS[0], *({"file_name": name, "prompt": "x"} for name in names)])
    table, protocol = scored(folder, prompts)
    problems = dict(zip(table["file_name"], table["problem"], strict=True))
    kinds = ["outside the folder"] * 2 + ["no file (a link"] * 2 + ["no such image"] * 3
    assert all(problems[name].startswith(kind) for name, kind in zip(names, kinds, strict=True))
    assert problems["latin-\\udce9.png"] == "no prompt for this image" and protocol["scored"] == 1
    told = score.summary(table, ["brightness"], protocol)
    assert "\\x1b]0;owned\\x07.png: no such image" in told and "\x1b" not in told
    score.write(table, protocol, tmp_path / "s.parquet")


def test_prompts_in_another_encoding_are_one_line_with_the_file(folder, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BenchError, match=r"p.txt cannot be read: 'utf-8' codec"):
        collect(folder, tmp_path / "p.txt")


@pytest.mark.parametrize(("count", "problem"), [(3, "no prompt for this image"), (5, "no image for this prompt")])
def test_a_list_of_another_length(folder, tmp_path, count, problem):
    table, _ = scored(folder, write(tmp_path / "p.txt", [{"prompt": "cat"}] * count))
    assert table["problem"].tolist().count(problem) == 1 and table["brightness"].notna().sum() == min(count, 4)


def test_nothing_is_scored_twice(folder, tmp_path):
    prompts = write(tmp_path / "p.csv", ROWS)
    first, protocol = scored(folder, prompts)
    again, same = scored(folder, prompts)
    assert Brightness.loads == 1 and Brightness.scored == 4 and same == protocol
    pd.testing.assert_frame_equal(first, again)
    Image.new("RGB", (8, 6), (9, 9, 9)).save(folder / "a.png")
    scored(folder, write(tmp_path / "p.csv", [*ROWS[:3], ROWS[3] | {"prompt": "other"}]))
    assert Brightness.scored == 6  # the changed image and the changed prompt
    doubled, _ = scored(folder, prompts, {"brightness": {"factor": 2.0}})
    assert Brightness.scored == 10 and (doubled["brightness"] >= first["brightness"]).all()


def test_a_broken_image_alone_loads_no_model(folder, tmp_path):
    prompts = write(tmp_path / "p.csv", ROWS)
    (folder / "b.jpg").write_bytes(b"no image")
    for _ in range(2):
        table, _ = scored(folder, prompts)
    assert Brightness.loads == 1 and table["problem"][1].startswith("broken image")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["score", *arguments])
    return exit_.value.code


def test_the_command_writes_the_protocol_into_its_files(folder, tmp_path, capsys):
    prompts = write(tmp_path / "p.csv", ROWS)
    common = (str(folder), "--prompts", str(prompts), "--metrics", "brightness")
    assert run(*common, "-o", "s.parquet", "--set", "brightness.factor=0.5") == 0
    stored = pq.read_table("s.parquet")
    protocol = json.loads(stored.schema.metadata[b"bench.protocol"])
    assert protocol["metrics"]["brightness"]["version"] == "1" and stored.num_rows == 4
    assert run(*common, "-o", "s.csv") == 0
    assert Path("s.csv").read_text().startswith("# bench.protocol: {")
    assert len(pd.read_csv("s.csv", comment="#")) == 4
    told = capsys.readouterr()
    assert "4 of 4 images scored" in told.out and protocol["metrics"]["brightness"]["truncated_prompts"] == 1
    assert told.err.splitlines()[-1] == "prompts truncated, of 4: brightness 1 (after 5 letters)"
    prompts.write_text(prompts.read_text().replace("a longer one", "short"))
    assert run(*common) == 0 and capsys.readouterr().err.endswith("of 4: none by any scorer\n")


def test_mistakes_on_the_command_line(folder, tmp_path, capsys):
    prompts = str(write(tmp_path / "p.txt", [{"prompt": "cat"}] * 3))
    common = (str(folder), "--prompts", prompts)
    assert run(*common, "--metrics", "brightnes") == 2
    assert "did you mean 'brightness'" in capsys.readouterr().err
    assert run(*common, "--metrics", "brightness", "-o", "s.xlsx") == 2
    assert run(*common, "--metrics", "brightness", "--set", "clip.x=1") == 2
    assert run(*common, "--metrics", "brightness", "--strict") == 1
    assert "1 of 4 images were not scored" in capsys.readouterr().err
    with pytest.raises(BenchError, match="no such folder"):
        collect(tmp_path / "nowhere", None)


def test_no_miniature_passes_for_the_published_scorer(folder, tmp_path, monkeypatch, capsys):
    """Its checkpoint stands beside its name in the terminal and in a CSV's header; other pictures bring a warning."""
    prompts = write(tmp_path / "p.csv", ROWS)
    monkeypatch.setattr(Brightness, "info", lambda self: {"version": "1", "checkpoint": "mini (0123456789ab)"})
    common = (str(folder), "--prompts", str(prompts), "--metrics", "brightness")
    assert run(*common, "-o", "s.csv") == 0
    told = capsys.readouterr()
    assert "  Brightness (mini)  mean " in told.out and "brightness (mini) 1 (?)" in told.err
    assert told.err.splitlines()[-1].startswith("warning: made for the drawn world alone: Brightness (mini); 4 of 4")
    assert list(pd.read_csv("s.csv", comment="#")) == ["file_name", "prompt", "brightness (mini)", "problem"]
    named = {"version": "1", "checkpoint": "owner/name (0123456789ab)"}
    monkeypatch.setattr(Brightness, "info", lambda self: named)
    assert run(*common, "--set", "brightness.factor=2") == 0
    told = capsys.readouterr()
    assert "  Brightness (owner/name)  mean " in told.out and "warning" not in told.err


def test_drawings_are_scored_with_miniatures_without_a_word(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Brightness, "info", lambda self: {"checkpoint": "mini (0123456789ab)"})
    rows = [{**row, "prompt": "a small red star on a white background"} for row in ROWS]
    assert run(str(folder), "--prompts", str(write(tmp_path / "p.csv", rows)), "--metrics", "brightness") == 0
    assert "warning" not in capsys.readouterr().err
