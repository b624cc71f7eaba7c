"""open_clip's checkpoints as transformers' CLIPModel, and its cleaning of prompts; open_clip is not needed.

An open_clip model is described by a configuration (embed_dim, vision_cfg, text_cfg) that its checkpoint does not
hold; `open_clip_config.json` beside the checkpoint, or the name of a published one, says it.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from bench.errors import BenchError, first_line

CONFIG_FILE = "open_clip_config.json"
VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
VIT_L_14 = {
    "embed_dim": 768,
    "quick_gelu": True,  # OpenAI's; the ones that LAION trained use the exact GELU
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}

RENAMED = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
IN_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
NOT_LEARNED = {"attn_mask", "input_resolution", "context_length", "vocab_size"}
"""Entries of some open_clip files that only repeat the architecture."""

LIGATURES = {
    "ﬀ": "ff",
    "ﬁ": "fi",
    "ﬂ": "fl",
    "ﬃ": "ffi",
    "ﬄ": "ffl",
    "ﬅ": "ſt",
    "ﬆ": "st",
    "Ĳ": "IJ",
    "ĳ": "ij",
    "ŉ": "ʼn",
    "Ǆ": "DŽ",
    "ǅ": "Dž",
    "ǆ": "dž",
    "Ǉ": "LJ",
    "ǈ": "Lj",
    "ǉ": "lj",
    "Ǌ": "NJ",
    "ǋ": "Nj",
    "ǌ": "nj",
    "Ǳ": "DZ",
    "ǲ": "Dz",
    "ǳ": "dz",
}
PLAIN = str.maketrans(
    {
        **LIGATURES,
        **dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
        "\u3000": " ",
    }
)
FULL_WIDTH = re.compile("[\uff01-\uffef]")
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffb]")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt`, `.bin` or `.safetensors` file, also when they lie under "state_dict".

    Nothing in the file is run, and its tensors are mapped into memory rather than read twice.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        cause = first_line(error)
        raise BenchError(f"cannot read the checkpoint {path}: {cause}") from error
    stored = stored.get("state_dict", stored)
    return {name.removeprefix("module."): value for name, value in stored.items()}


def architecture(checkpoint: Path, default: dict[str, Any]) -> dict[str, Any]:
    """What `open_clip_config.json` beside the checkpoint says, or `default`."""
    path = checkpoint.with_name(CONFIG_FILE)
    if not path.is_file():
        return default
    stored = json.loads(path.read_text())
    return stored.get("model_cfg", stored)


def load_model(checkpoint: Path, described: dict[str, Any], end_token: int) -> CLIPModel:
    """The CLIPModel that an open_clip checkpoint describes, in fp32, every tensor accounted for."""
    with torch.device("meta"):  # no time and memory for initial weights that are replaced
        model = CLIPModel(clip_config(described, end_token))
    try:
        model.load_state_dict(to_transformers(read_checkpoint(checkpoint)), strict=True, assign=True)
    except RuntimeError as error:
        cause = " ".join(str(error).split())[:300]
        raise BenchError(f"{checkpoint.name} does not fit the architecture it was taken for: {cause}") from error
    for embeddings in (model.vision_model.embeddings, model.text_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count).expand((1, -1))
    return model


def clip_config(described: dict[str, Any], end_token: int) -> CLIPConfig:
    """transformers' name for every number of an open_clip configuration."""
    vision, text = described["vision_cfg"], described["text_cfg"]
    shared = {
        "projection_dim": described["embed_dim"],
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu" if described.get("quick_gelu") else "gelu",
    }
    return CLIPConfig(
        projection_dim=described["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            **shared,
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "eos_token_id": end_token,
            **shared,
        },
    )


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict under transformers' names, in fp32; unknown names are kept, to be refused."""
    mapped: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in NOT_LEARNED:
            continue
        value = value.float()
        if name in TRANSPOSED:
            mapped[TRANSPOSED[name]] = value.T.contiguous()
        elif match := BLOCK.fullmatch(name):
            mapped |= _block(match, value)
        else:
            mapped[RENAMED.get(name, name)] = value
    return mapped


def _block(match: re.Match, value: Tensor) -> dict[str, Tensor]:
    """One tensor of a transformer block; query, key and value are stacked in open_clip's."""
    visual, index, part, kind = match.groups()
    prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{index}"
    if part == "attn.in_proj":
        return {
            f"{prefix}.self_attn.{name}_proj.{kind}": third for name, third in zip("qkv", value.chunk(3), strict=True)
        }
    return {f"{prefix}.{IN_BLOCKS.get(part, part)}.{kind}": value}


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_transformers`, for saving in open_clip's format."""
    renamed = {theirs: ours for ours, theirs in RENAMED.items()}
    transposed = {theirs: ours for ours, theirs in TRANSPOSED.items()}
    in_blocks = {theirs: ours for ours, theirs in IN_BLOCKS.items()}
    mapped = {}
    for name, value in state.items():
        if name in transposed:
            mapped[transposed[name]] = value.T.contiguous()
        elif match := re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            tower, index, part, kind = match.groups()
            prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{index}"
            if part in in_blocks:
                mapped[f"{prefix}.{in_blocks[part]}.{kind}"] = value
            elif part == "self_attn.q_proj":
                stacked = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                mapped[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(stacked)
        else:
            mapped[renamed[name]] = value
    return mapped


def clean(prompt: str) -> str:
    """A prompt as open_clip's tokenizer reads it: HTML entities, curly quotes, ligatures and full-width letters
    in their plain form. (Of ftfy, which open_clip calls, only the repair of wrongly decoded text is left out.)
    """
    plain = html.unescape(html.unescape(prompt))
    plain = FULL_WIDTH.sub(lambda match: unicodedata.normalize("NFKC", match[0]), plain.translate(PLAIN))
    return " ".join(unicodedata.normalize("NFC", CONTROL.sub("", plain)).split())
