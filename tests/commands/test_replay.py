"""A run made again from its own protocol: equal to the last bit, or told where and why it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_bench
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_bench import bench

from bench import protocol
from bench.commands import replay
from bench.commands.replay import compare
from bench.storage import runs

SETTINGS = "--set evaluation.prompt_sets.test.limit=2 --set evaluation.guidance=[1.0] --set evaluation.seeds=[1]"
PARTS = [
    "images of base",
    "scores of base",
    "opponent's latents of iteration 1",
    "training signals of iteration 1",
    "weights of spin 1@1",
    "images of spin 1@1",
    "scores of spin 1@1",
    "weights of spin 1",
    "images of spin 1",
    "scores of spin 1",
]


@pytest.fixture(scope="module")
def place(darkness, tiny_pipeline_folder, tmp_path_factory) -> Path:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("replay")
    tiny_bench.write_suite(folder, tiny_pipeline_folder)
    inside = "--set 'methods.spin.iterations=[{steps: 2, lr: 1e-3, beta: 1000.0, checkpoints: [1]}]'"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bench(f"run --suite tiny.yaml --method spin --iters 1 {SETTINGS} {inside}") == 0
    return folder


@pytest.fixture
def run(place, monkeypatch) -> runs.Run:
    monkeypatch.chdir(place)
    return runs.load(runs.ids()[0])


def test_a_run_made_again_is_equal_to_the_last_bit(run, capsys):
    before = {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}
    assert bench(f"run --replay {run.id} --format json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bit_equal"] and told["equal"] == PARTS
    assert told["differing"] == {} and told["circumstances"] == []
    assert {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()} == before  # nothing else


def test_what_differs_is_told_from_where_on_and_with_what(run, monkeypatch, capsys):
    """A step that trains otherwise, as other code would: all before it is equal, all after it is not."""
    from bench.training.train import Loop

    step = Loop.step

    def other(self: Loop, number: int) -> None:
        if number == 1:
            next(self.policy.parameters()).data.add_(1e-3)
        step(self, number)

    monkeypatch.setattr(Loop, "step", other)
    monkeypatch.setattr(protocol, "git_commit", lambda: "another")
    assert bench(f"run --replay {run.id} --format json") == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["equal"] == PARTS[:3] + PARTS[4:7] and list(told["differing"]) == [PARTS[3], *PARTS[7:]]
    commit = json.loads((run.folder / "protocol.json").read_text())["git_commit"]
    assert told["circumstances"] == [f"git_commit: {commit} then, another now"]
    assert f"bench: {run.id} is not what it was; first the {PARTS[3]}: " in err and "another now" in err
    assert Path(told["folder"]).is_dir()
    shutil.rmtree("results/replays")


def test_only_finished_and_whole_runs_are_made_again(run, capsys, tmp_path, monkeypatch):
    shutil.copytree("results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    assert bench(f"run --replay {run.id} --seed 1") == 2
    assert "takes all settings from the run's own protocol" in capsys.readouterr().err
    latents = run.folder / "stages" / "opponent1" / "latents.npy"
    latents.write_bytes(latents.read_bytes()[:-4] + b"1234")
    assert bench(f"run --replay {run.id}") == 1
    assert f"damaged: {latents} does not hold what was written" in capsys.readouterr().err
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, "status": "RUNNING"}))
    assert bench(f"run --replay {run.id}") == 2
    assert f"has not come to its end: bench run --resume {run.id}" in capsys.readouterr().err


def test_every_difference_is_measured(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run.folder, again)
    record = json.loads((again / "protocol.json").read_text())
    assert compare(run, again, record).differing == {}

    latents = np.load(again / "stages/opponent1/latents.npy")
    latents[0, 0, 0, :2] += 0.5
    np.save(again / "stages/opponent1/latents.npy", latents)
    rows = pd.read_parquet(again / "iter1/history.parquet")
    (again / "iter1/history.parquet").unlink()
    rows.assign(loss=rows["loss"] + [0, 1], pairs_per_s=0.0).to_parquet(again / "iter1/history.parquet")
    tensors = load_file(again / "iter1/unet/diffusion_pytorch_model.safetensors")
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + np.float32(0.25)
    save_file(tensors, again / "iter1/unet/diffusion_pytorch_model.safetensors")
    first = sorted((again / "images/test/g1/iter1").glob("*.png"))[0]
    pixels = np.asarray(Image.open(first)).copy()
    pixels[3, 4] ^= 4
    first.unlink()
    Image.fromarray(pixels).save(first)
    table = pd.read_parquet(again / "scores.parquet")
    table.loc[table["step"] == 2, "value"] += 8.0
    table.to_parquet(again / "scores.parquet")
    next((again / "images/test/g1/iter1@1").glob("*.png")).unlink()
    after = {**record, "processes": [{**record["processes"][0], "threads": 99}, record["processes"][0]]}
    (again / "protocol.json").write_text(json.dumps(after))

    found = compare(run, again, record)
    threads = record["processes"][0]["threads"]
    count = len(tensors)
    assert found.circumstances == [f"threads: {threads} then, 99, {threads} now"]
    assert found.differing.pop("images of spin 1@1").endswith(".png is missing (1 of 2 files)")
    assert found.differing.pop("training signals of iteration 1").startswith("loss of step 2: ")
    assert found.differing == {
        "opponent's latents of iteration 1": f"latents.npy: 2 of {latents.size} values, by up to 0.5 (1 of 2 files)",
        "weights of spin 1": f"conv_in.bias: 8 of 8 values, by up to 0.25, 1 of {count} tensors",
        "images of spin 1": f"{first.name}: 3 of {pixels.size} values, by up to 4 (1 of 2 files)",
        "scores of spin 1": "scores: 2 of 2 values, by up to 8",
    }
    assert replay.summary(found).count("equal to the last bit") == len(PARTS) - 6
