"""A model from anywhere: what is evaluated beside what is trained here, by one line that says where it is.

    mini, FOLDER, OWNER/NAME       a pipeline (model_index.json), or a network alone, in the folder or its unet/
    FILE.safetensors               a network in one file, LDM's or diffusers' names (also .bin, .pt, .ckpt of tensors)
    lora:FILE, lora:FOLDER         a LoRA, merged into the suite's base; with a weight: lora:FILE@0.8
    RUN:ITERATION, RUN:ITERATION@STEP        a result of a run of this project
    images:FOLDER                  no model, but images that were made elsewhere (bench.scoring.elsewhere)

A hub name may go on, OWNER/NAME/unet or OWNER/NAME/FILE.safetensors, and name a revision, OWNER/NAME@REVISION (before
the weight of a LoRA). Names on this machine come first. Of a model, a suite compares the UNet: a pipeline, file or
LoRA that differs from the base in other parts as well is refused, and `MODEL#unet` takes its UNet alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from bench import models
from bench.errors import UsageError
from bench.models import layouts, lora_formats, networks, parts, single_file, tensors
from bench.models.layouts import Files, Folder
from bench.models.random_weights import is_random
from bench.runtime.hub import Repository
from bench.storage import runs, verify
from bench.storage.digests import digest

Kind = Literal["pipeline", "network", "file", "lora", "run", "images"]
Weights = Callable[[Path], Mapping[str, Tensor]]
RUN = re.compile(r"(?P<run>.+):(?P<iteration>\d+)(@(?P<step>\d+))?")
WEIGHTED = re.compile(r"(?P<model>.+)@(?P<weight>[-+]?(\d+\.?\d*|\.\d+))")
HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?P<inside>/[^@]+)?(@(?P<revision>.+))?")
ALONE = "#unet"


@dataclass(frozen=True)
class Source:
    """One model, found and checked as far as that goes without a base; nothing large of it is in memory.

    spec: as it was written. kind: see the table above. title: a short name for tables. source: the absolute path of
    the folder or file, the hub's OWNER/NAME, or the run's id. revision: the hub's commit, None elsewhere. files: the
    SHA-256 of every file that is read, by its name within `source`. weight: what a LoRA is multiplied by, None for
    anything else. unet_alone: whether only the UNet was asked for (`#unet`). folder: of kind "images", None else.
    """

    spec: str
    kind: Kind
    title: str
    source: str
    revision: str | None
    files: Mapping[str, str]
    weight: float | None = None
    unet_alone: bool = False
    folder: Path | None = None
    _weights: Weights | None = field(default=None, repr=False, compare=False)

    def load(self, base: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """The UNet, on the CPU, in eval mode: read and merged in fp32, then rounded to `dtype`.

        `base` is the folder of the suite's base pipeline (models.weights_folder): its architecture is expected, its
        UNet is what a LoRA is merged into, and its other parts are what they must equal. Raises BenchError with what
        was found and what was expected; UsageError for kind "images".
        """
        if self._weights is None:
            raise UsageError(f"{self.spec}: images hold no model to load")
        return networks.fill(base, self._weights(base), self.spec).to(dtype)

    def identity(self, base: Path) -> str:
        """A hash of the UNet's fp32 values by name: what its images depend on, whatever form it was stored in.

        Equal for a pipeline, its UNet alone, the same as LDM's file, and a LoRA whose merging gives the same bits.
        """
        return networks.content_key(self.load(base).state_dict())

    def record(self) -> dict[str, Any]:
        """Where the model is from, for a run's protocol."""
        names = ("spec", "kind", "source", "revision", "weight", "unet_alone")
        return {**{name: getattr(self, name) for name in names}, "files": dict(self.files)}


def resolve(spec: str) -> Source:
    """Find what `spec` names: on this machine, or on the hub, from which it is then fetched.

    Raises UsageError for what is not there or of no known form, BenchError for what is there and cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if kind == "images" and rest:
        return _images(spec, rest)
    if kind == "lora" and rest:
        return _lora(spec, rest)
    run = RUN.fullmatch(spec)
    if run and not Path(spec).expanduser().exists():
        return _run(spec, run)
    text, alone = _alone(spec)
    if text == "mini" or is_random(text):
        folder = models.weights_folder(text)
        return _folder(spec, Folder(text, folder), "", alone)
    files, inside = _find(text)
    if inside.endswith(tensors.SUFFIXES):
        return _file(spec, files, inside, alone)
    return _folder(spec, files, inside, alone)


def _alone(text: str) -> tuple[str, bool]:
    return text.removesuffix(ALONE), text.endswith(ALONE)


def _find(text: str) -> tuple[Files, str]:
    """The folder or repository that a path or a hub name is in, and what of it was named."""
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix not in tensors.SUFFIXES:
            raise UsageError(f"{text}: a model's file is one of {', '.join(tensors.SUFFIXES)}")
        return Folder(text, path.parent), path.name
    if path.is_dir():
        return Folder(text, path), ""
    named = HUB.fullmatch(text)
    if not named or text[0] in "./~" or named["name"].endswith(tensors.SUFFIXES):
        raise UsageError(
            f"{text}: no such file or folder, and no name on the hub (OWNER/NAME); a run is RUN:ITERATION, "
            "a LoRA lora:FILE, a folder of images images:FOLDER"
        )
    repository = Repository.look_up(named["name"], named["revision"])
    inside = (named["inside"] or "").strip("/")
    if inside and not any(name == inside or name.startswith(f"{inside}/") for name in repository.names):
        raise UsageError(f"{named['name']}: no file or folder {inside} in it; it has {_some(repository.names)}")
    return repository, inside


def _folder(spec: str, files: Files, inside: str, alone: bool) -> Source:
    """A pipeline, or a network in diffusers' format."""
    names = set(files.names)
    if "model_index.json" in names and not inside and not alone:
        return _pipeline(spec, files)
    below = f"{inside}/" if inside else ""
    inside = next((at for at in (inside, f"{below}unet") if f"{at}/config.json".lstrip("/") in names), None)
    if inside is None:
        loras = [name for name in lora_formats.NAMES if any(found.startswith(below + name) for found in names)]
        remedy = f"it holds a LoRA: write lora:{spec}" if loras else f"it has {_some(sorted(names))}"
        raise UsageError(f"{spec}: no pipeline (model_index.json) and no network (config.json) in it; {remedy}")
    wanted = layouts.network_files(files, inside)
    root = files.fetch(wanted)
    folder = root / inside
    config = models.read_config(folder / "config.json", "a diffusers UNet folder")
    models.expect_class(spec, config, UNet2DConditionModel)
    read = partial(_network, [root / name for name in layouts.weights_in(wanted)], config, spec)
    return _source(spec, "network", files, root, wanted, read, unet_alone=alone)


