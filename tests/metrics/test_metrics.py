"""Scores against arithmetic written out here, on tiny random CLIPs in the published formats."""

from __future__ import annotations

import os
import shutil
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny import make_tokenizer
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.errors import BenchError
from bench.metrics.aesthetic import Aesthetic, build_head, read_state
from bench.metrics.base import to_rgb
from bench.metrics.clip import CLIPScore
from bench.metrics.clip_family import H14_REPOSITORY, ClipBackbone
from bench.metrics.pickscore import PickScore, PickScoreCosine
from bench.metrics.pixels import ShortestSide
from bench.metrics.sharing import even_batches, in_threads, pixel_batches, shared
from bench.scoring import evaluate

SIDE = 16
PROMPTS = ["a red cat", "at", "a red cat", "", "naïve 猫 " + 40 * "cat "]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def make_clip(folder: Path, seed: int, half: bool = False) -> Path:
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 12,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(
            CLIPConfig(
                text_config=shape | special,
                projection_dim=12,
                vision_config=shape | {"image_size": SIDE, "patch_size": 4},
            )
        )
        for weight in model.parameters():  # large weights, so that different inputs give different scores
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.3)
    (model.half() if half else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return folder


def make_head(path: Path, sizes: tuple[int, ...] = (12, 20, 8, 6, 4, 1)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    state = {}
    for place, (inputs, outputs) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        state[f"layers.{place}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"layers.{place}.bias"] = torch.randn(outputs, generator=generator)
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return state


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("weights") / "clip", seed=1)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Odd sizes, alpha, greyscale, palette."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    shapes = [(37, 53, 3), (64, 19, 4), (21, 33), (40, 40, 3), (SIDE, SIDE, 3)]
    made = [Image.fromarray(noise(*shape)) for shape in shapes]
    made[3] = made[3].quantize(16)
    return made


def reference_pixels(image: Image.Image, rgb_first: bool = True) -> np.ndarray:
    """CLIP's preprocessing from its description: shorter side to SIDE (bicubic), centre crop, normalise.

    transformers makes an image RGB before it is resized (rgb_first), CLIP's own code afterwards.
    """
    width, height = image.size
    short = min(width, height)
    size = (int(SIDE * width / short), int(SIDE * height / short))
    image = image.convert("RGB") if rgb_first else image
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC).convert("RGB"), np.float64)
    top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
    crop = pixels[top : top + SIDE, left : left + SIDE] / 255
    return ((crop - MEAN) / STD).transpose(2, 0, 1)


def reference_cosine(folder: Path, images: list[Image.Image], prompts: list[str], rgb_first: bool = True) -> np.ndarray:
    """One image and one prompt at a time through transformers' own forward."""
    model = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    out = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=12, return_tensors="pt")
        pixels = torch.from_numpy(reference_pixels(image, rgb_first)).float()[None]
        with torch.no_grad():
            logit = model(pixel_values=pixels, **tokens).logits_per_image.item()
        out.append(logit / model.logit_scale.exp().item())
    return np.array(out)


def test_preprocessing_is_clips_own(clip_folder, images):
    pixels = ClipBackbone.load(str(clip_folder), "clip").pixels(images)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels, np.stack([reference_pixels(image) for image in images]), atol=1e-6)


def test_alpha_is_dropped_not_blended():
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(clear_red).getpixel((0, 0)) == (255, 0, 0)


def test_clip_and_pickscore_match_one_at_a_time(clip_folder, images):
    expected = reference_cosine(clip_folder, images, PROMPTS, rgb_first=False)
    assert np.ptp(expected) > 0.1  # else agreement would prove nothing
    clip = CLIPScore.load(str(clip_folder), batch_size=2).score(images, PROMPTS)
    assert clip.dtype == np.float32 and clip.shape == (5,)
    np.testing.assert_allclose(clip, expected, rtol=1e-4, atol=1e-6)
    expected = reference_cosine(clip_folder, images, PROMPTS)
    pickscore = PickScore.load(str(clip_folder)).score(images, PROMPTS)
    scale = CLIPModel.from_pretrained(clip_folder).logit_scale.exp().item()
    np.testing.assert_allclose(pickscore, scale * expected, rtol=1e-4, atol=1e-5)
    cosine = PickScoreCosine.load(str(clip_folder))
    np.testing.assert_allclose(cosine.score(images, PROMPTS), expected, rtol=1e-4, atol=1e-6)
    assert cosine.info()["scale"] == "cosine times 1"


def test_arrays_and_pil_images_score_alike(clip_folder):
    array = np.random.default_rng(1).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    clip, prompts = CLIPScore.load(str(clip_folder)), PROMPTS[:3]
    as_pil = clip.score([Image.fromarray(image) for image in array], prompts)
    np.testing.assert_array_equal(clip.score(array, prompts), as_pil)
    with pytest.raises(BenchError, match="uint8"):
        clip.score(array / 255, prompts)


def test_nothing_to_score(clip_folder):
    assert CLIPScore.load(str(clip_folder)).score([], []).shape == (0,)


