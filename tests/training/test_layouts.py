"""Weights and moments in the memory layout that a GPU's convolutions want, and from one device to another."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from tiny import make_unet
from train_tiny import SCHEDULER, SETTINGS, make_data

from bench.methods.sft import SFT
from bench.methods.spin import SPIN
from bench.training import train as training
from bench.training.checkpoint import Checkpoints
from bench.training.recipe import TrainSettings, make_optimizer
from bench.training.train import Loop, train

CPU = torch.device("cpu")
LAYOUTS = (torch.channels_last, torch.contiguous_format)
SMALL = replace(SETTINGS, steps=3, batch_size=3, micro_batch=3)


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return make_unet()


def optimized(optimizer: str, layout: torch.memory_format) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A convolution's weights in a layout, and what trains them; large enough for bitsandbytes to use 8 bits."""
    made = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(made.to(memory_format=layout))
    return weight, make_optimizer([weight], TrainSettings(1, 0.01, 1, 1, optimizer=optimizer), CPU)


def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.grad = torch.empty_like(weight).copy_(gradient)  # autograd gives a gradient its weight's layout
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(("saved", "read"), [LAYOUTS, LAYOUTS[::-1]])
def test_a_state_saved_in_one_layout_goes_on_in_another(optimizer, saved, read):
    """Left with the strides it was saved with, the third step of fused AdamW was off by up to twice its size."""
    undisturbed, whole = optimized(optimizer, saved)
    for number in range(2):
        step(undisturbed, whole, number)
    state, (resumed, other) = copy.deepcopy(whole.state_dict()), optimized(optimizer, read)
    with torch.no_grad():
        resumed.copy_(undisturbed)
    other.load_state_dict(state)
    step(undisturbed, whole, 2)
    step(resumed, other, 2)
    assert resumed.stride() != undisturbed.stride()
    torch.testing.assert_close(resumed, undisturbed, rtol=0, atol=1e-7)


def test_8_bit_steps_leave_weights_channels_last():
    """bitsandbytes makes whatever it steps contiguous: every convolution after it would transpose its weights."""
    weight, optimizer = optimized("adamw8bit", torch.channels_last)
    plain, its = optimized("adamw8bit", torch.contiguous_format)
    for number in range(2):
        step(weight, optimizer, number)
        step(plain, its, number)
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        assert torch.equal(weight, plain)


def test_a_training_begun_channels_last_is_resumed_contiguous(base, accelerator, tmp_path, monkeypatch):
    """As when a GPU's checkpoint is gone on with on a processor; convolutions round otherwise, so not to the bit."""

    def go(layout, checkpoints=None, stop=False):
        policy = copy.deepcopy(base)
        monkeypatch.setattr(training, "place", lambda unet, device: unet.to(memory_format=layout).eval())
        settings = replace(SMALL, steps=4, lr=0.01)
        with monkeypatch.context() as patch:
            if stop:
                patch.setattr(Loop, "finish", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError) if stop else torch.enable_grad():
                train(policy, None, SFT(), make_data(), settings, SCHEDULER, 0, accelerator, checkpoints=checkpoints)
        return torch.cat([weight.detach().flatten() for weight in policy.parameters()])

    undisturbed = go(torch.contiguous_format)
    checkpoints = Checkpoints(tmp_path, "key", 3)
    go(torch.channels_last, checkpoints, stop=True)
    assert checkpoints.reached() == 3
    start = torch.cat([weight.flatten() for weight in base.parameters()])
    resumed = go(torch.contiguous_format, checkpoints)
    assert (resumed - undisturbed).norm() < 1e-3 * (undisturbed - start).norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_a_training_nothing_but_the_caller_holds_the_policy(base, make_accelerator, precision):
    """No cycle either: on a GPU it would keep weights, gradients and moments until Python looks for cycles."""
    accelerator = make_accelerator("no" if precision == "fp32" else precision)
    policy, reference = copy.deepcopy(base), copy.deepcopy(base)
    settings = replace(SMALL, precision=precision)
    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)  # accelerate looks for cycles at its end
            train(policy, reference, SPIN(500.0), make_data(), settings, SCHEDULER, 0, accelerator)
            held = [weakref.ref(model) for model in (policy, reference)]
            del policy, reference
            assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


def test_every_training_begins_with_a_loss_scale_of_its_own(base, accelerator):
    """fp16 needs a GPU, but a scaler does not: that of the last method had found its scale, or lost it."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-20)
    train(copy.deepcopy(base), None, SFT(), make_data(), SMALL, SCHEDULER, 0, accelerator)
    assert accelerator.scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale() == 2.0**16
