"""Networks and LoRAs in the forms in which people keep them; names of other programs are written out here by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from bench.models import adapters

if TYPE_CHECKING:
    from peft import PeftModel

RESNET = {  # diffusers' names inside a block -> those of Stability's LDM code (openaimodel.py)
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_OUTER = {"conv_norm_out": "norm_out", "group_norm": "norm", "conv_shortcut": "nin_shortcut", "to_out.0": "proj_out"}


def ldm_unet_name(name: str, layers: int, attention: tuple[bool, ...]) -> str:
    """LDM numbers all layers of one side in one row; `attention` says which up blocks have some."""
    for ours, theirs in OUTER.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    side, *rest = name.split(".")
    if side == "mid_block":
        kind, number, *inner = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        block, kind, number, *inner = rest
        first = int(block) * (layers + 1)
        if kind == "downsamplers":
            return ".".join([f"input_blocks.{first + layers + 1}.0.op", inner[-1]])
        if kind == "upsamplers":
            return ".".join([f"output_blocks.{first + layers}.{1 + attention[int(block)]}.conv", inner[-1]])
        place = (
            f"{'input' if side == 'down_blocks' else 'output'}_blocks.{first + int(number) + (side == 'down_blocks')}"
        )
        place += ".1" if kind == "attentions" else ".0"
    return ".".join([place, RESNET.get(inner[0], inner[0]), *inner[1:]])


def ldm_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A UNet's tensors as LDM names them, below model.diffusion_model."""
    attention = tuple("CrossAttn" in kind for kind in unet.config.up_block_types)
    layers = unet.config.layers_per_block
    return {
        f"model.diffusion_model.{ldm_unet_name(name, layers, attention)}": weight.detach().clone()
        for name, weight in unet.state_dict().items()
    }


def ldm_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    """A VAE's tensors as LDM names them: the decoder's blocks from the end, attention as 1x1 convolutions."""
    blocks, found = len(vae.config.block_out_channels), {}
    for name, weight in vae.state_dict().items():
        tensor, parts = weight.detach().clone(), name.split(".")
        if "mid_block.attentions" in name and weight.ndim == 2:
            tensor = tensor[:, :, None, None]
        if parts[1] in ("down_blocks", "up_blocks"):
            place = parts[2] if parts[1] == "down_blocks" else str(blocks - 1 - int(parts[2]))
            inner = (
                ["block", parts[4]] if parts[3] == "resnets" else [parts[3].removesuffix("rs").removesuffix("e") + "e"]
            )
            parts = [parts[0], parts[1].removesuffix("_blocks"), place, *inner, *parts[5:]]
        elif parts[1] == "mid_block":
            inner = f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"
            parts = [parts[0], "mid", inner, *parts[4:]]
        written = ".".join(parts)
        for ours, theirs in {**VAE_OUTER, "to_q": "q", "to_k": "k", "to_v": "v"}.items():
            written = written.replace(f".{ours}.", f".{theirs}.")
        found[f"first_stage_model.{written}"] = tensor
    return found


def ldm_checkpoint(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A whole checkpoint as trainers write it: UNet, VAE, text encoder, the noise schedule, some moving averages."""
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": weight.detach().clone()
        for name, weight in pipe.text_encoder.named_parameters()
    }
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(8)[None]}
    schedule = {"alphas_cumprod": torch.ones(1000), "betas": torch.ones(1000), "model_ema.decay": torch.ones(1)}
    return {**ldm_unet(unet), **ldm_vae(pipe.vae), **text, **positions, **schedule}


def adapter(unet: UNet2DConditionModel, rank: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Random factors (down, up) for a UNet's attention, by module."""
    generator = torch.Generator().manual_seed(seed)
    modules = {name: module for name, module in unet.named_modules() if name.endswith(adapters.TARGETS)}
    return {
        name: (
            torch.randn(rank, module.in_features, generator=generator) / 4,
            torch.randn(module.out_features, rank, generator=generator) / 4,
        )
        for name, module in modules.items()
    }


def write_kohya(factors: Mapping[str, tuple[Tensor, Tensor]], path: Path, alpha: float | None) -> Path:
    """sd-scripts' names: one flat word a module, and its alpha beside the factors."""
    tensors = {}
    for module, (down, up) in factors.items():
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors |= {} if alpha is None else {f"{flat}.alpha": torch.tensor(float(alpha))}
    save_file(tensors, path)
    return path


def write_diffusers(factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path, alpha: float) -> Path:
    """By diffusers: peft's layers under the pipeline's names, the configuration in the header."""
    rank = next(iter(factors.values()))[0].shape[0]
    layers = {
        f"{module}.{side}.weight": tensor
        for module, pair in factors.items()
        for side, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    said = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(factors)}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=said)
    return folder


def peft_model(
    unet: UNet2DConditionModel, factors: Mapping[str, tuple[Tensor, Tensor]], **changes: object
) -> PeftModel:
    """By peft: a wrapped copy with these factors, to be saved or merged."""
    from peft import LoraConfig, get_peft_model

    rank = next(iter(factors.values()))[0].shape[0]
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(factors), **changes}
    model = get_peft_model(copy.deepcopy(unet), LoraConfig(**settings))
    with torch.no_grad():
        for module, (down, up) in factors.items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A["default"].weight.copy_(down)
            layer.lora_B["default"].weight.copy_(up)
    return model


def write_old_diffusers(factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> Path:
    """Attention processors, as diffusers before peft (and SPO's published LoRA) wrote them."""
    folder.mkdir()
    tensors = {}
    for module, (down, up) in factors.items():
        block, _, layer = module.removesuffix(".0").rpartition(".")
        tensors |= {f"unet.{block}.processor.{layer}_lora.down.weight": down}
        tensors |= {f"unet.{block}.processor.{layer}_lora.up.weight": up}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder
