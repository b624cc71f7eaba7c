"""Our scores against those of the published packages' own code (tests/golden/make_scorers.py), weights refilled here.

Everything goes through our loaders, from files in the published formats; only sizes are smaller than published.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.errors import BenchError
from bench.metrics import blip, imagereward
from bench.metrics.aesthetic import Aesthetic, AestheticV1
from bench.metrics.clip import CLIPScore, CLIPScoreL14
from bench.metrics.clip_family import TRANSFORMERS, ClipBackbone
from bench.metrics.hpsv2 import HPSv2, HPSv21
from bench.metrics.imagereward import ImageReward
from bench.metrics.open_clip_format import to_transformers
from bench.metrics.pickscore import PickScore, PickScoreCosine

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import inputs
from checkpoints import (
    STORED,
    filled,
    grid,
    imagereward_shapes,
    save_heads,
    save_imagereward,
    save_open_clip,
    save_pickscore,
)


def expected(name: str) -> np.ndarray:
    return np.array(STORED["scores"][name])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checkpoints, in the published formats."""
    root = tmp_path_factory.mktemp("golden")
    save_open_clip(root / "h14", "HPS_v2_compressed.pt", inputs.SMALL_CLIP)
    save_open_clip(root / "l14", "open_clip_pytorch_model.bin", inputs.SMALL_CLIP_L)
    save_pickscore(root / "pickscore", inputs.SMALL_CLIP)
    save_heads(root, inputs.SMALL_CLIP_L["embed_dim"])
    save_imagereward(root / "imagereward", inputs.SMALL_VIT, inputs.SMALL_MED)
    return root


def agree(found: np.ndarray, name: str, relative: float = 1e-4, absolute: float = 1e-6) -> None:
    wanted = expected(name)
    assert wanted.std(0).mean() > 50 * max(relative * abs(wanted).mean(), absolute)  # else nothing is shown
    np.testing.assert_allclose(found, wanted, rtol=relative, atol=absolute)


@pytest.mark.parametrize(("antialias", "name"), [(True, "hpsv2"), (False, "hpsv2_no_antialias")])
def test_hpsv2(root, antialias, name):
    metric = HPSv2.load(str(root / "h14" / "HPS_v2_compressed.pt"), antialias=antialias)
    agree(grid(metric), name)
    assert f"{'with' if antialias else 'without'} antialiasing" in metric.info()["preprocessing"]
    assert metric.info()["version"] == "HPS v2.0" and metric.info()["checkpoint"].startswith("HPS_v2_compressed.pt")


def test_the_two_resizes_of_hpsv2_differ():
    assert abs(expected("hpsv2") - expected("hpsv2_no_antialias")).max() > 1e-3


def test_clip_h14(root):
    agree(grid(CLIPScore.load(str(root / "h14" / "HPS_v2_compressed.pt"))), "clip")


def test_clip_l14(root):
    agree(grid(CLIPScoreL14.load(str(root / "l14" / "open_clip_pytorch_model.bin"))), "clip_l14")


