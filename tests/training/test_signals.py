"""What is logged of a training, and what stops one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_unet
from torch.utils._python_dispatch import TorchDispatchMode
from train_tiny import SCHEDULER, SETTINGS, make_data

from bench.errors import BenchError
from bench.methods.base import Errors, Facts
from bench.methods.diffusion_dpo import DiffusionDPO
from bench.methods.sft import SFT
from bench.methods.signals import LOGIT, LOSER_DRIFT, WINNER_DRIFT
from bench.methods.spin import SPIN
from bench.reports.signals import ranges
from bench.training import signals
from bench.training.signals import PATIENCE, Broken, Signals, Watch
from bench.training.train import Loop, train

HEALTHY = {"step": 10, "loss": 0.6, "implicit_accuracy": 0.6, "winner_error": 0.2, "grad_norm": 1.0, "lr": 1e-5}


def test_the_drift_is_shown_by_timestep_in_columns_the_report_reads(accelerator):
    """Three pairs at timesteps 0, 249 and 999: the first quarter has two, the middle half none."""
    logged = Signals(accelerator, timesteps=1000, batch_size=3, paired=True, declared=[WINNER_DRIFT])
    logged.add("winner_drift", torch.tensor([0.5, -0.25]), torch.tensor([0, 249]))
    logged.add("winner_drift", torch.tensor([3.0]), torch.tensor([999]))
    logged.steps = 1
    row = logged.read(7, lr=0.1)
    assert (row["step"], row["lr"], row["winner_drift"]) == (7, 0.1, pytest.approx(3.25 / 3))
    assert ranges(row, "winner_drift") == {
        "winner_drift_t0_249": (0, 249),
        "winner_drift_t250_499": (250, 499),
        "winner_drift_t500_749": (500, 749),
        "winner_drift_t750_999": (750, 999),
    }
    assert (row["winner_drift_t0_249"], row["winner_drift_t750_999"]) == (0.125, 3.0)
    assert all(math.isnan(row[name]) for name in ("winner_drift_t250_499", "winner_drift_t500_749"))


@pytest.mark.parametrize("timesteps", [1000, 50, 10])
def test_ranges_of_timesteps_are_those_the_samples_are_sorted_into(accelerator, timesteps):
    for low, high in signals.bounds(timesteps):
        for timestep in (low, high):
            logged = Signals(accelerator, timesteps, batch_size=1, paired=True, declared=[LOSER_DRIFT])
            logged.add("loser_drift", torch.ones(1), torch.tensor([timestep]))
            logged.steps = 1
            assert logged.read(1, 0.0)[f"loser_drift_t{low}_{high}"] == 1
    assert signals.bounds(timesteps)[-1][1] == timesteps - 1


def test_the_spread_of_the_logit_is_that_of_all_pairs_of_the_interval(accelerator):
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    logged = Signals(accelerator, 1000, batch_size=4, paired=True, declared=[LOGIT])
    for step in logits:
        logged.add("logit", step, torch.zeros(4, dtype=torch.long))
        logged.steps += 1
    row = logged.read(3, 0.0)
    assert row["logit"] == pytest.approx(logits.double().mean().item(), rel=1e-12)
    assert row["logit_std"] == pytest.approx(np.std(logits.double().numpy()), rel=1e-9)


@pytest.mark.parametrize(("method", "images"), [(SFT(), 1), (DiffusionDPO(500.0), 2)])
def test_rates_count_pairs_and_images_and_mfu_what_the_card_could_do(accelerator, monkeypatch, method, images):
    monkeypatch.setattr(signals, "peak_rate", lambda accelerator: 4e9)
    torch.manual_seed(0)
    base = make_unet()
    reference = copy.deepcopy(base) if method.needs_reference else None
    row = train(
        base,
        reference,
        method,
        make_data(),
        replace(SETTINGS, steps=2),
        SCHEDULER,
        0,
        accelerator,
        flops_per_sample=1e6,
    )[0]
    assert row["images_per_s"] == images * row["pairs_per_s"] > 0
    assert row["mfu"] == pytest.approx(row["pairs_per_s"] * 1e6 / 4e9)
    assert math.isnan(row["peak_memory_gib"])


def test_the_peak_rate_is_that_of_the_card_at_the_precision_and_unknown_elsewhere(accelerator, monkeypatch):
    assert signals.peak_rate(accelerator) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    gpu = [SimpleNamespace(device=torch.device("cuda"), mixed_precision=kind) for kind in ("bf16", "no")]
    assert [signals.peak_rate(one) for one in gpu] == [312e12, 19.5e12]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other Card")
    assert signals.peak_rate(gpu[0]) is None


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number off a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}])
def test_a_step_reads_nothing_back(accelerator, changes):
    torch.manual_seed(0)
    base = make_unet()
    loop = Loop(
        base,
        copy.deepcopy(base),
        DiffusionDPO(500.0),
        make_data(),
        replace(SETTINGS, **changes),
        SCHEDULER,
        0,
        accelerator,
        None,
    )
    with Waits() as waits:
        loop.step(0)
        loop.step(1)
        assert waits.count == 0
        assert torch.ones(1).item() == 1 and waits.count == 1  # it does see one
    loop.log(1)
    assert 0 < loop.history[0]["loss"] < 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"loss": 1e-5, "implicit_accuracy": 1.0}, "nothing more is learned"),
        ({"loss": 8.0, "implicit_accuracy": 0.1}, "loss is above 6.9"),
        ({"winner_error": 2.5}, "answers with noise"),
    ],
)
def test_a_collapse_stops_only_when_it_lasts(row, said):
    def see(watch: Watch, *rows: dict) -> None:
        for number, changes in enumerate(rows):
            watch.see({**HEALTHY, **changes, "step": 10 * (number + 1)}, steps=10)

    with pytest.raises(Broken, match=f"spin: collapsed: .*{said}.*last 3 rows of the log to step 40 .*lower lr"):
        see(Watch(SPIN), {}, *[row] * PATIENCE)
    see(Watch(SPIN), {}, *[row] * (PATIENCE - 1), {}, *[row] * (PATIENCE - 1))
    see(Watch(SPIN, collapse=False), {}, *[row] * 9)
    watch = Watch(SPIN)
    see(watch, {}, row)
    assert not watch.calm
    see(watch, {})
    assert watch.calm


@pytest.mark.parametrize(
    "row",
    [
        {"loss": 0.0, "implicit_accuracy": 0.99},  # not every pair
        {"loss": 0.01, "implicit_accuracy": 1.0},  # every pair, but the loss still has a gradient
        {"loss": 5.0, "implicit_accuracy": 0.4},  # bad, and within what a high beta shows in passing
        {"winner_error": 1.5},
    ],
)
def test_what_is_merely_bad_is_let_alone(row):
    watch = Watch(SPIN)
    for _ in range(20):
        watch.see({**HEALTHY, **row}, steps=10)


def test_random_weights_may_begin_with_an_error_beyond_noise():
    watch = Watch(SFT)
    for error in (3.0, 2.9, 2.8, 2.7, 2.6, 1.0):
        watch.see({**HEALTHY, "winner_error": error}, steps=10)


def test_an_overflowing_gradient_stops_without_a_loss_scaler_and_is_skipped_with_one():
    with pytest.raises(Broken, match="sft: grad_norm became inf in steps 1 to 10"):
        Watch(SFT).see({**HEALTHY, "grad_norm": math.inf}, steps=10)
    Watch(SFT, scaled=True).see({**HEALTHY, "grad_norm": math.inf}, steps=10)


class Backwards(DiffusionDPO):
    """Prefers the losers, and pulls hard: the loss as it is logged explodes."""

    def loss(self, policy: Errors, reference: Errors | None, facts: Facts):
        wrong, _ = super().loss(Errors(policy.loser, policy.winner), Errors(reference.loser, reference.winner), facts)
        right, logged = super().loss(policy, reference, facts)
        return wrong + (right - wrong).detach(), logged


def test_a_training_that_diverges_is_stopped_by_its_own_signals(accelerator):
    torch.manual_seed(0)
    base = make_unet()
    settings = replace(SETTINGS, steps=40, lr=1e-2, log_every=1)
    with pytest.raises(BenchError, match=r"the loss is above 6.9.*last good checkpoint: none was written yet"):
        train(base, copy.deepcopy(base), Backwards(5000.0), make_data(), settings, SCHEDULER, 0, accelerator)
