"""The paper-scale path on random weights: the true shape, its sources of data, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_pickapic
import numpy as np
import pandas as pd
import pytest
import tiny_bench
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from fake_pickapic import jpg, row
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from bench import models, registry
from bench.commands import cli
from bench.errors import BenchError, UsageError
from bench.mini import MINI_WEIGHTS
from bench.models.random_weights import SD15, random_pipeline
from bench.shared import Shared
from bench.storage import runs
from bench.suites import load_suite

ROWS = [
    row("a red cat", 1.0, 0),
    row("a tie", 0.5, 1),
    row("a dog", 0.0, 2, jpg_1=jpg((0, 0, 200))[:99]),
    row("a blue dog on a bench", 0.0, 3),
]
GIB = 2**30


def overrides(data: Path, prompts: Path, **more: str) -> list[str]:
    """Two prompts, two steps, one training step, a mini scorer."""
    settings = {
        "model.dtype": "fp32",
        "train.precision": "fp32",
        "data.pairs": f"pickapic:{data}",
        "train.batch_size": "1",
        "train.micro_batch": "1",
        "train.gradient_checkpointing": "true",
        "opponent.steps": "2",
        "opponent.batch_size": "1",
        "evaluation.prompt_sets.test.prompts": prompts,
        "evaluation.steps": "2",
        "evaluation.batch_size": "1",
        "evaluation.seeds": "[5775709]",
        "metrics": "[clip]",
        "metric_options": "{}",
        "data.batch_size": "1",
        "methods.spin.iterations": "[{steps: 1, lr: 1e-5, beta: 2000}]",
        **more,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def inputs(folder: Path) -> tuple[Path, Path]:
    (folder / "prompts.txt").write_text("a red cat\na castle, oil on canvas\n")
    return fake_pickapic.write(folder / "pap", [ROWS]), folder / "prompts.txt"


def command(settings: list[str]) -> list[str]:
    return ["run", "--suite", "sd15", "--method", "spin", *(word for item in settings for word in ("--set", item))]


def test_random_weights_have_sd15s_shape():
    """Parameters as counted in the published checkpoints."""
    with torch.device("meta"):
        parts = (
            UNet2DConditionModel(**SD15["unet"]),
            AutoencoderKL(**SD15["vae"]),
            CLIPTextModel(CLIPTextConfig(**SD15["text_encoder"])),
        )
    counted = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counted == [859_520_964, 83_653_863, 123_060_480]


def test_random_weights_are_made_once_and_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = models.weights_folder("random:sd15-small")
    assert models.weights_folder("random:sd15-small") == folder and models.resolution(folder) == 512
    pipe = models.load_pipeline(folder)
    again = random_pipeline("random:sd15-small", MINI_WEIGHTS / "pipeline" / "tokenizer")
    assert torch.equal(pipe.unet.conv_in.weight, again.unet.conv_in.weight.half().float())
    assert pipe.tokenizer("zebra").input_ids[1] < 49408 and pipe.tokenizer.model_max_length == 77
    with pytest.raises(UsageError, match=r"no pipeline 'random:sd51'.*did you mean 'random:sd15'"):
        models.weights_folder("random:sd51")


def test_the_whole_path_at_512_pixels_in_reduced_width(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = overrides(*inputs(tmp_path), **{"model.weights": "random:sd15-small"})
    with pytest.raises(SystemExit) as caught:
        cli.main(command(settings))
    err = capsys.readouterr().err
    assert caught.value.code == 0, err
    assert "2 of 4 rows used; left out: 1 tie, 1 undecodable image" in err
    (name,) = runs.ids()
    run = runs.load(name)
    protocol = json.loads((run.folder / "protocol.json").read_text())
    assert protocol["data"]["pairs"] == 2 and protocol["data"]["resolution"] == 512
    assert "random weights" in protocol["model"]["remark"]
    scores = pd.read_parquet(run.folder / "scores.parquet")
    assert scores.groupby("iteration")["value"].count().to_dict() == {0: 2, 1: 2} and scores["value"].notna().all()
    (picture, *_) = (run.folder / "images" / "test" / "g7.5" / "iter1").glob("*.png")
    assert Image.open(picture).size == (512, 512)
    history = pd.read_parquet(run.folder / "history.parquet")
    assert history["loss"].tolist() == [pytest.approx(np.log(2))]


@pytest.mark.slow
def test_the_whole_path_at_full_width_stays_within_24_gib(tmp_path):
    settings = overrides(*inputs(tmp_path), **{"model.weights": "random:sd15"})
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command(settings)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    (cost,) = (json.loads(path.read_text()) for path in tmp_path.glob("results/runs/*/cost.json"))
    # each stage starts its peak anew, so the process's own, getrusage's, would be that of the last one
    peak = max(cost["peak_memory_bytes"], *(stage["peak_memory_bytes"] for stage in cost["shared_stages"]))
    assert 8 * GIB < peak < 24 * GIB, f"{peak / GIB:.1f} GiB"


# --- the sources, on a pipeline that takes no time ---


@pytest.fixture
def tiny(tiny_pipeline_folder, tmp_path, monkeypatch):
    """Build what runs share on the tiny suite with other data."""
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
    monkeypatch.chdir(tmp_path)
    tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)

    def build(*settings: str, methods=()) -> Shared:
        return Shared(load_suite("tiny.yaml", ["data.size=null", *settings]), methods)

    return build


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpg").write_bytes(jpg((200, 0, 0)))
        (folder / f"{name}.txt").write_text(f"image {name}")
    return folder


def test_latents_and_embeddings_leave_broken_rows_out(tiny, tmp_path):
    shared = tiny(f"data.pairs=pickapic:{inputs(tmp_path)[0]}")
    assert shared.encoded.pairs.prompts == ["a red cat", "a blue dog on a bench"]
    latents, embeddings = shared.encoded.latents("winners"), shared.encoded.embeddings()
    assert latents.shape == (2, 4, 8, 8) and len(embeddings) == 2
    assert np.isfinite(latents[:]).all() and np.isfinite(shared.encoded.latents("losers")[:]).all()
    expected = models.load_pipeline(shared.frozen.base.folder.parent).encode_prompt(
        shared.encoded.pairs.prompts, "cpu", 1, False
    )[0]
    np.testing.assert_allclose(embeddings.lookup([0, 1]), expected.detach(), atol=1e-5)


def test_a_folder_trains_sft_and_spin_and_refuses_methods_on_human_pairs(tiny, images):
    shared = tiny(f"data.pairs=folder:{images}", methods=["sft", "spin"])
    assert len(shared.encoded.pairs) == 2 and shared.encoded.latents("winners").shape == (2, 4, 8, 8)
    with pytest.raises(UsageError, match="diffusion_dpo is trained on pairs with a human choice, but folder"):
        tiny(f"data.pairs=folder:{images}", methods=["sft", "diffusion_dpo"])


def test_flips_are_for_pairs_that_can_be_mirrored_together(tiny, tmp_path):
    pairs = f"data.pairs=pickapic:{inputs(tmp_path)[0]}"
    shared = tiny(pairs, "data.flip=true", "data.precision=fp16", methods=["sft", "diffusion_dpo"])
    assert (
        shared.encoded.latents("losers").shape == (2, 2, 4, 8, 8)
        and shared.encoded.latents("losers").dtype == np.float16
    )
    with pytest.raises(UsageError, match=r"spin: data\.flip mirrors winner and loser together"):
        tiny(pairs, "data.flip=true", methods=["spin"])


def test_a_prompt_set_of_a_missing_file_is_one_line(tiny):
    with pytest.raises(BenchError, match="prompts file not found: nowhere.txt"):
        tiny("data.pairs=world", "data.size=3", "evaluation.prompt_sets.test.prompts=nowhere.txt")