def test_pickscore(root):
    agree(grid(PickScore.load(str(root / "pickscore"))), "pickscore", absolute=1e-5)
    scale = ClipBackbone.load(str(root / "pickscore"), "").logit_scale
    np.testing.assert_allclose(
        grid(PickScoreCosine.load(str(root / "pickscore"))) * scale, expected("pickscore"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("kind", "name"), [(Aesthetic, "aesthetic"), (AestheticV1, "aesthetic_v1")])
def test_aesthetic(root, kind, name):
    backbone = str(root / "l14" / "open_clip_pytorch_model.bin")
    metric = kind.load(str(root / f"{name}.pth"), backbone=backbone)
    pictures = inputs.pictures()
    agree(metric.score(pictures, [""] * len(pictures)), name)
    assert ("V1" in metric.info()["version"]) == (kind is AestheticV1)
    other = "aesthetic" if kind is AestheticV1 else "aesthetic_v1"
    with pytest.raises(BenchError, match="not (the linear|an) aesthetic head"):
        kind.load(str(root / f"{other}.pth"), backbone=backbone)


def test_imagereward(root):
    wanted = expected("imagereward")
    assert wanted.std(0).mean() > 0.3 and wanted.std(1).mean() > 0.3  # 300 times the tolerance
    for batch_size in (4, 6):
        metric = ImageReward.load(str(root / "imagereward"), batch_size=batch_size)
        np.testing.assert_allclose(grid(metric), wanted, rtol=0, atol=1e-3)


def test_imagerewards_head_is_fp32_under_autocast(root):
    """Half of a bf16 reward's bits are zeros; here the processor's autocast stands for the GPU's that scores run in."""
    metric = ImageReward.load(str(root / "imagereward"))
    plain = grid(metric)
    with torch.autocast("cpu", torch.bfloat16):
        rewards = torch.from_numpy(grid(metric))
    assert (rewards != rewards.bfloat16().float()).float().mean() > 0.9
    assert 0 < np.abs(rewards.numpy() - plain).max() < 0.5  # the encoders did run in bf16


def test_tokens_are_the_official_ones(root):
    """Also of prompts that are cut, and those that open_clip rewrites first (quotes, entities, full width)."""
    for style, path in (("open_clip", root / "h14" / "HPS_v2_compressed.pt"), ("transformers", root / "pickscore")):
        backbone = (HPSv2 if style == "open_clip" else PickScore).load(str(path)).backbone
        found = [
            backbone.tokenizer(backbone._read(prompt), truncation=True, max_length=77).input_ids
            for prompt in inputs.PROMPTS
        ]
        assert found == STORED["tokens"][style]
        assert backbone.count_truncated(inputs.PROMPTS) == 1
    metric = ImageReward.load(str(root / "imagereward"))
    found = [metric.tokenizer(prompt, truncation=True, max_length=35).input_ids for prompt in inputs.PROMPTS]
    assert found == STORED["tokens"]["bert"]
    assert metric.count_truncated(inputs.PROMPTS) == 1 and metric.info()["truncates"] == "prompts after 35 tokens"


def test_every_tensor_must_find_its_place(root, tmp_path):
    state = filled(imagereward_shapes(inputs.SMALL_VIT, inputs.SMALL_MED))
    config = blip.TextConfig(4)
    imagereward.build(dict(state), config)
    for name in ("mlp.layers.7.bias", "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"):
        with pytest.raises(BenchError, match="not an ImageReward checkpoint"):
            imagereward.build({key: value for key, value in state.items() if key != name}, config)
    with pytest.raises(BenchError, match="not an ImageReward checkpoint.*surprise"):
        imagereward.build({**state, "blip.surprise": torch.zeros(1)}, config)
    path = save_open_clip(tmp_path, "HPS_v2_compressed.pt", inputs.SMALL_CLIP)
    stored = torch.load(path, weights_only=True)["state_dict"]
    del stored["visual.ln_pre.bias"]
    torch.save({"state_dict": stored}, path)
    with pytest.raises(BenchError, match=r"HPS_v2_compressed\.pt does not fit.*pre_layrnorm\.bias"):
        HPSv2.load(str(path))
    assert "left.over" in to_transformers({"left.over": torch.zeros(1)})


def test_missing_files_are_named_with_size_and_place(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    for kind, parts in (
        (HPSv21, ("HPS_v2.1_compressed.pt", "3.9 GB", "xswu/HPSv2")),
        (ImageReward, ("ImageReward.pt", "1.8 GB", "THUDM/ImageReward")),
    ):
        with pytest.raises(BenchError) as error:
            kind.load("official")
        assert all(part in str(error.value) for part in (*parts, str(tmp_path), "no connection"))
        assert "\n" not in str(error.value)


def test_published_files_are_found_in_bench_weights(root, monkeypatch):
    monkeypatch.setenv("BENCH_WEIGHTS", str(root / "h14"))
    metric = HPSv2.load("official")
    assert metric.backbone.checkpoint.startswith("HPS_v2_compressed.pt") and metric.backbone.reading != TRANSFORMERS


def test_nothing_to_score(root):
    assert ImageReward.load(str(root / "imagereward")).score([], []).shape == (0,)


def test_official_packages_are_not_needed():
    missing = {"hpsv2", "open_clip", "torchvision", "clip", "timm"} & set(sys.modules)
    assert not missing or os.environ.get("BENCH_ALLOW_OFFICIAL")
