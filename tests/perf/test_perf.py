"""The baseline is the published recipe, and the commands compare with it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import tiny_bench
import torch
from accelerate import Accelerator

from bench import perf, registry
from bench.commands import cli
from bench.costs import cost, memory
from bench.perf.baseline import Baseline, Recipe, preference_loss
from bench.perf.train import Setting, measure
from bench.training.train import Loop

PROMPTS = ["a red cat", "a cat"]


def pixels(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def make(pipeline, paired: bool, **changes) -> Baseline:
    return Baseline(pipeline, copy.deepcopy(pipeline.unet), Recipe(paired, 2, **changes))


def test_the_baselines_loss_by_hand():
    """Policy errors (0.1, 0.3), reference (0.2, 0.3): inside = -1000 * (-0.2 - -0.1) = 100; -log sigmoid(100) = 0."""
    loss = preference_loss(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.3]))
    assert loss.item() == pytest.approx(0, abs=1e-30)
    swapped = preference_loss(torch.tensor([0.2, 0.3]), torch.tensor([0.1, 0.3]))
    assert swapped.item() == pytest.approx(100, rel=1e-4)


def test_the_baseline_starts_at_log_2_and_trains(tiny_pipeline):
    baseline = make(tiny_pipeline, paired=True, lr=1e-3)
    before = baseline.policy.conv_out.weight.clone()
    assert baseline.step(pixels(1), pixels(2), PROMPTS) == pytest.approx(math.log(2), rel=1e-5)
    assert not torch.equal(baseline.policy.conv_out.weight, before)
    assert torch.equal(baseline.reference.conv_out.weight, before)
    assert all(weight.grad is None for weight in baseline.policy.parameters())


def test_the_baseline_does_the_recipes_work_and_no_other(tiny_pipeline):
    """A pair: two images through the VAE, a prompt through the text encoder, two rows through both UNets."""
    shape, tokens = (4, 8, 8), 8
    unet = cost.unet_flops(tiny_pipeline.unet, shape, tokens)
    trained = cost.unet_training_flops(tiny_pipeline.unet, shape, tokens)
    vae, text = cost.vae_flops(tiny_pipeline.vae, shape)[0], cost.text_flops(tiny_pipeline.text_encoder, tokens)
    pair = cost.flops(lambda: make(tiny_pipeline, paired=True).step(pixels(1), pixels(2), PROMPTS)) / 2
    image = cost.flops(lambda: make(tiny_pipeline, paired=False).step(pixels(1), None, PROMPTS)) / 2
    assert pair == pytest.approx(2 * (trained + unet + vae) + text, rel=1e-6)
    assert image == pytest.approx(trained + vae + text, rel=1e-6)


def test_measurements_take_turns_and_the_first_does_not_count():
    calls = []
    rates = perf.interleave(
        {"a": lambda: calls.append("a") or 1, "b": lambda: calls.append("b") or 1}, 2, torch.device("cpu"), ""
    )
    assert "".join(calls) == "ababab"
    assert [len(rates[name]) for name in "ab"] == [2, 2]


def test_ratios_are_taken_turn_by_turn():
    """2/1, 9/3 and 4/1: median 3, between 2 and 4; the ratio of the medians would have been 4."""
    row = perf.compared({"a": [2, 9, 4], "b": [1, 3, 1]}, "a", "b", "x")
    assert row == {"x": 4, "x_baseline": 1, "ratio": 3, "ratio_min": 2, "ratio_max": 4, "repeats": 3}


def test_perf_train(tiny_pipeline_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(perf.MATMUL, "cpu", 64)
    output = tmp_path / "train.csv"
    out = run(f"perf train --model {tiny_pipeline_folder} --batch-size 2 --repeats 2 --format json -o {output}", capsys)
    record = json.loads(out)
    assert [row["method"] for row in record["rows"]] == ["spin", "sft"]
    for row in record["rows"]:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["ratio_to_floor"] > 0
    first = output.read_text().splitlines()
    assert json.loads(first[0].removeprefix("# bench.protocol: ")) == record["protocol"]
    assert first[1].startswith("method,pairs_per_s,pairs_per_s_baseline,ratio,")
    assert record["protocol"]["device"].startswith("cpu")


def test_ours_goes_on_from_one_measurement_to_the_next_in_micro_batches_that_fit(tiny_pipeline_folder, monkeypatch):
    """Freeing the device's memory in between would charge ours with allocating it again, and the baseline not."""
    freed, steps = [], []
    step = Loop.step
    monkeypatch.setattr(Accelerator, "free_memory", lambda self, *_: freed.append(len(steps)))
    monkeypatch.setattr(Loop, "step", lambda self, number: steps.append(number) or step(self, number))
    monkeypatch.setitem(perf.MATMUL, "cpu", 64)
    fits = Setting(str(tiny_pipeline_folder), ("sft",), batch_size=4, steps=2, repeats=2)
    (row,) = measure(fits)["rows"]
    assert (freed, steps, row["micro_batch"]) == ([6], [0, 1, 2, 3, 4, 5], 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert measure(fits)["rows"][0]["micro_batch"] == 1


def test_perf_sample(tiny_pipeline_folder, capsys):
    out = run(f"perf sample --model {tiny_pipeline_folder} --images 2 --steps 2 --guidance 3 --repeats 2", capsys)
    assert "ratio_min" in out
    assert "guidance" in out


def test_perf_score(capsys, monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "gloom", tiny_bench.GLOOM)
    record = json.loads(run("perf score --metrics darkness,gloom --images 3 --repeats 2 --format json", capsys))
    assert [row["scorer"] for row in record["rows"]] == ["darkness", "gloom", "all 2"]
    assert all(row["ratio"] > 0 for row in record["rows"])


def run(line: str, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    return out
