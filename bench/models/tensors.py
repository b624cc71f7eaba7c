"""Files of named tensors, as data: nothing in a file is run."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bench.errors import BenchError, first_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled state dict, bare or under "state_dict", by their names.

    Raises BenchError for a file that is damaged, holds something else, or could run code while it is read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BenchError(
            f"{path} is no pickle of tensors alone, so reading it could run code: where you trust it, save its state "
            "dict with safetensors.torch.save_file and name that file"
        ) from error
    except Exception as error:  # safetensors, torch and zipfile raise errors of many kinds for broken files
        raise BenchError(f"{path} cannot be read as a file of tensors: {first_line(error)}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BenchError(f"{path}: expected a dict of tensors, found a {_contents(state)}")
    return state


def read_shards(paths: Iterable[Path]) -> dict[str, Tensor]:
    return {name: tensor for path in paths for name, tensor in read_tensors(path).items()}


def metadata(path: Path) -> dict[str, str]:
    """What the header of a .safetensors file says beside its tensors; nothing of any other file."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values, or one holds those of the other in half precision."""
    one, other = one.float(), other.float()
    return one.shape == other.shape and (
        torch.equal(one, other)
        or any(
            torch.equal(one.to(half).float(), other) or torch.equal(one, other.to(half).float())
            for half in (torch.float16, torch.bfloat16)
        )
    )


def _contents(state: object) -> str:
    if not isinstance(state, dict):
        return type(state).__name__
    name, value = next((name, value) for name, value in state.items() if not isinstance(value, Tensor))
    return f"{type(value).__name__} under {name!r}"
