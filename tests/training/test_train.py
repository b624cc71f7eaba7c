"""The one loop, run for real on a tiny UNet."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_unet
from train_tiny import METHODS, SCHEDULER, SETTINGS, make_data

from bench.errors import BenchError, UsageError
from bench.methods.diffusion_dpo import DiffusionDPO
from bench.methods.sft import SFT
from bench.methods.spin import SPIN
from bench.models import load_unet, save_unet
from bench.training.batches import TrainData, draw, flips, micro_batches, sample_order
from bench.training.denoising import predicted_noise
from bench.training.train import TrainSettings, train

LOG_2 = torch.tensor(2.0).log().item()  # log 2 as fp32 has it


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return make_unet()


@pytest.fixture(scope="module")
def data() -> TrainData:
    return make_data()


def run(base, method, data, accelerator, seed=0, scheduler=SCHEDULER, reference="base", **changes):
    """Train a copy of `base`; return it and the history."""
    policy = copy.deepcopy(base)
    frozen = copy.deepcopy(base) if method.needs_reference and reference == "base" else None
    settings = replace(SETTINGS, **changes)
    return policy, train(policy, frozen, method, data, settings, scheduler, seed, accelerator)


@contextmanager
def recorded_inputs() -> Iterator[list[tuple]]:
    """(noisy, timesteps, context) of every UNet call that trains, reference calls left out."""
    calls = []
    forward = UNet2DConditionModel.forward

    def spy(self, sample, timestep, encoder_hidden_states, **options):
        if torch.is_grad_enabled():
            calls.append((sample.clone(), timestep.clone(), encoder_hidden_states.clone()))
        return forward(self, sample, timestep, encoder_hidden_states=encoder_hidden_states, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", spy)
        yield calls


@contextmanager
def recorded_outputs() -> Iterator[set[torch.dtype]]:
    """The precisions in which UNets answered."""
    seen = set()
    forward = UNet2DConditionModel.forward

    def spy(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        seen.add(output.sample.dtype)
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", spy)
        yield seen


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", [DiffusionDPO(5000.0), SPIN(2000.0)])
def test_an_untrained_policy_has_loss_log_2_exactly(base, data, make_accelerator, precision, method):
    """Through the real loop, at a large beta that would show the last bit of a difference.

    accelerate knows no fp16 on a CPU, torch does: there its autocast is put around the whole loop.
    """
    half = precision == "fp16"
    accelerator = make_accelerator("no" if precision in ("fp32", "fp16") else precision)
    with torch.autocast("cpu", torch.float16, enabled=half), recorded_outputs() as seen:
        _, history = run(
            base,
            method,
            data,
            accelerator,
            steps=1,
            batch_size=7,
            micro_batch=3,
            precision="fp32" if half else precision,
        )
    row = history[0]
    assert row["loss"] == LOG_2
    assert (row["implicit_accuracy"], row["winner_drift"], row["loser_drift"]) == (0.5, 0, 0)
    assert (row["logit"], row["logit_std"]) == (0, 0)
    assert row["grad_norm"] > 0
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert seen == {dtypes[precision]}  # it did run in that precision, the policy and the reference alike


@pytest.mark.parametrize("method", [DiffusionDPO(500.0), SPIN(500.0)])
def test_winner_and_loser_share_noise_timestep_and_prompt(base, data, accelerator, method):
    """With both latents 0 a noisy latent is scaled noise alone, so the halves of a batch must be equal."""
    blank = replace(data, winners=np.zeros_like(data.winners), losers=np.zeros_like(data.losers))
    with recorded_inputs() as calls:
        run(base, method, blank, accelerator, steps=2)
    assert len(calls) == 4  # two steps of two micro-batches
    for tensors in calls:
        for tensor in tensors:
            winner, loser = tensor.chunk(2)
            assert torch.equal(winner, loser)
        assert tensors[0].std() > 0.1


def test_all_methods_with_one_seed_see_the_same_noise(base, data, accelerator):
    seen = []
    for method in (SFT(), DiffusionDPO(500.0), SPIN(500.0)):
        with recorded_inputs() as calls:
            run(base, method, data, accelerator, steps=3)
        rows = SETTINGS.micro_batch
        seen.append([tensor[:rows] for call in calls for tensor in call])
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"first_step": 100}])
def test_another_seed_and_a_later_iteration_see_other_noise(base, data, accelerator, changes):
    with recorded_inputs() as calls:
        run(base, SFT(), data, accelerator, steps=1)
        run(base, SFT(), data, accelerator, steps=1, **changes)
    assert not torch.allclose(calls[0][0], calls[2][0])


@pytest.mark.parametrize("method", [SFT(), DiffusionDPO(500.0)])
def test_micro_batch_does_not_change_the_gradient(base, data, accelerator, monkeypatch, method):
    gradients = []
    clip = accelerator.clip_grad_norm_

    def spy(parameters, norm):
        parameters = list(parameters)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip(parameters, norm)

    monkeypatch.setattr(accelerator, "clip_grad_norm_", spy)
    for micro_batch in (6, 1, 4):  # 4 leaves a remainder of 2
        run(base, method, data, accelerator, steps=1, batch_size=6, micro_batch=micro_batch)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6 * gradients[0].norm().item())


def test_the_gradient_is_that_of_the_mean_loss_over_the_batch(base, data, accelerator):
    """Against one plain autograd pass over the whole batch, with no loop around it."""
    _, history = run(base, SFT(), data, accelerator, steps=1)
    twin, alpha_bar = copy.deepcopy(base), SCHEDULER.alphas_cumprod
    samples = sample_order(0, 0, SETTINGS.batch_size, len(data))
    batch = next(
        micro_batches(
            data,
            samples,
            paired=False,
            seed=0,
            step=0,
            micro_batch=len(samples),
            alpha_bar=alpha_bar,
            prompt_dropout=SETTINGS.prompt_dropout,
        )
    )
    prediction = twin(batch.noisy, batch.timesteps, encoder_hidden_states=batch.context).sample
    loss = (batch.noise - prediction).square().mean()
    loss.backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in twin.parameters()]).norm()
    assert history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_training_learns(base, data, accelerator):
    _, history = run(base, SFT(), data, accelerator, steps=20, lr=1e-2, log_every=10, warmup_steps=2)
    assert history[1]["loss"] < 0.9 * history[0]["loss"]


def test_training_repeats_bit_for_bit(base, data, accelerator):
    one, two = (run(base, DiffusionDPO(500.0), data, accelerator, steps=3) for _ in range(2))
    assert same(one[0], two[0]) and one[1][0]["loss"] == two[1][0]["loss"]
    assert not same(one[0], base)


def test_preference_training_raises_the_accuracy_and_leaves_the_reference_alone(base, data, accelerator):
    reference, policy = copy.deepcopy(base), copy.deepcopy(base)
    settings = replace(SETTINGS, steps=12, lr=3e-3, log_every=4, first_step=60)
    history = train(policy, reference, DiffusionDPO(500.0), data, settings, SCHEDULER, 0, accelerator)
    assert history[-1]["implicit_accuracy"] > 0.7 and history[-1]["loss"] < LOG_2
    assert history[-1]["winner_drift"] < history[-1]["loser_drift"]
    assert [row["step"] for row in history] == [64, 68, 72]
    assert same(reference, base)


def test_the_log_is_a_mean_over_its_interval(base, data, accelerator):
    """Rows of one step each, averaged, are the rows of two; the last row covers what is left."""
    single = run(base, DiffusionDPO(500.0), data, accelerator, steps=5, log_every=1)[1]
    double = run(base, DiffusionDPO(500.0), data, accelerator, steps=5, log_every=2)[1]
    assert [row["step"] for row in double] == [2, 4, 5]
    for name in ("loss", "implicit_accuracy", "winner_drift", "loser_drift", "grad_norm"):
        values = [row[name] for row in single]
        expected = [np.mean(values[0:2]), np.mean(values[2:4]), values[4]]
        np.testing.assert_allclose([row[name] for row in double], expected, rtol=1e-6, atol=1e-12)


def test_sft_shows_the_winners_drift_when_given_a_reference(base, data, accelerator):
    settings = replace(SETTINGS, steps=3, log_every=1)
    twins = copy.deepcopy(base), copy.deepcopy(base)
    history = train(*twins, SFT(), data, settings, SCHEDULER, 0, accelerator)
    assert history[0]["winner_drift"] == 0 and history[2]["winner_drift"] != 0


def test_mixed_precision_leaves_no_wrapper_on_the_policy(base, data, make_accelerator, tmp_path):
    accelerator = make_accelerator("bf16")
    policy = copy.deepcopy(base)
    for first_step in (0, 1):  # two iterations with one accelerator, the second on the first one's policy
        settings = replace(SETTINGS, steps=1, first_step=first_step, precision="bf16")
        train(policy, copy.deepcopy(policy), SPIN(500.0), data, settings, SCHEDULER, 0, accelerator)
    assert policy.dtype == torch.float32 and "forward" not in vars(policy)
    save_unet(policy, tmp_path / "unet")
    assert same(load_unet(tmp_path / "unet"), policy)


def test_two_processes_equal_one(base, data, accelerator, tmp_path):
    """Ten steps of an uneven global batch (7 pairs: 3 and 4) over gloo, started as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), *sys.path]),
    }
    command = [sys.executable, str(tests / "train_tiny.py"), str(tmp_path)]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for method in METHODS:
        torch.manual_seed(0)
        alone, history = run(make_unet(), method, data, accelerator, steps=10, batch_size=7)
        together = load_unet(tmp_path / method.name)
        one, two = (torch.cat([p.detach().flatten() for p in unet.parameters()]) for unet in (alone, together))
        assert (one - two).norm() / one.norm() < 1e-6
        # the gradient's norm as well: clipping and Adam would hide a wrong scale from the weights
        logged = json.loads((tmp_path / method.name / "history.json").read_text())
        for name in ("step", "loss", "grad_norm", *(signal.name for signal in method.signals)):
            assert logged[0][name] == pytest.approx(history[0][name], rel=1e-4, abs=1e-7), (method.name, name)


