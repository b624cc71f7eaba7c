"""The miniature's autoencoder: 64x64 pixels to an 8x8x4 latent, the class and the scaling of Stable Diffusion's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from bench.mini.fit import fit
from bench.runtime.progress import track

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": (24, 48, 96, 96),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
    "mid_block_add_attention": False,
}
KL_WEIGHT = 2e-4  # on the mean over latent elements: keeps latents near unit scale and smooth, costs no sharpness


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> fp32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Per-pixel loss that does not forget small coloured objects. Both [N, 3, H, W]; returns a scalar.

    Pixels count more the further they are from the image's median colour (its background); the chroma (what is left
    after the mean over channels) counts once more; a gradient term keeps edges sharp.
    """
    background = target.flatten(2).median(dim=2).values[..., None, None]
    weight = 1 + 3 * (target - background).abs().mean(dim=1, keepdim=True)
    error = output - target
    chroma = error - error.mean(dim=1, keepdim=True)
    pixels = weight * (error.abs() + 2 * error**2) + 2 * weight * (chroma.abs() + 2 * chroma**2)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return pixels.mean() + 0.15 * edges


def train(
    pool: np.ndarray,
    folder: Path,
    checkpoint: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int = 12,
    lr: float = 2e-3,
    device: str = "cpu",
) -> AutoencoderKL:
    """Train on a pool of images uint8 [N, 64, 64, 3] and save to `folder`; goes on from `checkpoint`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG).to(device)

    def loss(step: int) -> torch.Tensor:
        picks = np.random.default_rng([seed, step]).integers(len(pool), size=batch_size)
        images = to_tensor(pool[picks]).to(device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with torch.autocast(images.device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(output.float(), images) + KL_WEIGHT * kl

    vae = fit(vae, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="autoencoder", ema=0.995)
    vae.register_to_config(scaling_factor=round(float(1 / _latent_std(vae, pool[:1024])), 5))
    vae.save_pretrained(folder)
    return vae


@torch.inference_mode()
def _latent_std(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    device = next(vae.parameters()).device
    return torch.cat(
        [vae.encode(to_tensor(images[i : i + 64]).to(device)).latent_dist.mean for i in range(0, len(images), 64)]
    ).std()


@torch.inference_mode()
def roundtrip(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Encode (posterior mean) and decode uint8 images [N, 64, 64, 3]: what no diffusion model can be better than."""
    device = next(vae.parameters()).device
    out = []
    for start in track(range(0, len(images), batch_size), "round trips", unit="batch"):
        batch = to_tensor(images[start : start + batch_size]).to(device)
        with torch.autocast(batch.device.type, torch.bfloat16):
            decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample
        pixels = decoded.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
        out.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(out)


def psnr(images: np.ndarray, others: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images of uint8 [N, H, W, 3]."""
    error = ((images.astype(np.float32) - others) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-6))))
