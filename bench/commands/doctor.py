"""What is here and what a suite needs: versions, devices, disk, memory, and every file of weights and data.

Nothing is downloaded and no weights are loaded but the miniatures', so this works offline and before a download.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import models, registry
from bench.costs.cards import recognise
from bench.costs.plan import Plan, plan
from bench.data import load_prompts
from bench.data.prompts import PUBLISHED
from bench.errors import BenchError
from bench.metrics import official
from bench.metrics.base import Published
from bench.mini import MINI_WEIGHTS
from bench.runtime.hub import is_hub_id
from bench.runtime.versions import versions
from bench.suites import Suite

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pandas", "pyarrow", "sacred")
OPTIONAL = {
    "nvidia-ml-py": "energy in cost.json",
    "peft": "LoRA",
    "bitsandbytes": "8-bit AdamW",
    "pymongo": "bench run --mongo",
    "sqlalchemy": "bench run --sql",
    "hpsv2": "bench score --backend official",
    "image-reward": "bench score --backend official",
}
PYTHON = 0.7e9  # bytes Python and its libraries take beside the models on a processor
SD15_SIZES = {"unet": "3.4 GB", "vae": "0.3 GB", "text_encoder": "0.5 GB", "tokenizer": "1 MB", "scheduler": "1 kB"}
PART_FILES = {"tokenizer": ("tokenizer.json", "vocab.json"), "scheduler": ("scheduler_config.json",)}
STEM = {"text_encoder": "model"}  # of a part's weights; of the others diffusion_pytorch_model
SUFFIXES = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin", ".safetensors.index.json")


@dataclass(frozen=True)
class File:
    """Something the suite reads; `where` it was found, else `fix` says how to get it."""

    purpose: str
    name: str
    where: str | None
    size: str
    fix: str = ""


@dataclass(frozen=True)
class Room:
    """What the suite needs of a resource, and what is free, in bytes."""

    name: str
    needed: float
    free: float

    @property
    def enough(self) -> bool:
        return self.free >= self.needed


@dataclass(frozen=True)
class Diagnosis:
    suite: str
    versions: dict[str, str]
    optional: dict[str, str]
    devices: list[str]
    rooms: list[Room]
    files: list[File]
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """One phrase a problem; empty when the suite can run here."""
        missing = sum(file.where is None for file in self.files)
        said = [f"{missing} of {len(self.files)} files are missing"] if missing else []
        return said + [f"not enough {room.name}" for room in self.rooms if not room.enough]

    def record(self) -> dict[str, Any]:
        rooms = [{**asdict(room), "enough": room.enough} for room in self.rooms]
        files = [{**asdict(file), "found": file.where is not None} for file in self.files]
        return {**asdict(self), "rooms": rooms, "files": files, "problems": self.problems}


def examine(suite: Suite) -> Diagnosis:
    files = [*model_files(suite), *data_files(suite), *metric_files(suite)]
    notes, rooms = [], []
    try:
        rooms, notes = _rooms(needs := plan(suite, list(suite.methods))), list(needs.notes)
    except BenchError as error:
        notes.append(f"disk and memory were not planned: {error}")
    found = versions((*PACKAGES, *OPTIONAL))
    optional = {
        name: f"{found.pop(name)} ({use})" if name in found else f"not installed ({use})"
        for name, use in OPTIONAL.items()
    }
    return Diagnosis(
        suite.name, {"python": platform.python_version(), **found}, optional, devices(), rooms, files, notes
    )


def devices() -> list[str]:
    """GPUs first, then the processor."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        card = recognise(properties.name)
        found.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 1e9:.0f} GB"
            + (f", planned as {card}" if card else ", peak not known: no MFU")
        )
    memory = psutil.virtual_memory().total / 1e9
    return [
        *found,
        f"cpu {platform.machine()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads "
        f"used, {memory:.0f} GB",
    ]


def _rooms(needs: Plan) -> list[Room]:
    """Disk below this folder, where runs and the cache go; memory of the device that would train."""
    disk = Room("disk space here (results/, all methods once)", needs.disk_bytes, shutil.disk_usage(Path.cwd()).free)
    if torch.cuda.is_available():
        return [disk, Room("GPU memory", needs.peak_memory_bytes, torch.cuda.mem_get_info()[0])]
    free = psutil.virtual_memory().available
    return [disk, Room("memory", needs.peak_memory_bytes + PYTHON, free)]


# --- files ---