@pytest.mark.parametrize("broken", ["lr", "data"])
def test_a_loss_that_is_not_finite_stops_with_one_line(base, data, accelerator, broken):
    changes = {"lr": 1e30, "steps": 3} if broken == "lr" else {"steps": 1}
    if broken == "data":
        data = replace(data, winners=np.full_like(data.winners, np.nan))
    with pytest.raises(BenchError, match=r"sft: loss became (nan|inf) in steps 1 to \d .*lower lr"):
        run(base, SFT(), data, accelerator, **changes)


def test_what_cannot_be_trained_is_refused(base, data, accelerator):
    alone = replace(data, losers=None)
    with pytest.raises(BenchError, match="no losers"):
        run(base, DiffusionDPO(1.0), alone, accelerator)
    with pytest.raises(BenchError, match="needs a reference"):
        run(base, DiffusionDPO(1.0), data, accelerator, reference=None)
    with pytest.raises(BenchError, match="float16.*mixed precision"):
        run(copy.deepcopy(base).half(), SFT(), data, accelerator)
    with pytest.raises(BenchError, match="precision is bf16, but the accelerator"):
        run(base, SFT(), data, accelerator, precision="bf16")
    with pytest.raises(BenchError, match="lora_rank is 4: the policy needs an adapter"):
        run(base, SFT(), data, accelerator, lora_rank=4)
    with pytest.raises(BenchError, match="its own reference"):
        policy = copy.deepcopy(base)
        train(policy, policy, DiffusionDPO(1.0), data, SETTINGS, SCHEDULER, 0, accelerator)
    with pytest.raises(UsageError, match="number of processes"):
        run(base, SFT(), data, accelerator, batch_size=0)
    with pytest.raises(BenchError, match="losers have shape"):
        replace(data, losers=data.losers[1:])
    with pytest.raises(BenchError, match="winners but"):
        TrainData(data.winners[1:], None, data.prompts)
    other = DDIMScheduler(prediction_type="sample")
    with pytest.raises(BenchError, match="prediction type 'sample'"):
        run(base, SFT(), data, accelerator, scheduler=other)


