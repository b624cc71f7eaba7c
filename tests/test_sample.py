"""A sample belongs to its prompt and seed, and is what diffusers itself would have drawn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_pipeline, make_unet

from bench.cache import encode_images
from bench.errors import UsageError
from bench.sample import SCHEDULERS, initial_latents, latent_shape, sample, sample_batches
from bench.seeding import derive

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
        PROMPTS, guidance_scale=guidance, num_inference_steps=4, latents=initial_latents(keys, (4, 8, 8)),
        generator=[torch.Generator().manual_seed(derive("sample-steps", *key)) for key in keys],
        output_type="np").images
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