def model_files(suite: Suite) -> Iterator[File]:
    """Of the pipeline, part by part."""
    weights = suite.model.weights
    if weights.partition(":")[0] == "random":
        yield File("model", weights, "made when it is first used", "")
        return
    root = MINI_WEIGHTS / "pipeline" if weights == "mini" else Path(weights).expanduser()
    is_hub = is_hub_id(weights)
    fix = (
        f"download {weights} from the hub (huggingface-cli download {weights}), or name a folder with "
        "--set model.weights=FOLDER"
        if is_hub
        else f"expected in {root}"
    )
    for part in models.COMPONENTS:
        names = PART_FILES.get(part, tuple(STEM.get(part, "diffusion_pytorch_model") + end for end in SUFFIXES))
        if is_hub:
            places = (official.locate(Published(weights, f"{part}/{name}", "")) for name in names)
        else:
            places = (root / part / name for name in names)
        path = next((place for place in places if place and place.is_file()), None)
        name = f"{weights}/{part}" if is_hub else f"{part}/{names[0]}"
        yield File("model", name, path and str(path), size_of(path) or SD15_SIZES[part], fix)


def data_files(suite: Suite) -> Iterator[File]:
    """Training pairs and prompt sets; the drawn world comes with bench."""
    kind, _, source = suite.data.pairs.partition(":")
    yield _data("training pairs", suite.data.pairs, source.partition("#")[0])
    for name, prompts in suite.evaluation.prompt_sets.items():
        kind, colon, source = prompts.prompts.partition(":")
        if kind == "world":
            yield File(
                f"prompts {name}",
                prompts.prompts,
                "comes with bench",
                f"{len(load_prompts(prompts.prompts, prompts.limit))} prompts",
            )
        else:
            published = PUBLISHED[kind].repository if kind in PUBLISHED and not colon else kind
            yield _data(f"prompts {name}", prompts.prompts, source.partition("#")[0] if colon else published)


def _data(purpose: str, spec: str, source: str) -> File:
    """A file, a folder, or a data set in the Hugging Face cache."""
    if not source:
        return File(purpose, spec, "comes with bench", "")
    path = Path(source).expanduser()
    if is_hub_id(source):
        from huggingface_hub.constants import HF_HUB_CACHE

        name = source.partition("@")[0]
        path = Path(HF_HUB_CACHE, "datasets--" + name.replace("/", "--"))
        fix = f"{name} is a data set on the hub and is read from there as it is needed; offline, name a local folder"
    else:
        fix = f"expected at {path}"
    found = path if path.exists() else None
    return File(purpose, spec, found and str(found), size_of(found), fix)


def metric_files(suite: Suite) -> Iterator[File]:
    """Of every metric, each file once."""
    seen: set[tuple[str, str | None]] = set()
    for name in suite.metrics:
        kind = registry.metric(name)
        weights = kind.weights_of(suite.metric_options.get(name, {}))
        for item in official.needed(kind, weights):
            key = (item.published.repository, item.published.file)
            if key in seen:
                continue
            seen.add(key)
            yield File(
                f"metric {name}",
                item.name,
                item.path and str(item.path),
                size_of(item.path) or item.published.size,
                _metric_fix(item.published, weights),
            )


def _metric_fix(item: Published, weights: str) -> str:
    if weights == "mini":
        return "restore bench/mini/weights from the repository, or rebuild it with `python -m bench.mini`"
    place = os.environ.get("BENCH_WEIGHTS", "the folder that BENCH_WEIGHTS names")
    if item.repository.count("/") != 1:
        return f"from {item.repository}; put it into {place}" if item.repository else "no such file or folder"
    within = f"{place}, below {item.repository.split('/')[1]}/" if item in official.SETTINGS else place
    return f"from {item.repository}; put it into {within}, or let it be downloaded when it is first used"


def size_of(path: Path | None) -> str:
    """Of a file, or of all files of a folder; "" where there is none."""
    if path is None or not path.exists():
        return ""
    size = (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


# --- output ---


def as_text(found: Diagnosis) -> str:
    lines = [
        "versions",
        *(f"  {name} {version}" for name, version in found.versions.items()),
        "optional packages",
        *(f"  {name}: {state}" for name, state in found.optional.items()),
        "devices",
        *(f"  {device}" for device in found.devices),
        f"what suite {found.suite} needs",
    ]
    lines += [
        f"  {'ok     ' if room.enough else 'SHORT  '} {room.name}: {room.needed / 1e9:.3g} GB needed, "
        f"{room.free / 1e9:.3g} GB free"
        for room in found.rooms
    ]
    for file in found.files:
        size = f", {file.size}" if file.size else ""
        state = "found  " if file.where else "MISSING"
        lines.append(f"  {state} {file.purpose}: {file.name}{size}; {file.where or file.fix}")
    lines += [f"  note: {note}" for note in found.notes]
    lines.append("; ".join(found.problems) if found.problems else f"suite {found.suite} has all it needs")
    return "\n".join(lines)
