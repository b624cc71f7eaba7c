"""The embedded default: its builder's loop, its tokenizer, and the weights that ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from bench.data import drawings, load_prompts, world
from bench.mini import MINI_WEIGHTS, denoiser, vae
from bench.mini.fit import fit
from bench.mini.text import MAX_LENGTH, build_tokenizer
from bench.models import load_pipeline
from bench.sampling.sample import sample

shipped = pytest.mark.skipif(not (MINI_WEIGHTS / "pipeline").exists(), reason="needs the bundled weights")


def regression(path: Path, stop: int | None = None, ema: float | None = 0.9) -> torch.Tensor:
    """Fit a linear map for 20 steps; with `stop` the process "dies" just before that step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()

    return fit(
        model, loss, steps=20, lr=0.1, checkpoint=path, description="test", warmup=2, ema=ema, checkpoint_every=6
    ).weight.detach()


def test_a_killed_fit_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = regression(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "killed.pt", stop=15)
    assert torch.equal(regression(tmp_path / "killed.pt"), whole)


def test_the_average_differs_from_the_last_weights(tmp_path):
    assert not torch.equal(regression(tmp_path / "a.pt"), regression(tmp_path / "b.pt", ema=None))


def test_the_tokenizer_has_a_token_for_every_word_and_bytes_for_the_rest():
    tokenizer = build_tokenizer()
    for name in ("test", "hard"):
        for prompt in load_prompts(f"world:{name}").prompts:
            tokens = tokenizer(prompt).input_ids
            assert len(tokens) == len(prompt.split()) + 2 <= MAX_LENGTH
    assert tokenizer.unk_token_id not in tokenizer("Zürich 😀!").input_ids[1:-1]
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_reconstruction_loss_worked_by_hand():
    """A black image with one white pixel of 16, reconstructed 0.1 too bright in red everywhere.

    target: -1 except +1 at one pixel, so the median colour is -1 and the weight is 1 + 3 * |x + 1| = 1, there 7:
    mean weight = (15 + 7) / 16 = 1.375. error = (0.1, 0, 0); mean over channels of |e| + 2 e^2 = (0.1 + 0.02) / 3 =
    0.04. chroma = (2/30, -1/30, -1/30): mean |c| = 4/90, mean 2 c^2 = 2 * (4 + 1 + 1) / 900 / 3 = 4/900.
    Pixels: 1.375 * 0.04 + 2 * 1.375 * (4/90 + 4/900) = 0.055 + 0.13444; edges: 0, the error is constant.
    """
    target = torch.full((1, 3, 4, 4), -1.0)
    target[:, :, 1, 1] = 1.0
    output = target.clone()
    output[:, 0] += 0.1
    assert vae.reconstruction_loss(output, target).item() == pytest.approx(0.055 + 2.75 * (4 / 90 + 4 / 900), rel=1e-5)


def test_psnr_of_one_grey_level():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    assert vae.psnr(images, images + 1) == pytest.approx(48.13, abs=0.01)


def test_the_denoiser_learns_to_predict_noise(tmp_path):
    items = [drawings.corpus(0, index) for index in range(8)]
    latents = np.random.default_rng(0).standard_normal((8, 4, 8, 8)).astype(np.float32)
    model = denoiser.train(
        latents,
        [item.caption for item in items],
        build_tokenizer(),
        tmp_path,
        seed=0,
        cycles=[(2, 1e-3), (1, 1e-3)],
        batch_size=4,
    )
    noise = model(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, MAX_LENGTH, dtype=torch.long))
    assert noise.shape == (1, 4, 8, 8) and noise.isfinite().all()


@shipped
def test_the_pipeline_is_small_and_shaped_like_stable_diffusion():
    folder = MINI_WEIGHTS / "pipeline"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    pipe = load_pipeline("mini")
    assert pipe.unet.dtype == torch.float32 and pipe.unet.config.sample_size == 8
    config = pipe.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps) == (
        "scaled_linear",
        0.00085,
        0.012,
        1000,
    )


@shipped
def test_the_autoencoder_keeps_clean_drawings():
    scenes = [drawings.corpus(99, index).asked for index in range(32)]
    clean = world.render(scenes, np.zeros((32, len(world.DEFECTS))), range(32))
    assert vae.psnr(clean, vae.roundtrip(load_pipeline("mini").vae, clean)) > 29


@shipped
def test_the_base_follows_its_prompts_and_leaves_room():
    """On validation prompts: most of what is asked is there, and samples are well below the training winners."""
    from bench.mini.judge import Judge

    prompts = list(load_prompts("world:validation", 48).prompts)
    images = sample(load_pipeline("mini"), prompts, guidance=3.0, steps=10, seeds=[1], batch_size=48)
    scores = Judge.load().score(images, prompts)
    winners = np.mean([drawings.pair(0, index).winner.aesthetics for index in range(200)])
    assert 0.65 < scores["alignment"].mean() < 0.95
    assert scores["aesthetics"].mean() < winners - 0.05


@shipped
def test_the_shipped_pipeline_samples_in_plain_diffusers():
    pipe = StableDiffusionPipeline.from_pretrained(MINI_WEIGHTS / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)