def test_every_prompt_is_embedded_once(clip_folder, monkeypatch):
    backbone, seen = ClipBackbone.load(str(clip_folder), "clip"), []
    encode = backbone._encode_texts
    monkeypatch.setattr(backbone, "_encode_texts", lambda prompts: seen.extend(prompts) or encode(prompts))
    embeddings = backbone.embed_texts(["a cat", "a red cat", "a cat"])
    assert seen == ["a cat", "a red cat"]
    torch.testing.assert_close(embeddings[0], embeddings[2], rtol=0, atol=0)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_equal_backbones_are_loaded_and_run_once(clip_folder, images, tmp_path, monkeypatch):
    make_head(tmp_path / "head.safetensors")
    clip = CLIPScore.load(str(clip_folder))
    aesthetic = Aesthetic.load(str(tmp_path / "head.safetensors"), backbone=str(clip_folder))
    backbone, seen = clip.backbone, []
    assert aesthetic.backbone is backbone
    encode = backbone._encode_images
    monkeypatch.setattr(backbone, "_encode_images", lambda batch: seen.append(len(batch)) or encode(batch))
    with shared():
        together = [metric.score(images, PROMPTS) for metric in (clip, aesthetic)]
    assert sum(seen) == len(images)
    alone = [metric.score(images, PROMPTS) for metric in (clip, aesthetic)]
    assert sum(seen) == 3 * len(images)  # outside the block nothing is remembered
    np.testing.assert_array_equal(together, alone)


def test_scorers_that_read_alike_share_pixels(clip_folder, images, tmp_path, monkeypatch):
    """Two checkpoints with equal image settings: every image is resized once, whatever the number of chunks."""
    shutil.copytree(clip_folder, tmp_path / "other")
    metrics = {
        name: type(name, (CLIPScore,), {"name": name}).load(str(folder))
        for name, folder in (("a", clip_folder), ("b", tmp_path / "other"))
    }
    assert metrics["a"].backbone is not metrics["b"].backbone
    alone = metrics["b"].score(images, PROMPTS)
    resized, read = [], ShortestSide.__call__
    monkeypatch.setattr(ShortestSide, "__call__", lambda self, batch: resized.append(len(batch)) or read(self, batch))
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    scores = evaluate.Scorers(metrics).score(images, PROMPTS)
    assert sum(resized) == len(images)
    np.testing.assert_allclose(scores["b"], alone, rtol=1e-5)


def test_pixels_made_in_threads_come_in_order_and_errors_come_through():
    def slow_first(batch):
        time.sleep(0.05 if batch[0] == 0 else 0)
        return torch.as_tensor(batch)

    pixels = list(pixel_batches(np.arange(7), slow_first, 2, "meta"))  # a device that has no data, like no other
    assert [len(batch) for batch in pixels] == [1, 2, 2, 2] and {batch.device.type for batch in pixels} == {"meta"}
    started = in_threads(slow_first, [np.arange(2), np.arange(2, 4), np.arange(4, 5)])
    assert [batch.result().tolist() for batch in started] == [[0, 1], [2, 3], [4]]
    with pytest.raises(BenchError, match="images must be uint8"):
        list(pixel_batches(np.zeros((3, 8, 8, 3)), ShortestSide(8), 2, "meta"))


@given(count=st.integers(0, 300), size=st.integers(1, 70))
def test_even_batches_hold_everything_in_order_and_differ_by_one_at_most(count, size):
    batches = even_batches(range(count), size)
    assert [item for batch in batches for item in batch] == list(range(count))
    sizes = {len(batch) for batch in batches}
    assert len(batches) == -(-count // size) and max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_head_in_laions_layout(tmp_path, suffix):
    """The released layout at its released sizes, against matrix products in float64."""
    path = tmp_path / f"head{suffix}"
    state = make_head(path, (768, 1024, 128, 64, 16, 1))
    x = nn.functional.normalize(torch.randn(4, 768, generator=torch.Generator().manual_seed(5)))
    expected = x.double().numpy()
    for place in (0, 2, 4, 6, 7):
        expected = (
            expected @ state[f"layers.{place}.weight"].double().numpy().T
            + state[f"layers.{place}.bias"].double().numpy()
        )
    head = build_head(read_state(path)).eval()
    np.testing.assert_allclose(head(x).detach(), expected, rtol=1e-4, atol=1e-5)
    # ... and against the module as LAION writes it.
    official = nn.Sequential(
        nn.Linear(768, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()
    official.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    torch.testing.assert_close(head(x), official(x), rtol=0, atol=0)


def test_aesthetic_reads_the_normalised_embedding(clip_folder, images, tmp_path):
    state = make_head(tmp_path / "head.pth")
    score = Aesthetic.load(str(tmp_path / "head.pth"), backbone=str(clip_folder)).score(images, PROMPTS)
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = torch.from_numpy(np.stack([reference_pixels(image, rgb_first=False) for image in images])).float()
    with torch.no_grad():
        x = model.get_image_features(pixels).pooler_output
    x = x / x.norm(dim=1, keepdim=True)
    for place in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    assert score.dtype == np.float32 and np.ptp(score) > 0.01
    np.testing.assert_allclose(score, x.squeeze(1), rtol=1e-4, atol=1e-5)


def test_released_aesthetic_head():
    root = os.environ.get("BENCH_WEIGHTS", "")
    path = Path(root) / "sac+logos+ava1-l14-linearMSE.pth"
    if not root or not path.is_file():
        pytest.skip("BENCH_WEIGHTS holds no sac+logos+ava1-l14-linearMSE.pth")
    head = build_head(read_state(path)).eval()
    layers = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == [768, 1024, 128, 64, 16, 1]
    x = nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)))
    ratings = head(x).detach()
    assert ratings.std() > 0.1 and -10 < ratings.mean() < 20


