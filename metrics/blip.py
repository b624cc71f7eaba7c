"""BLIP's image encoder and image-grounded text encoder (Li et al. 2022), as far as ImageReward uses them.

The image encoder is a pre-norm ViT; the text encoder is a post-norm BERT whose every layer also attends to the
image. Sizes are read from the checkpoint; parameters are named as in the published one, module by module.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

IMAGE_HEAD_WIDTH = 64  # of every BLIP image encoder: 768 / 12 and 1024 / 16


@dataclass(frozen=True)
class TextConfig:
    """What `med_config.json` says and a state dict does not."""

    num_attention_heads: int
    layer_norm_eps: float = 1e-12


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of [B, L, D] to [B, M, D]; mask: bool, True where there is something to attend to."""
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


class ImageBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(x)).chunk(3, dim=2)
        x = x + self.attn["proj"](attend(query, key, value, x.shape[2] // IMAGE_HEAD_WIDTH))
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))


class ImageEncoder(nn.Module):
    """Pixels [B, 3, S, S] to one vector a patch, after that of the whole image: [B, 1 + P, D]."""

    def __init__(self, width: int, depth: int, patch: int, positions: int, hidden: int):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.blocks = nn.ModuleList(ImageBlock(width, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @property
    def image_size(self) -> int:
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        return side * self.patch_embed["proj"].kernel_size[0]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nn.Module):
    """norm(x + attention of x to `context`), BERT's way, with the names of its parameters."""

    def __init__(self, width: int, context_width: int, config: TextConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_width, width),
                "value": nn.Linear(context_width, width),
            }
        )
        self.output = Residual(width, width, config)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        read = attend(self.self["query"](x), self.self["key"](context), self.self["value"](context), self.heads, mask)
        return self.output(read, x)


class Residual(nn.Module):
    """norm(linear(x) + what it is added to)"""

    def __init__(self, inputs: int, width: int, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, added_to: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + added_to)


class TextLayer(nn.Module):
    """Attention to the text, to the image, then an MLP."""

    def __init__(self, width: int, image_width: int, hidden: int, config: TextConfig):
        super().__init__()
        self.attention = Attention(width, width, config)
        self.crossattention = Attention(width, image_width, config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = Residual(hidden, width, config)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, text, mask), image)
        return self.output(gelu(self.intermediate["dense"](x)), x)


class TextEncoder(nn.Module):
    """Tokens [B, L] with their mask, read together with image vectors [B, 1 + P, D]: the first token's vector [B, W].

    The last layer works for that token alone: no score needs what it would make of the others.
    """

    def __init__(
        self, vocabulary: int, positions: int, width: int, depth: int, image_width: int, hidden: int, config: TextConfig
    ):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(TextLayer(width, image_width, hidden, config) for _ in range(depth))}
        )

    def forward(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        positions = self.embeddings["position_embeddings"].weight[: tokens.shape[1]]
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens) + positions)
        seen = mask.bool()[:, None, None, :]
        *inner, last = self.encoder["layer"]
        for layer in inner:
            x = layer(x, x, seen, image)
        return last(x[:, :1], x, seen, image)[:, 0]


def count_layers(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def image_encoder(state: dict[str, Tensor], prefix: str) -> ImageEncoder:
    """An unfilled image encoder of the sizes in a state dict."""
    width, _, patch, _ = state[f"{prefix}patch_embed.proj.weight"].shape
    return ImageEncoder(
        width,
        count_layers(state, f"{prefix}blocks."),
        patch,
        state[f"{prefix}pos_embed"].shape[1],
        len(state[f"{prefix}blocks.0.mlp.fc1.bias"]),
    )


def text_encoder(state: dict[str, Tensor], prefix: str, config: TextConfig) -> TextEncoder:
    """An unfilled text encoder of the sizes in a state dict."""
    vocabulary, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    first = f"{prefix}encoder.layer.0."
    return TextEncoder(
        vocabulary,
        len(state[f"{prefix}embeddings.position_embeddings.weight"]),
        width,
        count_layers(state, f"{prefix}encoder.layer."),
        state[f"{first}crossattention.self.key.weight"].shape[1],
        len(state[f"{first}intermediate.dense.bias"]),
        config,
    )
