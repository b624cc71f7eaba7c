"""A UNet of a base pipeline's architecture out of named tensors: every tensor in its place, or a refusal by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from bench import models
from bench.errors import BenchError

NO_MATTER = {"self", "dropout"}  # of the arguments of a UNet: what no evaluated image depends on


def empty(base: Path) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, on the meta device."""
    config = models.read_config(base / "unet" / "config.json", "a diffusers UNet folder")
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def fill(base: Path, tensors: Mapping[str, Tensor], name: str) -> UNet2DConditionModel:
    """The base's UNet with these weights instead of its own, in fp32 and ready to be sampled from.

    `tensors` has diffusers' names. Raises BenchError unless they are exactly those of the base's architecture.
    """
    unet = empty(base)
    expect_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()}, unet, name)
    unet.load_state_dict({key: tensor.to(torch.float32) for key, tensor in tensors.items()}, assign=True)
    return models.in_own_memory(unet).eval()


def expect_shapes(found: Mapping[str, tuple[int, ...]], unet: UNet2DConditionModel, name: str) -> None:
    """Refuse weights of another architecture than that of `unet`: missing, unknown, or of another shape."""
    expected = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [key for key in expected if key in found and found[key] != expected[key]]
    if not (missing or unknown or other):
        return
    what = [f"{len(missing)} tensors are missing, first {missing[0]}"] if missing else []
    what += [f"{len(unknown)} are unknown, first {unknown[0]}"] if unknown else []
    what += (
        [f"{len(other)} have another shape, first {other[0]} {found[other[0]]}, expected {expected[other[0]]}"]
        if other
        else []
    )
    raise BenchError(
        f"{name} is no network of the suite's architecture: found {_summary(found)}, expected {_summary(expected)}; "
        f"{'; '.join(what)}"
    )


def expect_config(found: Mapping[str, Any], base: Path, name: str) -> None:
    """Refuse a UNet whose configuration, missing values by their defaults, makes another function of its weights."""
    expected = models.read_config(base / "unet" / "config.json", "a diffusers UNet folder")
    known = signature(UNet2DConditionModel.__init__).parameters
    for key in known.keys() - NO_MATTER:
        one, other = (config.get(key, known[key].default) for config in (found, expected))
        if not _same(one, other):
            raise BenchError(
                f"{name} is no network of the suite's architecture: found {key} {one}, expected {other}, that of {base}"
            )


def content_key(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and fp32 values: equal for equal weights, whatever file and precision they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}\0{tuple(values.shape)}\0".encode())
        digest.update(values.numpy())
    return digest.hexdigest()[:16]


def _same(one: Any, other: Any) -> bool:
    """Equal, or one value for all blocks where the other configuration repeats it for each."""
    listed = [list(value) if isinstance(value, list | tuple) else None for value in (one, other)]
    if (listed[0] is None) == (listed[1] is None):
        return one == other if listed[0] is None else listed[0] == listed[1]
    repeated, single = (listed[0], other) if listed[0] is not None else (listed[1], one)
    return all(value == single for value in repeated)


def _summary(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What tells the published architectures apart: channels that go in, the width of the text."""
    width = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), "no")
    first = shapes.get("conv_in.weight", ("?", "?"))
    return f"{len(shapes)} tensors ({first[1]} channels in, {first[0]} wide, text of width {width})"
