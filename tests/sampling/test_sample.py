"""A sample belongs to its prompt and seed, and is what diffusers itself would have drawn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_pipeline, make_unet

from bench.errors import BenchError, UsageError
from bench.runtime.seeding import derive
from bench.sampling import sample as sampling
from bench.sampling.sample import SCHEDULERS, initial_latents, latent_shape, sample, sample_batches
from bench.storage.cache import encode_images

PROMPTS = ["a red cat", "dog", "two birds", "a tree"]
PIPE = make_pipeline()


@pytest.fixture(scope="module", params=SCHEDULERS)
def scheduler(request) -> str:
    return request.param


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equal_to_diffusers_own_call(scheduler, guidance):
    pipe = copy.deepcopy(PIPE)
    ours = sample(PIPE, PROMPTS, guidance=guidance, steps=4, seeds=[7], scheduler=scheduler)
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler.config)
    keys = [(7, prompt) for prompt in PROMPTS]
    theirs = pipe(
        PROMPTS,
        guidance_scale=guidance,
        num_inference_steps=4,
        latents=initial_latents(keys, (4, 8, 8)),
        generator=[torch.Generator().manual_seed(derive("sample-steps", *key)) for key in keys],
        output_type="np",
    ).images
    assert ours.dtype == np.uint8 and ours.shape == (4, 64, 64, 3)
    assert np.abs(ours.astype(int) - np.round(theirs * 255)).max() <= 1
    assert ours.std() > 5  # a flat image would compare equal too easily


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_change_a_sample(scheduler, batch_size):
    options = {"guidance": 3.0, "steps": 3, "seeds": [1, 2], "scheduler": scheduler}
    latents = sample(PIPE, PROMPTS, batch_size=8, output="latents", **options)
    assert latents.dtype == np.float32
    again = sample(PIPE, PROMPTS, batch_size=batch_size, output="latents", **options)
    np.testing.assert_allclose(again, latents, atol=1e-4)
    images = sample(PIPE, PROMPTS, batch_size=8, **options).astype(int)
    assert np.abs(images - sample(PIPE, PROMPTS, batch_size=batch_size, **options)).max() <= 1


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(len(PROMPTS))), st.integers(1, 4), st.permutations([5, 6]))
def test_neither_order_nor_company_changes_a_sample(order, keep, seeds):
    options = {"guidance": 3.0, "steps": 2, "batch_size": 3, "output": "latents"}
    full = sample(PIPE, PROMPTS, seeds=[5, 6], **options).reshape(4, 2, 4, 8, 8)
    some = sample(PIPE, [PROMPTS[row] for row in order[:keep]], seeds=seeds, **options)
    for place, row in enumerate(order[:keep]):
        for column, seed in enumerate(seeds):
            np.testing.assert_allclose(some[place * 2 + column], full[row, [5, 6].index(seed)], atol=1e-4)


def test_other_seeds_and_other_prompts_give_other_samples():
    latents = sample(PIPE, PROMPTS[:2], guidance=1.0, steps=2, seeds=[1, 2], output="latents")
    distances = np.abs(latents[:, None] - latents[None]).mean(axis=(2, 3, 4))
    assert (distances[~np.eye(4, dtype=bool)] > 0.1).all()


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (3.0, 4), (0.0, 4)])
def test_guidance_of_one_costs_a_single_pass(guidance, rows):
    seen = []
    hook = PIPE.unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    sample(PIPE, PROMPTS[:2], guidance=guidance, steps=3, seeds=[1])
    hook.remove()
    assert seen == [rows] * 3


def test_the_network_gets_its_timesteps_from_the_device_and_the_solver_from_the_processor(scheduler, monkeypatch):
    """On a device without data: whatever would have to wait for it fails there."""
    unet, seen = make_unet().to("meta"), []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(("network", inputs[1].device.type)))
    solver = SCHEDULERS[scheduler](PIPE.scheduler.config)
    step = solver.step
    monkeypatch.setattr(solver, "step", lambda *a, **k: seen.append(("solver", a[1].device.type)) or step(*a, **k))
    context = torch.zeros(2, 8, 16, device="meta")
    made = sampling._denoise(unet, solver, context, context[0], [(1, "a"), (2, "b")], 3.0, 2)
    assert made.device.type == "meta" and made.shape == (2, 4, 8, 8)
    assert set(seen) == {("network", "meta"), ("solver", "cpu")}


def test_another_unet_can_stand_in():
    torch.manual_seed(1)
    unet = make_unet()
    options = {"guidance": 3.0, "steps": 2, "seeds": [1], "output": "latents"}
    replaced = copy.copy(PIPE)
    replaced.unet = unet
    ours = sample(PIPE, PROMPTS, unet=unet, **options)
    np.testing.assert_array_equal(ours, sample(replaced, PROMPTS, **options))
    assert np.abs(ours - sample(PIPE, PROMPTS, **options)).max() > 0.1


def test_half_precision_models_keep_fp32_latents():
    pipe = copy.deepcopy(PIPE).to(torch.bfloat16)
    options = {"guidance": 3.0, "steps": 3, "seeds": [1], "output": "latents"}
    latents = sample(pipe, PROMPTS, **options)
    assert latents.dtype == np.float32
    assert np.abs(latents - sample(PIPE, PROMPTS, **options)).mean() < 0.1


def test_the_round_trip_goes_through_images_of_eight_bits():
    options = {"guidance": 1.0, "steps": 2, "seeds": [1]}
    images = sample(PIPE, PROMPTS, **options)
    recoded = sample(PIPE, PROMPTS, output="roundtrip", **options)
    np.testing.assert_array_equal(recoded, encode_images(PIPE.vae, lambda rows: images[rows], len(PROMPTS)))
    latents = sample(PIPE, PROMPTS, output="latents", **options)
    assert recoded.shape == latents.shape and np.abs(recoded - latents).max() > 0.1


def test_batches_come_one_by_one():
    batches = sample_batches(PIPE, PROMPTS, guidance=1.0, steps=1, seeds=[1, 2], batch_size=3)
    assert [len(batch) for batch in batches] == [3, 3, 2]


def test_latent_shape_of_a_wide_unet():
    assert latent_shape(make_unet(sample_size=(4, 8))) == (4, 4, 8)


def test_an_unknown_scheduler_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="'dim' .did you mean 'ddim'.*ddim, pndm, ddpm"):
        sample(PIPE, PROMPTS, guidance=1.0, steps=1, seeds=[1], scheduler="dim")


def broken(part: str, value: float):
    """The pipeline with one bias of its UNet, or all of its VAE's last ones, not finite."""
    pipe = copy.deepcopy(PIPE)
    bias = pipe.unet.conv_in.bias if part == "UNet" else getattr(pipe.vae, part).conv_out.bias
    with torch.no_grad():
        bias[0 if part == "UNet" else slice(None)] = value
    return pipe


