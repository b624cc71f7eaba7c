"""Folders of models, on this machine or on the hub: what they hold, told by their files' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol

from bench import models
from bench.errors import BenchError, UsageError
from bench.models import lora_formats, tensors

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # diffusers', and transformers' two
FORMS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".fp16.safetensors", ".fp16.bin")
"""Of one network in several files: .safetensors first, but full precision before that."""


class Files(Protocol):
    """Files under one name, local or not."""

    name: str
    names: Sequence[str]  # relative to the folder, with /
    revision: str | None

    def fetch(self, names: Sequence[str]) -> Path: ...


@dataclass(frozen=True)
class Folder:
    """A folder on this machine as `Files`; a model has no file deeper than one folder down."""

    name: str
    root: Path
    revision: None = None

    @cached_property
    def names(self) -> Sequence[str]:
        found = [*self.root.glob("*"), *self.root.glob("*/*")]
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.is_file())

    def fetch(self, names: Sequence[str]) -> Path:
        return self.root


def network_files(files: Files, inside: str) -> list[str]:
    """The configuration and the weights of the network in a folder of `files`, "" for the outermost."""
    return [_join(inside, "config.json"), *weight_files(files, inside)]


def weight_files(files: Files, inside: str) -> list[str]:
    """The best file of weights in a folder; one in shards as its index and all of them."""
    for form in FORMS:
        for stem in STEMS:
            name = _join(inside, stem + form)
            if name in files.names:
                return [name, *_shards(files, name)] if name.endswith(".json") else [name]
    where = f" in its folder {inside}" if inside else ""
    raise BenchError(
        f"{files.name}: no weights{where} under a name that diffusers gives them, like {STEMS[0]}{FORMS[0]}"
    )


def pipeline_files(files: Files) -> list[str]:
    """What is read of a pipeline folder: of every part its small files, and the best one of weights."""
    wanted = ["model_index.json"]
    for part in models.COMPONENTS:
        own = [name for name in files.names if name.startswith(f"{part}/")]
        if not own:
            raise BenchError(
                f"{files.name}: expected a folder for each of {', '.join(models.COMPONENTS)}, found no {part}"
            )
        wanted += [name for name in own if PurePosixPath(name).suffix in (".json", ".txt") and ".index." not in name]
        wanted += weight_files(files, part) if part in ("unet", "vae", "text_encoder") else []
    return sorted(set(wanted))


def lora_files(files: Files, inside: str) -> list[str]:
    """The LoRA in a folder of `files`, and with it peft's configuration where there is one."""
    known = [_join(inside, name + suffix) for name in lora_formats.NAMES for suffix in (".safetensors", ".bin")]
    chosen = next((name for name in known if name in files.names), None)
    if chosen is None:
        own = [name for name in files.names if PurePosixPath(name).match(_join(inside, "*.safetensors"))]
        own = [name for name in own if name.count("/") == _join(inside, "").count("/")]
        if len(own) != 1:
            found = f"{len(own)} files: name one, like {own[0]}" if own else "no .safetensors"
            raise UsageError(f"{files.name}: expected a LoRA, {' or '.join(known[::2])}; found {found}")
        chosen = own[0]
    return [chosen, *lora_config(files, chosen)]


def lora_config(files: Files, chosen: str) -> list[str]:
    """peft's configuration beside a file of its own name; without it nobody knows how such a file is scaled."""
    file = PurePosixPath(chosen)
    if file.stem != "adapter_model":
        return []
    config = file.with_name(lora_formats.CONFIG).as_posix()
    if config not in files.names:
        raise BenchError(f"{files.name}: {chosen} without {lora_formats.CONFIG}, which says how it is scaled")
    return [config]


def variant(names: Sequence[str]) -> str | None:
    """What diffusers calls the weights among these files: "fp16", or None for those of full precision."""
    return "fp16" if any(".fp16." in name for name in names) else None


def weights_in(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.endswith(tensors.SUFFIXES)]


def _shards(files: Files, index: str) -> list[str]:
    listed = models.read_config(files.fetch([index]) / index, "an index of shards").get("weight_map", {})
    inside = PurePosixPath(index).parent.as_posix().removeprefix(".")
    return [_join(inside, name) for name in sorted(set(listed.values()))]


def _join(inside: str, name: str) -> str:
    return f"{inside}/{name}" if inside else name
