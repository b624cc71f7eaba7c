"""Whether a model differs from a suite's base in its UNet alone, which is all that a suite lets differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from bench import models
from bench.errors import BenchError, first_line
from bench.models.tensors import same

FORWARD = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
"""Of a scheduler's settings: those a network was trained under. How it is sampled from is the suite's to say."""
SAID = {"v": "v_prediction", "epsilon": "epsilon"}  # modelspec.prediction_type, as trainers write it -> diffusers' word
TEXT, IMAGE = "cond_stage_model.", "first_stage_model."  # the names of an LDM checkpoint's text encoder and VAE


def expect_of_base(folder: Path, base: Path, name: str, variant: str | None) -> None:
    """Refuse a pipeline folder that differs from the base in more than its UNet."""
    if folder.resolve() == base.resolve():
        return
    one, other = _without_unet(folder, variant), _without_unet(base, None)
    different = [
        part for part in ("text_encoder", "vae") if not _equal(_weights(getattr(one, part)), getattr(other, part))
    ]
    words = [(pipe.tokenizer.get_vocab(), pipe.tokenizer.model_max_length) for pipe in (one, other)]
    different += [] if words[0] == words[1] else ["tokenizer"]
    different += [
        f"scheduler ({key} {one.scheduler.config.get(key)}, expected {other.scheduler.config.get(key)})"
        for key in FORWARD
        if _plain(one.scheduler.config.get(key)) != _plain(other.scheduler.config.get(key))
    ]
    refuse(different, name, base)


def expect_file_of_base(tensors: Mapping[str, Tensor], base: Path, name: str) -> None:
    """Refuse an LDM checkpoint that holds more than a UNet (`tensors`, without it), unless it is the base's."""
    if not tensors:
        return
    other, different = _without_unet(base, None), []
    text, image = ({key: value for key, value in tensors.items() if key.startswith(prefix)} for prefix in (TEXT, IMAGE))
    if text and not _equal(convert_ldm_clip_checkpoint(text), other.text_encoder):
        different.append("text_encoder")
    if image and not _equal(_converted(image, other.vae), other.vae):
        different.append("vae")
    rest = tensors.keys() - text.keys() - image.keys()
    refuse(different + ([f"{len(rest)} tensors like {min(rest)}"] if rest else []), name, base)


def expect_prediction(said: Mapping[str, str], base: Path, name: str) -> None:
    """Refuse a file whose header says that its network predicts something else than the base's."""
    found = said.get("modelspec.prediction_type")
    scheduler = models.read_config(base / "scheduler" / "scheduler_config.json", "a diffusers scheduler folder")
    expected = scheduler.get("prediction_type", "epsilon")
    if found and SAID.get(found, found) != expected:
        raise BenchError(f"{name}: its header says prediction_type {found}, expected {expected}, that of {base}")


def refuse(different: list[str], name: str, base: Path) -> None:
    if different:
        raise BenchError(
            f"{name}: its {' and '.join(different)} differ from those of {base}, and a suite compares UNets: name "
            f"{name}#unet to evaluate its UNet with the rest of the suite's base"
        )


def _without_unet(folder: Path, variant: str | None) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, requires_safety_checker=False, unet=None, variant=variant, **models.UNUSED
        )
    except Exception as error:
        raise BenchError(f"{folder} does not load as a pipeline: {first_line(error)}") from error


def _weights(part: torch.nn.Module) -> dict[str, Tensor]:
    return dict(part.named_parameters())


def _equal(found: Mapping[str, Tensor], part: torch.nn.Module) -> bool:
    """Whether tensors are a module's weights; `text_model.`, which transformers 5 leaves out, does not count, nor do
    the positions that older versions stored."""
    one = {key.removeprefix("text_model."): value for key, value in found.items() if not key.endswith("position_ids")}
    other = {key.removeprefix("text_model."): value for key, value in _weights(part).items()}
    return one.keys() == other.keys() and all(same(one[key], value.detach()) for key, value in other.items())


def _converted(image: dict[str, Tensor], vae: AutoencoderKL) -> dict[str, Tensor]:
    try:
        return convert_ldm_vae_checkpoint(image, vae.config)
    except (KeyError, AttributeError, IndexError):  # one with other blocks than the base's
        return {}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