@pytest.mark.parametrize("output", ["images", "latents", "roundtrip"])
def test_a_unet_with_one_nan_makes_no_black_images(output):
    with pytest.raises(BenchError) as caught:
        sample(broken("UNet", torch.nan), PROMPTS, guidance=3.0, steps=2, seeds=[7], output=output, name="sft 1")
    assert str(caught.value).startswith(
        "sft 1: what its UNet makes of 'a red cat' (seed 7, guidance 3) is not finite, as of 4 of 4 in the batch; "
    )
    assert "\n" not in str(caught.value)


def test_an_infinite_vae_makes_no_white_images():
    pipe, options = broken("decoder", torch.inf), {"guidance": 1.0, "steps": 2, "seeds": [7]}
    with pytest.raises(BenchError, match="^model: what its VAE makes of 'a red cat' .seed 7, guidance 1. is not"):
        sample(pipe, PROMPTS, **options)
    assert np.isfinite(sample(pipe, PROMPTS, output="latents", **options)).all()
    with pytest.raises(BenchError, match="what its VAE makes"):
        sample(broken("encoder", torch.nan), PROMPTS, output="roundtrip", **options)


def test_the_first_row_that_is_not_finite_is_named(monkeypatch):
    denoise = sampling._denoise

    def spoilt(*arguments):
        latents = denoise(*arguments).clone()
        latents[[2, 3], 0, 0, 0] = torch.inf
        return latents

    monkeypatch.setattr(sampling, "_denoise", spoilt)
    with pytest.raises(BenchError, match="its UNet makes of 'dog' .seed 5, .* as of 2 of 4 in the batch"):
        sample(PIPE, PROMPTS[:2], guidance=1.0, steps=2, seeds=[5, 6])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"guidance": float("inf")}, "guidance must be a finite number, got inf"),
        ({"steps": 1001}, "1001 steps: the model has 1000 timesteps"),
    ],
)
def test_what_a_solver_cannot_do_is_refused_before_it_begins(options, said):
    with pytest.raises(UsageError, match=said):
        sample(PIPE, PROMPTS, **{"guidance": 1.0, "steps": 1, "seeds": [1], **options})


