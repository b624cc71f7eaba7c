"""LoRA files as trainers write them, diffusers', kohya's and peft's, merged into a base: W becomes W + w a/r B A.

Hu et al., arXiv 2106.09685, with weight w, alpha a and rank r. peft is not needed. What is more than this, or meant
for another network, is refused rather than left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bench.errors import BenchError
from bench.models import tensors

NAMES = ("pytorch_lora_weights", "adapter_model")  # diffusers' and peft's, in a folder
CONFIG = "adapter_config.json"  # peft's, beside its file
HEADER = "lora_adapter_metadata"  # diffusers' copy of it, in its file's header
TEXT = ("text_encoder", "lora_te", "text_model", "base_model.model.text_model")
OTHER = {
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lora_mid": "a Tucker-decomposed LoRA",
    "lora_embedding": "a LoRA of embeddings",
}
KEY = re.compile(
    r"(?P<module>.+?)[._](?:lora_|lora\.)(?P<side>A|B|down|up)(?:\.default)?\.weight$"
    r"|(?P<scaled>.+?)(?:[._]lora[._].*)?\.alpha$"
)
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "layer_replication", "target_parameters")


class Factors(NamedTuple):
    """What a LoRA adds to one module's weight: scale * up @ down, down [r, in, ...] and up [out, r, ...] in fp32."""

    down: Tensor
    up: Tensor
    scale: float


def read_lora(
    path: Path, config: Path | None, modules: Iterable[str], name: str, unet_alone: bool
) -> dict[str, Factors]:
    """What a LoRA file adds to each of a UNet's modules, by the names of `modules`.

    `config` is peft's adapter_config.json. A file that changes text encoders too is refused unless `unet_alone`.
    """
    found = tensors.read_tensors(path)
    said = _said(path, config)
    text = [key for key in found if key.startswith(TEXT)]
    if text and not unet_alone:
        raise BenchError(
            f"{name}: {len(text)} of its {len(found)} tensors are for a text encoder, and a suite compares UNets: name "
            f"{name}#unet to merge the rest alone"
        )
    sides: dict[str, dict[str, Tensor]] = {}
    names = _Names(modules)
    for key in found.keys() - set(text):
        module, side = _place(key, names, name)
        if side in sides.setdefault(module, {}):
            raise BenchError(f"{name}: two tensors for the same side of {module}, one of them {key}")
        sides[module][side] = found[key].float()
    if not sides:
        raise BenchError(f"{name}: no tensors of a UNet's LoRA in it")
    return {module: _factors(module, sides[module], said, name) for module in sorted(sides)}


def merge(weights: Mapping[str, Tensor], lora: Mapping[str, Factors], weight: float, name: str) -> dict[str, Tensor]:
    """A network's fp32 tensors with the LoRA in them; linear layers to the bit as peft merges them."""
    merged = dict(weights)
    for module, (down, up, scale) in lora.items():
        before = weights[f"{module}.weight"]
        if (up.shape[0], *down.shape[1:]) != _expected(before, down) or up[0, 0].numel() != 1:
            raise BenchError(
                f"{name} is made for another network: its factors for {module} are {tuple(up.shape)} and "
                f"{tuple(down.shape)}, the suite's base has {tuple(before.shape)} there"
            )
        added = (up.flatten(1) @ down.flatten(1)) * (scale * weight)
        merged[f"{module}.weight"] = before + added.reshape(before.shape)
    return merged


def _expected(before: Tensor, down: Tensor) -> tuple[int, ...]:
    """The outer sizes of the factors; a 1x1 convolution may be written as a linear layer."""
    shape = tuple(before.shape)
    return shape[:2] if down.ndim == 2 and all(size == 1 for size in shape[2:]) else shape


class _Names:
    """A UNet's modules by their names, and by kohya's, which have _ for every dot."""

    def __init__(self, modules: Iterable[str]):
        self.modules = set(modules)
        self.flat = {module.replace(".", "_"): module for module in self.modules}

    def find(self, written: str) -> str | None:
        if written.startswith("lora_unet_"):
            return self.flat.get(written.removeprefix("lora_unet_"))
        plain = re.sub(r"^(base_model\.model\.)?(unet\.)?", "", written).replace(".processor.", ".")
        return next((name for name in (plain, f"{plain}.0") if name in self.modules), None)


def _place(key: str, names: _Names, name: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and whether it is its down, its up or its alpha."""
    kind = next((kind for part, kind in OTHER.items() if part in key), None)
    if kind:
        raise BenchError(f"{name} is {kind}, which is not merged here: {key}; merge it where it was trained")
    match = KEY.match(key)
    module = names.find(match["module"] or match["scaled"]) if match else None
    if module is None:
        reason = "names no layer of the suite's UNet" if match else "is no part of a LoRA"
        raise BenchError(f"{name}: {key} {reason}")
    return module, {"A": "down", "B": "up", None: "alpha"}.get(match["side"], match["side"])


def _factors(module: str, sides: Mapping[str, Tensor], said: Mapping[str, Any], name: str) -> Factors:
    missing = [side for side in ("down", "up") if side not in sides]
    if missing:
        raise BenchError(f"{name}: {module} has no {missing[0]} factor")
    down, up = sides["down"], sides["up"]
    rank = down.shape[0]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank:
        raise BenchError(f"{name}: the factors of {module} do not fit: {tuple(up.shape)} and {tuple(down.shape)}")
    if "alpha" in sides:
        return Factors(down, up, sides["alpha"].item() / rank)
    if not said:
        return Factors(down, up, 1.0)
    stated = _pattern(said.get("rank_pattern"), module, said.get("r", rank))
    if stated != rank:
        raise BenchError(f"{name}: {module} has rank {rank}, its configuration says {stated}")
    alpha = _pattern(said.get("alpha_pattern"), module, said.get("lora_alpha", rank))
    return Factors(down, up, alpha / (math.sqrt(rank) if said.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: float) -> float:
    """peft's rule: the first pattern that is the end of a module's name, from a dot on, in place of the default."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _said(path: Path, config: Path | None) -> dict[str, Any]:
    """What peft's configuration says of ranks and alphas; {} where there is none."""
    header = tensors.metadata(path).get(HEADER)
    if config is None and header is None:
        return {}
    where = config or path
    try:
        said = json.loads(config.read_text() if config else header)
        said = {key.removeprefix("unet."): value for key, value in said.items() if not key.startswith("text_encoder")}
    except (OSError, ValueError, AttributeError) as error:
        raise BenchError(f"{where}: no LoRA's configuration can be read from it: {error}") from error
    unsupported = [key for key in UNSUPPORTED if said.get(key)]
    if said.get("peft_type", "LORA") != "LORA" or said.get("bias", "none") != "none" or unsupported:
        what = unsupported[0] if unsupported else "bias" if said.get("bias", "none") != "none" else said["peft_type"]
        raise BenchError(
            f"{where}: {what} is more than a plain LoRA, and not merged here: merge it where it was trained"
        )
    return said
