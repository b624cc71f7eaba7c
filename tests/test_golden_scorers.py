"""Our scores against those of the published packages' own code (tests/golden/make_scorers.py), weights refilled here.

Everything goes through our loaders, from files in the published formats; only sizes are smaller than published.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.errors import BenchError
from metrics import blip, imagereward
from metrics.aesthetic import Aesthetic, AestheticV1, head_layers
from metrics.clip import CLIPScore, CLIPScoreL14
from metrics.clip_family import TRANSFORMERS, ClipBackbone
from metrics.hpsv2 import HPSv2, HPSv21
from metrics.imagereward import ImageReward
from metrics.open_clip_format import clip_config, to_transformers
from metrics.pickscore import PickScore, PickScoreCosine

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import inputs  # noqa: E402

STORED = json.loads((GOLDEN / "scorers.json").read_text())
IMAGEREWARD_GAIN = 1.6


def expected(name: str) -> np.ndarray:
    return np.array(STORED["scores"][name])


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer as far as the golden prompts need it, with the published numbers."""
    merges = [tuple(pair) for pair in STORED["vocabulary"]["merges"]]
    return CLIPTokenizer(vocab=STORED["vocabulary"]["clip"], merges=merges, model_max_length=77)


def open_clip_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an open_clip CLIP's tensors."""
    vision, text, joint = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    wide, narrow, patch = vision["width"], text["width"], vision["patch_size"]
    shapes = {"positional_embedding": (77, narrow), "text_projection": (narrow, joint), "logit_scale": (),
              "visual.class_embedding": (wide,), "visual.proj": (wide, joint),
              "visual.positional_embedding": ((224 // patch) ** 2 + 1, wide),
              "visual.conv1.weight": (wide, 3, patch, patch), "token_embedding.weight": (49408, narrow)}
    for norm, width in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", narrow)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for prefix, width, layers in (("visual.", wide, vision["layers"]), ("", narrow, text["layers"])):
        for block in (f"{prefix}transformer.resblocks.{index}." for index in range(layers)):
            for part, sizes in {"ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width),
                                "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}.items():
                shapes |= {f"{block}{part}.weight": sizes, f"{block}{part}.bias": sizes[:1]}
            shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
    return shapes


def filled(shapes: dict[str, tuple[int, ...]], gain: float = 1.0) -> dict[str, torch.Tensor]:
    return inputs.fill({name: torch.empty(shape) for name, shape in shapes.items()}, gain)


def save_open_clip(folder: Path, name: str, config: dict) -> Path:
    """A checkpoint as HPS v2 publishes it, with its configuration and tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "state_dict": filled(open_clip_shapes(config))}, folder / name)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    clip_tokenizer().save_pretrained(folder)
    return folder / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All checkpoints, in the published formats."""
    root = tmp_path_factory.mktemp("golden")
    save_open_clip(root / "h14", "HPS_v2_compressed.pt", inputs.SMALL_CLIP)
    save_open_clip(root / "l14", "open_clip_pytorch_model.bin", inputs.SMALL_CLIP_L)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value
                  in CLIPModel(clip_config(inputs.SMALL_CLIP, 49407)).state_dict().items()}
    model = CLIPModel(CLIPConfig.from_dict(clip_config(inputs.SMALL_CLIP, 49407).to_dict()))
    model.load_state_dict(filled(shapes))
    model.save_pretrained(root / "pickscore")
    clip_tokenizer().save_pretrained(root / "pickscore")
    CLIPImageProcessorPil().save_pretrained(root / "pickscore")
    heads = {"aesthetic.pth": {f"layers.{name}": tuple(value.shape) for name, value
                               in head_layers((48, 1024, 128, 64, 16, 1)).state_dict().items()},
             "aesthetic_v1.pth": {"weight": (1, 48), "bias": (1,)}}
    for name, shapes in heads.items():
        torch.save(filled(shapes, 3.0), root / name)
    save_imagereward(root / "imagereward")
    return root


def save_imagereward(folder: Path) -> None:
    """ImageReward.pt with all that the published file holds, med_config.json, and BERT's words."""
    folder.mkdir()
    (folder / "med_config.json").write_text(json.dumps(inputs.SMALL_MED))
    torch.save(filled(imagereward_shapes(), IMAGEREWARD_GAIN) | {imagereward.POSITIONS: torch.arange(512)[None]},
               folder / "ImageReward.pt")
    BertTokenizer(vocab=STORED["vocabulary"]["bert"], model_max_length=512).save_pretrained(folder)


def imagereward_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the small ImageReward's tensors."""
    wide, text, hidden = inputs.SMALL_VIT["embed_dim"], inputs.SMALL_MED["hidden_size"], 192
    linear = {"blip.vision_proj": (256, wide), "blip.text_proj": (256, text)}
    norms = {"blip.visual_encoder.norm": wide, "blip.text_encoder.embeddings.LayerNorm": text}
    for place, (inner, outer) in zip((0, 2, 4, 6, 7), ((text, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)),
                                     strict=True):
        linear[f"mlp.layers.{place}"] = (outer, inner)
    for index in range(inputs.SMALL_VIT["depth"]):
        block = f"blip.visual_encoder.blocks.{index}."
        linear |= {f"{block}attn.qkv": (3 * wide, wide), f"{block}attn.proj": (wide, wide),
                   f"{block}mlp.fc1": (4 * wide, wide), f"{block}mlp.fc2": (wide, 4 * wide)}
        norms |= {f"{block}norm1": wide, f"{block}norm2": wide}
    for index in range(inputs.SMALL_MED["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{index}."
        for kind, context in (("attention", text), ("crossattention", wide)):
            linear |= {f"{layer}{kind}.self.query": (text, text), f"{layer}{kind}.self.key": (text, context),
                       f"{layer}{kind}.self.value": (text, context), f"{layer}{kind}.output.dense": (text, text)}
            norms[f"{layer}{kind}.output.LayerNorm"] = text
        linear |= {f"{layer}intermediate.dense": (hidden, text), f"{layer}output.dense": (text, hidden)}
        norms[f"{layer}output.LayerNorm"] = text
    shapes = {"blip.visual_encoder.cls_token": (1, 1, wide), "blip.visual_encoder.pos_embed": (1, 197, wide),
              "blip.visual_encoder.patch_embed.proj.weight": (wide, 3, 16, 16),
              "blip.visual_encoder.patch_embed.proj.bias": (wide,),
              "blip.text_encoder.embeddings.word_embeddings.weight": (30524, text),
              "blip.text_encoder.embeddings.position_embeddings.weight": (512, text)}
    for name, size in linear.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def grid(metric) -> np.ndarray:
    """Every golden picture (rows) with every prompt (columns), in one call."""
    pictures, prompts = inputs.pictures(), inputs.PROMPTS
    scores = metric.score([picture for picture in pictures for _ in prompts], prompts * len(pictures))
    return scores.reshape(len(pictures), len(prompts))


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
    np.testing.assert_allclose(grid(PickScoreCosine.load(str(root / "pickscore"))) * scale, expected("pickscore"),
                               rtol=1e-4, atol=1e-5)


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
    for batch_size in (5, 36):
        metric = ImageReward.load(str(root / "imagereward"), batch_size=batch_size)
        np.testing.assert_allclose(grid(metric), wanted, rtol=0, atol=1e-3)


def test_tokens_are_the_official_ones(root):
    """Also of prompts that are cut, and those that open_clip rewrites first (quotes, entities, full width)."""
    for style, path in (("open_clip", root / "h14" / "HPS_v2_compressed.pt"), ("transformers", root / "pickscore")):
        backbone = (HPSv2 if style == "open_clip" else PickScore).load(str(path)).backbone
        found = [backbone.tokenizer(backbone._read(prompt), truncation=True, max_length=77).input_ids
                 for prompt in inputs.PROMPTS]
        assert found == STORED["tokens"][style]
        assert backbone.count_truncated(inputs.PROMPTS) == 1
    metric = ImageReward.load(str(root / "imagereward"))
    found = [metric.tokenizer(prompt, truncation=True, max_length=35).input_ids for prompt in inputs.PROMPTS]
    assert found == STORED["tokens"]["bert"]
    assert metric.count_truncated(inputs.PROMPTS) == 1 and metric.info()["truncates"] == "prompts after 35 tokens"


def test_every_tensor_must_find_its_place(root, tmp_path):
    state = filled(imagereward_shapes())
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
    for kind, parts in ((HPSv21, ("HPS_v2.1_compressed.pt", "3.9 GB", "xswu/HPSv2")),
                        (ImageReward, ("ImageReward.pt", "1.8 GB", "THUDM/ImageReward"))):
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