def test_guidance_below_one_leans_towards_the_empty_prompt_and_zero_is_it():
    """n + g (c - n); diffusers' own pipelines would switch guidance off."""
    options = {"steps": 1, "seeds": [1], "output": "latents"}
    empty, half, whole = (sample(PIPE, ["dog"], guidance=g, **options) for g in (0.0, 0.5, 1.0))
    assert np.abs(whole - empty).max() > 1e-3
    np.testing.assert_allclose(half, (empty + whole) / 2, atol=1e-4)  # one DDIM step is linear in the prediction


class Compiled(torch.nn.Module):
    """Stands in for what torch.compile returns; its answers are off by a factor."""

    def __init__(self, wrapped, factor=1.0):
        super().__init__()
        self.wrapped, self.factor, self.calls = wrapped, factor, 0

    def forward(self, *arguments, **options):
        self.calls += 1
        output = self.wrapped(*arguments, **options)
        output.sample = output.sample * self.factor
        return output


def test_compiled_the_sampler_makes_the_same_images_and_leaves_no_wrapper(monkeypatch):
    made, passes = [], []
    monkeypatch.setattr(torch, "compile", lambda unet: made.append(Compiled(unet)) or made[-1])
    options = {"guidance": 3.0, "steps": 3, "output": "latents"}
    hook = PIPE.unet.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    compiled = sampling.Sampler(PIPE, compile=True, **options)
    rows = sampling.keys(PROMPTS, [1])
    found = [compiled(rows), compiled(rows[:3])]
    hook.remove()
    assert made[0].wrapped is PIPE.unet and made[0].calls == 6
    assert passes == [8] * 4 + [6] * 3  # one pass more, the first, to compare with
    plain = sampling.Sampler(PIPE, **options)
    assert len(made) == 1
    np.testing.assert_array_equal(found[0], plain(rows))
    np.testing.assert_array_equal(found[1], plain(rows[:3]))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_compiler_with_wrong_answers_is_refused_in_the_first_step(monkeypatch, factor):
    monkeypatch.setattr(torch, "compile", lambda unet: Compiled(unet, factor))
    sampler = sampling.Sampler(PIPE, guidance=1.0, steps=2, compile=True)
    with pytest.raises(UsageError, match="wrongly for a cpu: its output is (1|nan)% off; set opponent.compile=false"):
        sampler([(1, "a red cat")])


@pytest.mark.slow
def test_compiled_for_real_samples_are_the_same_up_to_rounding():
    """Two sizes of batches; a minute of compiling."""
    options = {"guidance": 3.0, "steps": 3, "output": "latents"}
    rows = sampling.keys(PROMPTS, [1])
    compiled, plain = (sampling.Sampler(PIPE, compile=compile, **options) for compile in (True, False))
    for batch in (rows, rows[:3]):
        np.testing.assert_allclose(compiled(batch), plain(batch), atol=1e-3)
