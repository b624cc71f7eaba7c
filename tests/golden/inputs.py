"""What the golden scores were made from, reproducible anywhere: pictures, prompts, and the filling of weights.

Runs in the official packages' old environment as well as in the project's; needs numpy, Pillow and torch alone.
Only raw bits of PCG64 are used, the one part of numpy's randomness that is promised never to change.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image

PROMPTS = [
    "a photo of a cat",
    "An astronaut riding a HORSE on mars, highly detailed, 8k!!",
    "\u201cCafé\u201d &amp; crème brûlée — déjà vu, it\u2019s naïve  \n ２０２６",
    "一只猫 and a 🦊 in the snow ❄️",
    "a very long prompt about " + ", ".join(f"object number {index} painted by hand" for index in range(24)),
    "",
]


LAST_NORMS = ("ln_post.bias", "ln_final.bias", "post_layernorm.bias", "final_layer_norm.bias")
PROJECTIONS = ("visual.proj", "text_projection", "visual_projection")
OFFSET = 0.5  # mean of what a CLIP's towers hand to their projections


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers between -1 and 1, float32, a function of the name and the shape alone."""
    seed = int.from_bytes(hashlib.sha256(f"{name}{tuple(shape)}".encode()).digest()[:8], "little")
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.random.PCG64(seed).random_raw((count + 1) // 2)
    return (raw.view(np.uint32)[:count].astype(np.float32) / 2**31 - 1).reshape(shape)


@torch.no_grad()
def fill(state: dict[str, torch.Tensor], gain: float = 1.0) -> dict[str, torch.Tensor]:
    """Pseudo-random weights for a state dict, in place: variance gain^2 / inputs for matrices, norms near 1.

    Scaled so that a deep network neither forgets its input nor explodes: scores must differ between inputs by far
    more than the tolerance they are compared with. Both projections of a CLIP share one direction, so that its
    cosines lie about 0.3, as a trained one's do: those of two unrelated vectors come close to 0, where a relative
    difference measures nothing but the rounding of a sum that cancels.
    """
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        noise = torch.from_numpy(np.asarray(uniform(name, tuple(value.shape))))
        if value.ndim == 0:
            value.fill_(2.6592 + 0.1 * noise.item())
        elif value.ndim == 1:
            centre = 1 if name.endswith("weight") else OFFSET if name.endswith(LAST_NORMS) else 0
            value.copy_(centre + 0.2 * noise)
        elif "embed" in name or "cls_token" in name:
            value.copy_(noise * 3**0.5 if value.shape[0] > 1000 else noise * 0.5)
        else:
            value.copy_(noise * (gain * (3 / value[0].numel()) ** 0.5))
        if name.removesuffix(".weight") in PROJECTIONS:
            joint = value if name.endswith(".weight") else value.T  # [joint, width], as in transformers
            shared = torch.from_numpy(uniform("shared direction", (len(joint),)))
            joint += shared[:, None] * (1.3 / (OFFSET * joint.shape[1]))
    return state


def pictures() -> list[Image.Image]:
    """Odd sizes and every mode that folders of images hold: RGB, RGBA with soft edges, grey, palette, square."""
    return [
        _picture("wide", 301, 187, "RGB"),
        _picture("tall", 97, 333, "RGBA"),
        _picture("grey", 261, 258, "L"),
        _picture("palette", 251, 224, "RGB").quantize(32),
        _picture("large", 512, 640, "RGB"),
        _picture("small", 53, 64, "RGB"),
    ]


def _picture(name: str, width: int, height: int, mode: str) -> Image.Image:
    """Soft waves of colour, a hard-edged disc, and fine noise, so that every way of resizing shows."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    waves = uniform(name, (channels, 4)).astype(np.float64)
    planes = [
        0.5 + 0.4 * np.sin((3 + 9 * abs(a)) * x / width + (3 + 9 * abs(b)) * y / height + 6 * c) + 0.1 * d
        for a, b, c, d in waves
    ]
    pixels = np.stack(planes, axis=2)
    disc = (x - width * 0.4) ** 2 + (y - height * 0.55) ** 2 < (0.25 * min(width, height)) ** 2
    pixels[disc] = 1 - pixels[disc]
    pixels += 0.15 * uniform(name + " noise", pixels.shape)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8).squeeze())


SMALL_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
"""ViT-H-14 with everything smaller but the image, the patches, the width of a head and the vocabulary."""
SMALL_CLIP_L = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 128, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 3},
}
LARGE_VIT = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
SMALL_VIT = {"embed_dim": 128, "depth": 3, "num_heads": 2}
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
SMALL_MED = MED_CONFIG | {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 3}
