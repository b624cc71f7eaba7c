"""A UNet in one file: as Stability's LDM code and most trainers write it, or with diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from bench.errors import BenchError, UsageError
from bench.models import networks, parts, tensors

LDM = ("model.diffusion_model.", "diffusion_model.", "")  # before its names: as LDM, as ComfyUI, as some write them
SCHEDULE = re.compile(
    r"alphas_cumprod|betas$|sqrt_|log_one_minus_|posterior_|lvlb_weights|logvar|scale_factor|denoiser\.sigmas|model_ema\."
)
"""What LDM stores of its noise schedule, and the moving average, which diffusers leaves out too."""


def read_network(path: Path, base: Path, name: str, network_alone: bool) -> dict[str, Tensor]:
    """The UNet in a file, by diffusers' names.

    Whatever else the file holds must be the base's, unless the network alone was asked for. Raises BenchError for a
    network of another architecture or prediction type than the base's.
    """
    found = {key: value for key, value in tensors.read_tensors(path).items() if not SCHEDULE.match(key)}
    parts.expect_prediction(tensors.metadata(path), base, name)
    if any("lora_" in key or ".lora." in key for key in found):
        raise UsageError(f"{name} holds a LoRA, no whole network: write lora:{name}")
    ldm = next((prefix for prefix in LDM if any(key.startswith(f"{prefix}input_blocks.") for key in found)), None)
    prefix = ldm or ("unet." if ldm is None and any(key.startswith("unet.") for key in found) else "")
    network = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    if not network_alone:
        parts.expect_file_of_base(
            {key: value for key, value in found.items() if not key.startswith(prefix)}, base, name
        )
    if ldm is not None:
        return _from_ldm(network, base, name)
    if "conv_in.weight" not in network:
        example = f"names like {min(network)}" if network else "no tensors"
        raise BenchError(f"{name}: expected a UNet with LDM's or diffusers' names, found {example}")
    return network


def _from_ldm(network: Mapping[str, Tensor], base: Path, name: str) -> dict[str, Tensor]:
    """LDM's names to diffusers', which depend on how many layers the base has in a block."""
    config = dict(networks.empty(base).config)
    try:
        converted = convert_ldm_unet_checkpoint({LDM[0] + key: value for key, value in network.items()}, config)
    except (KeyError, IndexError) as error:
        raise BenchError(f"{name} is no network of the suite's architecture: it has no {error}") from error
    if len(converted) != len(network):
        raise BenchError(
            f"{name} is no network of the suite's architecture: of its {len(network)} tensors {len(converted)} have a "
            f"place in that of {base}"
        )
    return converted
