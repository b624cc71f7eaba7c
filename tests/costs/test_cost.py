"""Counted operations against hand counts and the known figures of SD-1.5."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.costs.cost import flops, sampling_flops, training_flops, unet_flops, vae_flops


def test_a_matrix_product_counts_two_operations_per_term():
    assert flops(lambda: torch.zeros(3, 5) @ torch.zeros(5, 7)) == 2 * 3 * 5 * 7


def test_stable_diffusion_1_5():
    """0.803 TFLOP a UNet pass, 1.117 and 2.515 TFLOP to encode and decode, at 512x512 and 77 tokens."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    assert unet_flops(unet, (4, 64, 64), tokens=77) == pytest.approx(0.803e12, rel=1e-3)
    assert vae_flops(vae, (4, 64, 64)) == pytest.approx((1.117e12, 2.515e12), rel=1e-3)


def test_counting_equals_running(tiny_pipeline):
    """The weightless twin counts what the real model runs, and a backward pass is about two forward ones."""
    unet = copy.deepcopy(tiny_pipeline.unet)
    inputs = (torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 8, 16))
    forward = unet_flops(unet, (4, 8, 8), tokens=8)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention of the CPU is not counted
        assert forward == flops(lambda: unet(*inputs))
        both = flops(lambda: unet(*inputs).sample.sum().backward())
    assert both == pytest.approx(training_flops(forward, 1, paired=False, reference=False), rel=0.05)


def test_the_cost_of_a_pair_and_of_an_image():
    sft = training_flops(100, 1, paired=False, reference=False)
    dpo = training_flops(100, 1, paired=True, reference=True)
    assert (sft, dpo) == (300, 800)
    assert training_flops(100, 1, paired=True, reference=True, adapter=True) == 600
    assert sampling_flops(100, 7, 2, steps=10, guidance=1.0) == 2 * 1007
    assert sampling_flops(100, 7, 2, steps=10, guidance=3.0) == 2 * 2007
