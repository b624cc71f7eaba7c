"""A training that a half precision cannot show is said to be one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny_bench
import torch
from tiny import make_unet

from bench.experiment import Experiment
from bench.models import load_unet, save_unet
from bench.models.rounding import movement, warning
from bench.shared import Shared
from bench.storage import runs
from bench.suites import load_suite


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start") / "unet"
    save_unet(filled(lambda weight: 0.02 * torch.randn_like(weight)), folder)
    return folder


def filled(value) -> torch.nn.Module:
    unet = make_unet()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.copy_(value(weight))
    return unet


def moved(start: Path, folder: Path, distance: float) -> Path:
    """The UNet a random step away, each weight by `distance` up or down."""
    unet = load_unet(start)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in unet.parameters():
            weight += distance * (2 * torch.randint(0, 2, weight.shape, generator=generator) - 1)
    save_unet(unet, folder)
    return folder


def test_by_hand(tmp_path):
    """bf16 has 1 and 1 + 2^-7 and nothing between: 1 + 2^-9 is shown as 1, all of the step missing; 1 + 3/4 2^-7 as
    1 + 2^-7, a third of the step too much. fp16 has them both."""
    ones, little, more = (filled(lambda _, step=step: torch.tensor(1 + step)) for step in (0, 2**-9, 0.75 * 2**-7))
    for name, unet in (("ones", ones), ("little", little), ("more", more)):
        save_unet(unet, tmp_path / name)
    half = movement(tmp_path / "ones", tmp_path / "little", torch.bfloat16)
    assert half == pytest.approx((2**-9, 2**-9))
    assert movement(tmp_path / "ones", tmp_path / "more", torch.bfloat16) == pytest.approx((0.75 * 2**-7, 0.25 * 2**-7))
    assert movement(tmp_path / "ones", tmp_path / "little", torch.float16) == pytest.approx((2**-9, 0))
    assert warning("it", tmp_path / "ones", tmp_path / "little", "bf16")
    assert warning("it", tmp_path / "ones", tmp_path / "more", "bf16") is None
    assert warning("it", tmp_path / "ones", copy.copy(tmp_path / "ones"), "bf16") is None  # it did not move


@pytest.mark.parametrize(
    ("distance", "precision", "told"),
    [(5e-6, "bf16", True), (5e-6, "fp16", True), (5e-6, "fp32", False), (1e-3, "bf16", False), (1e-4, "fp16", False)],
)
def test_the_papers_smallest_steps_are_below_half_precision_and_usual_ones_are_not(
    start, tmp_path, distance, precision, told
):
    said = warning("SPIN 3", start, moved(start, tmp_path / "unet", distance), precision)
    assert (said is not None) == told
    if told:
        assert (
            said.startswith("SPIN 3: training moved its weights by 5.0e-06") and f"rounding them to {precision}" in said
        )
        assert said.endswith("set model.dtype=fp32" if precision == "fp16" else "set model.dtype=fp16 or fp32")


@pytest.mark.parametrize(("lr", "told"), [("1e-8", True), ("1e-1", False)])
def test_a_run_says_so_where_its_numbers_are_read(tiny_pipeline_folder, tmp_path, monkeypatch, darkness, lr, told):
    tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)
    monkeypatch.chdir(tmp_path)
    settings = ["model.dtype=bf16", f"methods.sft.iterations.0.lr={lr}", "evaluation.prompt_sets.test.limit=1"]
    shared = Shared(load_suite("tiny.yaml", settings))
    run = runs.create("sft", shared.suite, 0, 1)
    Experiment(run, shared).stages(lambda *scalar: None)
    record = json.loads((run.folder / "protocol.json").read_text())
    found = [text for text in record["warnings"] if "rounding" in text]
    assert len(found) == told and all(text.startswith(run.results[0].title) for text in found)
    assert record["processes"][0]["tf32"] == {"matmul": False, "convolution": False}
