"""Loading and saving Stable Diffusion weights; whatever is wrong with them is said in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from bench.errors import BenchError, first_line
from bench.mini import MINI_WEIGHTS
from bench.models.random_weights import is_random, random_folder
from bench.runtime.hub import is_hub_id
from bench.storage import runs
from bench.storage.stages import temporary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
UNUSED = dict.fromkeys(("safety_checker", "feature_extractor"))

# the libraries' own bars, one per component and shard, say nothing about the work
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def load_pipeline(
    weights: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """Load a pipeline without its safety checker; `weights` as `weights_folder` knows them."""
    folder = weights_folder(weights)
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, local_files_only=True, requires_safety_checker=False, **UNUSED
        )
    except Exception as error:
        reason = first_line(error)
        raise BenchError(f"{weights} does not load as a StableDiffusionPipeline: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(memory_format=torch.channels_last)  # a third less time for its large convolutions, on a CPU too
    return pipe.to(device, dtype)


def weights_folder(weights: str | Path) -> Path:
    """Return the folder that holds a Stable Diffusion pipeline.

    `weights` is "mini", a folder, a hub id (fetched when it is not cached), or "random" and the like (made when
    it is not there; see bench.models.random_weights).
    """
    if is_random(weights):
        return random_folder(str(weights), runs.CACHE, MINI_WEIGHTS / "pipeline" / "tokenizer")
    folder = MINI_WEIGHTS / "pipeline" if weights == "mini" else Path(weights).expanduser()
    if is_hub_id(str(weights)):
        return _hub_folder(str(weights))
    index = read_config(folder / "model_index.json", "a diffusers pipeline folder")
    expect_class(weights, index, StableDiffusionPipeline)
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise BenchError(
            f"{weights}: expected a folder for each of {', '.join(COMPONENTS)}, found none for {', '.join(missing)}"
        )
    return folder


def weights_fingerprint(folder: str | Path) -> str:
    """Hash the content of every component's files, so that a cache notices when weights change."""
    folder = Path(folder)
    files = [path for name in COMPONENTS for path in sorted((folder / name).rglob("*")) if path.is_file()]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def resolution(folder: str | Path) -> int:
    """Pixels, width and height, of the images a pipeline was made for; read off its configuration files."""
    unet = read_config(Path(folder) / "unet" / "config.json", "a diffusers UNet folder")
    vae = read_config(Path(folder) / "vae" / "config.json", "a diffusers VAE folder")
    size = unet.get("sample_size")
    if not isinstance(size, int):
        raise BenchError(f"{folder}: expected a UNet for square latents, found sample_size {size}")
    return size * 2 ** (len(vae.get("block_out_channels", ())) - 1)


def load_unet(folder: str | Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Load a UNet saved in diffusers format, for instance `iter3/unet` of a run."""
    config = read_config(Path(folder) / "config.json", "a diffusers UNet folder")
    expect_class(folder, config, UNet2DConditionModel)
    try:
        return in_own_memory(UNet2DConditionModel.from_pretrained(folder, local_files_only=True).to(dtype))
    except Exception as error:
        raise BenchError(f"{folder} does not load as a UNet2DConditionModel: {first_line(error)}") from error


def in_own_memory(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Give every weight memory of its own, which torch aligns to 64 bytes.

    What safetensors reads lies anywhere in one block, by the length of the file's header, and on a CPU some kernels
    round by where their operands begin: equal weights from two files would make images that differ in the last bits.
    """
    for weight in unet.parameters():
        weight.data = weight.data.clone()
    return unet


def save_unet(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Save a UNet in diffusers format; `folder` appears whole or not at all."""
    folder = Path(folder)
    unfinished = temporary(folder)
    try:
        unet.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _hub_folder(weights: str) -> Path:
    """Check the small index before anything large is fetched."""
    try:
        expect_class(weights, StableDiffusionPipeline.load_config(weights), StableDiffusionPipeline)
        return Path(StableDiffusionPipeline.download(weights, **UNUSED))
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(f"{weights}: no such folder, and the hub failed: {first_line(error)}") from error


def read_config(path: Path, expected: str) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise BenchError(f"{path.parent}: no such folder (expected {expected})")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BenchError(f"{path.parent}: expected {expected}, found no {path.name}") from None
    except ValueError as error:
        raise BenchError(f"{path} is not valid JSON: {error}") from error


def expect_class(weights: str | Path, config: dict[str, Any], expected: type) -> None:
    found = config.get("_class_name", "no _class_name")
    if found != expected.__name__:
        raise BenchError(f"{weights}: expected a {expected.__name__}, found {found}")
