"""Weights load and save, and whatever is wrong with them is one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tiny import make_unet

from bench.errors import BenchError
from bench.models import load_pipeline, load_unet, save_unet, weights_fingerprint, weights_folder


@pytest.fixture
def folder(tiny_pipeline_folder, tmp_path):
    return shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline")


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_pipeline_loads_from_its_folder(tiny_pipeline, tiny_pipeline_folder):
    pipe = load_pipeline(str(tiny_pipeline_folder))
    assert isinstance(pipe, StableDiffusionPipeline) and pipe.safety_checker is None
    assert same(pipe.unet, tiny_pipeline.unet) and same(pipe.text_encoder, tiny_pipeline.text_encoder)
    assert pipe.tokenizer("a red cat").input_ids == tiny_pipeline.tokenizer("a red cat").input_ids


def test_a_pipeline_loads_in_another_precision(tiny_pipeline_folder):
    pipe = load_pipeline(tiny_pipeline_folder, dtype=torch.bfloat16)
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


def test_a_hub_id_is_checked_before_it_is_downloaded(tiny_pipeline_folder, monkeypatch):
    """The index alone decides whether the large files are fetched at all."""
    index, fetched = {"_class_name": "FluxPipeline"}, []
    monkeypatch.setattr(StableDiffusionPipeline, "load_config", lambda name: index)
    monkeypatch.setattr(
        StableDiffusionPipeline, "download", lambda name, **_: fetched.append(name) or tiny_pipeline_folder
    )
    with pytest.raises(BenchError, match="expected a StableDiffusionPipeline, found FluxPipeline"):
        weights_folder("owner/name")
    assert not fetched
    index["_class_name"] = "StableDiffusionPipeline"
    assert weights_folder("owner/name") == tiny_pipeline_folder and fetched == ["owner/name"]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def fails(name):
        raise OSError("cannot connect\nlong explanation")

    monkeypatch.setattr(StableDiffusionPipeline, "load_config", fails)
    with pytest.raises(BenchError, match="^owner/name: no such folder, and the hub failed: cannot connect$"):
        load_pipeline("owner/name")


@pytest.mark.parametrize("weights", ["nowhere", "./nowhere", "/nowhere/at/all"])
def test_a_missing_folder_is_named(weights):
    with pytest.raises(BenchError, match="nowhere.*no such folder"):
        load_pipeline(weights)


def test_another_architecture_is_named(folder):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(BenchError, match="expected a StableDiffusionPipeline, found StableDiffusionXL"):
        load_pipeline(folder)


def test_missing_and_broken_parts_are_named(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(BenchError, match="found none for vae"):
        load_pipeline(folder)
    (folder / "vae").mkdir()
    with pytest.raises(BenchError, match="does not load as a StableDiffusionPipeline") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(BenchError, match="not valid JSON"):
        load_pipeline(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(BenchError, match="expected a diffusers pipeline folder, found no model_index.json"):
        load_pipeline(folder)


def test_a_unet_goes_to_disk_and_back_and_into_plain_diffusers(tmp_path):
    unet = make_unet().to(memory_format=torch.channels_last)
    save_unet(unet, tmp_path / "iter1" / "unet")
    save_unet(unet, tmp_path / "iter1" / "unet")  # a second time replaces the first
    assert same(load_unet(tmp_path / "iter1" / "unet"), unet)
    assert same(UNet2DConditionModel.from_pretrained(tmp_path / "iter1", subfolder="unet"), unet)
    assert [path.name for path in (tmp_path / "iter1").iterdir()] == ["unet"]


def test_what_comes_from_a_file_predicts_the_same_to_the_last_bit(tmp_path):
    """Weights at another alignment, as safetensors leaves them, round differently in some of a CPU's kernels."""
    torch.manual_seed(0)
    unet, inputs = make_unet(), (torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.randn(1, 8, 16))
    save_unet(unet, tmp_path / "unet")
    loaded = load_unet(tmp_path / "unet")
    assert {weight.data_ptr() % 64 for weight in loaded.parameters()} == {0}
    with torch.no_grad():
        assert torch.equal(loaded(*inputs).sample, unet(*inputs).sample)


def test_a_unet_folder_of_something_else_is_named(tiny_pipeline_folder, tmp_path):
    with pytest.raises(BenchError, match="expected a UNet2DConditionModel, found AutoencoderKL"):
        load_unet(tiny_pipeline_folder / "vae")
    with pytest.raises(BenchError, match="no such folder"):
        load_unet(tmp_path / "unet")


def test_the_fingerprint_follows_the_weights(tiny_pipeline_folder, folder):
    assert weights_fingerprint(folder) == weights_fingerprint(tiny_pipeline_folder)
    unet = load_unet(folder / "unet")
    with torch.no_grad():
        next(unet.parameters()).add_(1)
    save_unet(unet, folder / "unet")
    assert weights_fingerprint(folder) != weights_fingerprint(tiny_pipeline_folder)
