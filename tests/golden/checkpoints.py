"""Checkpoints in the published formats, filled as for the official code, and the metrics that load them."""

from __future__ import annotations

import json
from pathlib import Path

import inputs
import numpy as np
import torch
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.metrics import imagereward
from bench.metrics.aesthetic import head_layers
from bench.metrics.open_clip_format import clip_config
from bench.metrics.sharing import shared

STORED = json.loads(Path(__file__).with_name("scorers.json").read_text())
IMAGEREWARD_GAIN = 1.6


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer as far as the golden prompts need it, with the published numbers."""
    merges = [tuple(pair) for pair in STORED["vocabulary"]["merges"]]
    return CLIPTokenizer(vocab=STORED["vocabulary"]["clip"], merges=merges, model_max_length=77)


def open_clip_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an open_clip CLIP's tensors."""
    vision, text, joint = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    wide, narrow, patch = vision["width"], text["width"], vision["patch_size"]
    shapes = {
        "positional_embedding": (77, narrow),
        "text_projection": (narrow, joint),
        "logit_scale": (),
        "visual.class_embedding": (wide,),
        "visual.proj": (wide, joint),
        "visual.positional_embedding": ((224 // patch) ** 2 + 1, wide),
        "visual.conv1.weight": (wide, 3, patch, patch),
        "token_embedding.weight": (49408, narrow),
    }
    for norm, width in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", narrow)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for prefix, width, layers in (("visual.", wide, vision["layers"]), ("", narrow, text["layers"])):
        for block in (f"{prefix}transformer.resblocks.{index}." for index in range(layers)):
            for part, sizes in {
                "ln_1": (width,),
                "ln_2": (width,),
                "attn.out_proj": (width, width),
                "mlp.c_fc": (4 * width, width),
                "mlp.c_proj": (width, 4 * width),
            }.items():
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


def save_pickscore(folder: Path, config: dict) -> None:
    """A folder in transformers' format with all that PickScore_v1 and its processor hold."""
    with torch.device("meta"):
        model = CLIPModel(clip_config(config, 49407))
    model.load_state_dict(filled({name: tuple(value.shape) for name, value in model.state_dict().items()}), assign=True)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def save_heads(folder: Path, width: int) -> None:
    """LAION's two heads for embeddings of this width."""
    layers = head_layers((width, 1024, 128, 64, 16, 1)).state_dict()
    shapes = {
        "aesthetic.pth": {f"layers.{name}": tuple(value.shape) for name, value in layers.items()},
        "aesthetic_v1.pth": {"weight": (1, width), "bias": (1,)},
    }
    for name, sizes in shapes.items():
        torch.save(filled(sizes, 3.0), folder / name)


def save_imagereward(folder: Path, vit: dict, med: dict) -> None:
    """ImageReward.pt with all that the published file holds, med_config.json, and BERT's words."""
    folder.mkdir()
    (folder / "med_config.json").write_text(json.dumps(med))
    state = filled(imagereward_shapes(vit, med), IMAGEREWARD_GAIN)
    torch.save(state | {imagereward.POSITIONS: torch.arange(512)[None]}, folder / "ImageReward.pt")
    BertTokenizer(vocab=STORED["vocabulary"]["bert"], model_max_length=512).save_pretrained(folder)


def imagereward_shapes(vit: dict, med: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an ImageReward's tensors."""
    wide, text, hidden = vit["embed_dim"], med["hidden_size"], med["intermediate_size"]
    linear = {"blip.vision_proj": (256, wide), "blip.text_proj": (256, text)}
    norms = {"blip.visual_encoder.norm": wide, "blip.text_encoder.embeddings.LayerNorm": text}
    for place, (inner, outer) in zip(
        (0, 2, 4, 6, 7), ((text, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True
    ):
        linear[f"mlp.layers.{place}"] = (outer, inner)
    for index in range(vit["depth"]):
        block = f"blip.visual_encoder.blocks.{index}."
        linear |= {
            f"{block}attn.qkv": (3 * wide, wide),
            f"{block}attn.proj": (wide, wide),
            f"{block}mlp.fc1": (4 * wide, wide),
            f"{block}mlp.fc2": (wide, 4 * wide),
        }
        norms |= {f"{block}norm1": wide, f"{block}norm2": wide}
    for index in range(med["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{index}."
        for kind, context in (("attention", text), ("crossattention", wide)):
            linear |= {
                f"{layer}{kind}.self.query": (text, text),
                f"{layer}{kind}.self.key": (text, context),
                f"{layer}{kind}.self.value": (text, context),
                f"{layer}{kind}.output.dense": (text, text),
            }
            norms[f"{layer}{kind}.output.LayerNorm"] = text
        linear |= {f"{layer}intermediate.dense": (hidden, text), f"{layer}output.dense": (text, hidden)}
        norms[f"{layer}output.LayerNorm"] = text
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, wide),
        "blip.visual_encoder.pos_embed": (1, 197, wide),
        "blip.visual_encoder.patch_embed.proj.weight": (wide, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (wide,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30524, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, text),
    }
    for name, size in linear.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def grid(metric) -> np.ndarray:
    """Every golden picture (rows) with every prompt (columns); each call has pictures and prompts of all kinds."""
    pictures, prompts = inputs.pictures(), inputs.PROMPTS
    scores, rows = np.empty((len(pictures), len(prompts))), np.arange(len(pictures))
    with shared():
        for shift in range(len(prompts)):
            columns = (rows + shift) % len(prompts)
            scores[rows, columns] = metric.score(pictures, [prompts[column] for column in columns])
    return scores