def _pipeline(spec: str, files: Files) -> Source:
    index = files.fetch(["model_index.json"]) / "model_index.json"  # before anything large is fetched
    models.expect_class(spec, models.read_config(index, "a diffusers pipeline folder"), StableDiffusionPipeline)
    wanted = layouts.pipeline_files(files)
    root = files.fetch(wanted)
    config = models.read_config(root / "unet" / "config.json", "a diffusers UNet folder")
    weights = [name for name in layouts.weights_in(wanted) if name.startswith("unet/")]
    variant = layouts.variant([name for name in wanted if not name.startswith("unet/")])

    def read(base: Path) -> Mapping[str, Tensor]:
        parts.expect_of_base(root, base, spec, variant)
        return _network([root / name for name in weights], config, spec, base)

    return _source(spec, "pipeline", files, root, wanted, read)


def _network(paths: list[Path], config: Mapping[str, Any], name: str, base: Path) -> Mapping[str, Tensor]:
    networks.expect_config(config, base, name)
    return tensors.read_shards(paths)


def _file(spec: str, files: Files, inside: str, alone: bool) -> Source:
    root = files.fetch([inside])

    def read(base: Path) -> Mapping[str, Tensor]:
        return single_file.read_network(root / inside, base, spec.removesuffix(ALONE), alone)

    return _source(spec, "file", files, root, [inside], read, unet_alone=alone)


def _lora(spec: str, rest: str) -> Source:
    weighted = None if Path(rest).expanduser().exists() else WEIGHTED.fullmatch(rest)
    text, alone = _alone(weighted["model"] if weighted else rest)
    weight = float(weighted["weight"]) if weighted else 1.0
    files, inside = _find(text)
    if inside.endswith(tensors.SUFFIXES):
        wanted = [inside, *layouts.lora_config(files, inside)]
    else:
        wanted = layouts.lora_files(files, inside)
    root = files.fetch(wanted)
    file, *config = [root / name for name in wanted]

    def read(base: Path) -> Mapping[str, Tensor]:
        weights = models.load_unet(base / "unet").state_dict()
        modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
        parts.expect_prediction(tensors.metadata(file), base, spec)
        lora = lora_formats.read_lora(file, config[0] if config else None, modules, f"lora:{text}", alone)
        return lora_formats.merge(weights, lora, weight, spec)

    return _source(spec, "lora", files, root, wanted, read, weight=weight, unet_alone=alone)


def _run(spec: str, named: re.Match[str]) -> Source:
    run = runs.load(named["run"])
    result = run.trained(int(named["iteration"]), int(named["step"]) if named["step"] else None)
    verify.expect_whole(run.folder, verify.result_damage(run.folder, result))
    files = Folder(spec, run.folder / result.name / "unet")
    wanted = layouts.network_files(files, "")
    config = models.read_config(files.root / "config.json", "a diffusers UNet folder")
    read = partial(_network, [files.root / name for name in layouts.weights_in(wanted)], config, spec)
    title = f"{run.title} {result.name.removeprefix('iter')}, seed {run.seed}"
    return Source(spec, "run", title, run.id, None, _digests(files.root, wanted), _weights=read)


def _images(spec: str, rest: str) -> Source:
    folder = Path(rest).expanduser()
    if not folder.is_dir():
        raise UsageError(f"{spec}: no such folder of images")
    return Source(spec, "images", _title(rest), str(folder.resolve()), None, {}, folder=folder)


def _source(spec: str, kind: Kind, files: Files, root: Path, wanted: list[str], read: Weights, **more: Any) -> Source:
    local = isinstance(files, Folder)
    source = str((root if len(wanted) > 1 else root / wanted[0]).resolve()) if local else files.name
    title = _title(spec.removeprefix("lora:"))
    return Source(
        spec, kind, title, source, None if local else root.name, _digests(root, wanted), _weights=read, **more
    )


def _digests(root: Path, names: list[str]) -> dict[str, str]:
    return {name: digest(root / name) for name in names}


def _title(text: str) -> str:
    """The last part of a name that says something: of x/unet it is x, of a file its stem."""
    parts = [
        part for part in PurePosixPath(text.removesuffix(ALONE)).parts if part not in ("unet", "lora", "/", ".", "..")
    ]
    last = parts[-1] if parts else text
    return re.sub(r"\.(safetensors|bin|pt|pth|ckpt)(?=$|@)", "", last)


def _some(names: Any) -> str:
    """The first few of many names."""
    listed = list(names)
    return f"{', '.join(listed[:5]) or 'nothing'}{', ...' if len(listed) > 5 else ''}"