def test_v_prediction_is_turned_into_noise():
    """The v of Salimans & Ho 2022, as diffusers' scheduler defines it, gives back the very noise."""
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    latents, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 10, 500, 900, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(predicted_noise(velocity, noisy, alpha_bar, "v_prediction"), noise)
    assert predicted_noise(noise, noisy, alpha_bar, "epsilon") is noise


def test_noising_equals_the_diffusers_scheduler(data):
    samples = np.array([2, 0])
    batch = next(
        micro_batches(
            data,
            samples,
            paired=True,
            seed=3,
            step=4,
            micro_batch=2,
            prompt_dropout=0.0,
            alpha_bar=SCHEDULER.alphas_cumprod,
        )
    )
    latents = torch.from_numpy(np.concatenate([data.winners[samples], data.losers[samples]]))
    torch.testing.assert_close(batch.noisy, SCHEDULER.add_noise(latents, batch.noise, batch.timesteps))
    torch.testing.assert_close(batch.context, data.prompts.lookup(samples).repeat(2, 1, 1))


def test_learning_rate_warms_up_and_stays():
    settings = TrainSettings(steps=6, lr=1.0, batch_size=1, micro_batch=1, warmup_steps=4)
    assert [settings.learning_rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert replace(settings, warmup_steps=0).learning_rate(0) == 1


@given(st.integers(0, 2**40), st.integers(1, 30), st.integers(0, 60), st.integers(0, 60))
def test_the_order_is_shuffled_epochs_and_can_be_entered_anywhere(seed, size, start, count):
    order = sample_order(seed, 0, start + count, size)
    assert np.array_equal(sample_order(seed, start, count, size), order[start:])
    for epoch in range(len(order) // size):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.permutations(range(6)), st.integers(1, 6))
def test_a_draw_depends_on_seed_step_and_sample_alone(seed, step, order, keep):
    full = draw(seed, step, np.arange(6), (4, 2, 2), 1000, 0.5)
    some = draw(seed, step, np.array(order[:keep]), (4, 2, 2), 1000, 0.5)
    for place, sample in enumerate(order[:keep]):
        assert torch.equal(some.noise[place], full.noise[sample])
        assert some.timesteps[place] == full.timesteps[sample]
        assert some.dropped[place] == full.dropped[sample]


def test_draws_are_spread_as_they_should_be():
    draws = draw(0, 0, np.arange(2000), (4, 2, 2), 1000, 0.2)
    assert 0 <= draws.timesteps.min() < 10 and 990 <= draws.timesteps.max() <= 999
    assert abs(draws.timesteps.float().mean() - 499.5) < 20
    assert abs(draws.dropped.mean() - 0.2) < 0.03
    assert abs(draws.noise.std() - 1) < 0.01 and math.isclose(draws.noise.mean(), 0, abs_tol=0.02)
    assert not draw(0, 0, np.arange(50), (1,), 10, 0.0).dropped.any()
    assert draw(0, 0, np.arange(50), (1,), 10, 1.0).dropped.all()


def test_flips_mirror_winner_and_loser_together_and_depend_on_seed_step_and_sample_alone(data):
    """Stored as is and mirrored, here marked 0 and 1, a batch must take the same side of both halves."""
    marked = np.broadcast_to(np.arange(2.0).reshape(1, 2, 1, 1, 1), (10, 2, 4, 8, 8)).astype(np.float16)
    both = replace(data, winners=marked, losers=marked)
    samples = np.arange(10)

    def sides(seed: int, step: int, samples: np.ndarray = samples) -> np.ndarray:
        return both.latents(samples, True, seed, step)[:, 0, 0, 0]

    chosen = np.array([sides(0, step) for step in range(40)])
    assert chosen.dtype == np.float32
    np.testing.assert_array_equal(chosen[:, :10], chosen[:, 10:])
    np.testing.assert_array_equal(sides(0, 3)[:10], flips(0, 3, samples))
    np.testing.assert_array_equal(sides(0, 3, samples[[7, 2]])[:2], chosen[3, [7, 2]])
    assert 0.4 < chosen.mean() < 0.6 and len(np.unique(chosen[:, :10], axis=0)) > 30
    assert not np.array_equal(sides(1, 3), sides(0, 3))


def test_training_on_stored_rows_equals_training_on_arrays(base, data, accelerator):
    """Rows in several shards, as the cache keeps them, are the same data."""
    import bench.storage.shards as shards

    def rows(array: np.ndarray) -> shards.Rows:
        return shards.Rows([array[start : start + shards.SHARD] for start in range(0, len(array), shards.SHARD)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 3)
        stored = TrainData(rows(data.winners), rows(data.losers), data.prompts)
        one, _ = run(base, DiffusionDPO(500.0), stored, accelerator)
    other, _ = run(base, DiffusionDPO(500.0), data, accelerator)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