def test_half_precision_checkpoints_run_in_fp32(tmp_path):
    backbone = ClipBackbone.load(str(make_clip(tmp_path / "half", seed=2, half=True)), "clip")
    assert {value.dtype for value in backbone.model.parameters()} == {torch.float32}


def test_weights_are_found_through_bench_weights(clip_folder, images, tmp_path, monkeypatch):
    """A PickScore folder without tokenizer and image settings takes them from the CLIP it was tuned from."""
    bare, settings = tmp_path / "yuvalkirstain" / "PickScore_v1", tmp_path / H14_REPOSITORY
    shutil.copytree(clip_folder, settings)
    (settings / "model.safetensors").unlink()
    bare.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, bare)
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    scores = PickScore.load("yuvalkirstain/PickScore_v1").score(images, PROMPTS)
    np.testing.assert_array_equal(scores, PickScore.load(str(clip_folder)).score(images, PROMPTS))


def test_info_names_what_makes_scores_comparable(clip_folder, tmp_path):
    make_head(tmp_path / "head.pth")
    loaded = [
        CLIPScore.load(str(clip_folder)),
        PickScore.load(str(clip_folder)),
        Aesthetic.load(str(tmp_path / "head.pth"), backbone=str(clip_folder)),
    ]
    for metric in loaded:
        assert set(metric.info()) == {"version", "checkpoint", "scale", "preprocessing", "truncates", "precision"}
        assert "bicubic" in metric.info()["preprocessing"]
    assert loaded[0].info()["truncates"] == "prompts after 12 tokens"
    other = CLIPScore.load(str(make_clip(tmp_path / "other", seed=9)))
    digest = [metric.info()["checkpoint"].split("(")[1] for metric in (loaded[0], other)]
    assert digest[0] != digest[1]


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # its client waits minutes for a network
    with pytest.raises(BenchError) as error:
        CLIPScore.load("./nowhere/clip")
    assert "./nowhere/clip" in one_line(error) and str(tmp_path) in one_line(error)
    with pytest.raises(BenchError, match="improved-aesthetic-predictor"):
        Aesthetic.load("some/head.pth")

    def offline(*_: object, **__: object) -> None:
        raise OSError("cannot connect\nsecond line")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(BenchError) as error:
        PickScore.load("yuvalkirstain/PickScore_v1")
    assert "yuvalkirstain/PickScore_v1" in one_line(error) and "cannot connect" in one_line(error)


def test_incomplete_checkpoint_is_refused(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    model = CLIPModel.from_pretrained(clip_folder)
    state = {name: value for name, value in model.state_dict().items() if "visual_projection" not in name}
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BenchError, match=r"1 tensors missing, such as visual_projection\.weight"):
        CLIPScore.load(str(tmp_path / "clip"))


class Surprise:
    def __reduce__(self):
        return os.mkdir, (os.environ["SURPRISE"],)


def test_heads_that_are_not_heads(clip_folder, tmp_path, monkeypatch):
    make_head(tmp_path / "wide.pth", (13, 20, 8, 6, 4, 1))
    with pytest.raises(BenchError, match="13 numbers.* makes 12"):
        Aesthetic.load(str(tmp_path / "wide.pth"), backbone=str(clip_folder))
    torch.save({"weight": torch.zeros(1, 12)}, tmp_path / "other.pth")
    with pytest.raises(BenchError, match="not an aesthetic head.*weight"):
        Aesthetic.load(str(tmp_path / "other.pth"), backbone=str(clip_folder))
    monkeypatch.setenv("SURPRISE", str(tmp_path / "ran"))
    torch.save({"layers.0.weight": Surprise()}, tmp_path / "evil.pth")
    with pytest.raises(BenchError, match=r"evil\.pth"):
        Aesthetic.load(str(tmp_path / "evil.pth"), backbone=str(clip_folder))
    assert not (tmp_path / "ran").exists()


def test_counts_must_agree(clip_folder, images):
    with pytest.raises(BenchError, match="5 images but 2 prompts"):
        CLIPScore.load(str(clip_folder)).score(images, PROMPTS[:2])
