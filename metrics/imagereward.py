"""ImageReward: BLIP reading image and prompt together, tuned on human rankings (Xu et al. 2023)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertTokenizer

from bench.errors import BenchError, first_line
from bench.metrics import blip
from bench.metrics.aesthetic import head_layers, head_sizes
from bench.metrics.base import Images, Metric, Published, check_lengths, checkpoint_digest, find_weights
from bench.metrics.columns import Column
from bench.metrics.open_clip_format import read_checkpoint
from bench.metrics.pixels import ShortestSide
from bench.metrics.sharing import even_batches, pixel_batches
from bench.runtime.progress import track

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards on the authors' validation set
MAX_TOKENS = 35
TOKENIZER = "google-bert/bert-base-uncased"
MED_CONFIG = "med_config.json"
UNUSED = ("blip.vision_proj.", "blip.text_proj.")
"""Heads of BLIP's pretraining that the published file still holds and no score goes through."""
POSITIONS = "blip.text_encoder.embeddings.position_ids"


class Network(nn.Module):
    """The published model; parameters carry the names they have in ImageReward.pt."""

    def __init__(self, image: blip.ImageEncoder, text: blip.TextEncoder, head: nn.Sequential):
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": image, "text_encoder": text})
        self.mlp = nn.ModuleDict({"layers": head})

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rewards [B] for image vectors [B, 1 + P, D] and tokens [B, L]: (mlp(first text vector) - mean) / std.

        The head computes in fp32 whatever is around it: autocast would cast its inputs back, and a reward of bf16 has
        steps of 1/256 of itself.
        """
        read = self.blip["text_encoder"](tokens, mask, image).float()
        with torch.autocast(read.device.type, enabled=False):
            return (self.mlp["layers"](read).squeeze(1) - MEAN) / STD


class ImageReward(Metric):
    """The reward, about normal (mean 0, standard deviation 1) over the authors' validation images."""

    name = "imagereward"
    title = "ImageReward"
    columns = (Column(name, title, order=3, averaged=True),)
    published = Published("THUDM/ImageReward", "ImageReward.pt", "1.8 GB")

    def __init__(
        self, network: Network, tokenizer: BertTokenizer, checkpoint: str, device: str = "cpu", batch_size: int = 64
    ):
        self.network = network.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.pixels = ShortestSide(network.blip["visual_encoder"].image_size)
        self.checkpoint = checkpoint
        self.device = device
        self.batch_size = batch_size

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 64) -> ImageReward:
        """Load `ImageReward.pt` and the `med_config.json` beside it.

        BERT's vocabulary is looked for in the same folder, then under the name of its repository.
        """
        path = Path(find_weights(weights, "imagereward/ImageReward.pt", cls.published))
        path = path / cls.published.file if path.is_dir() else path
        network = build(read_checkpoint(path), read_config(path))
        beside = any((path.parent / name).exists() for name in ("vocab.txt", "tokenizer.json"))
        vocabulary = str(path.parent) if beside else find_weights(TOKENIZER, "imagereward")
        checkpoint = (
            f"{weights if weights == 'mini' else path.name} ({checkpoint_digest(path, config_path(path), vocabulary)})"
        )
        return cls(network, _open_tokenizer(vocabulary), checkpoint, device, batch_size)

    @torch.inference_mode()
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        check_lengths(images, prompts)
        scores = [np.empty(0, np.float32)]
        with track(None, "ImageReward", total=len(prompts), unit="image") as bar:
            batches = pixel_batches(images, self.pixels, self.batch_size, self.device)
            for pixels, asked in zip(batches, even_batches(prompts, self.batch_size), strict=True):
                scores.append(self._rewards(pixels, asked))
                bar.update(len(pixels))
        return np.concatenate(scores)

    def _rewards(self, pixels: Tensor, prompts: Sequence[str]) -> np.ndarray:
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(self.device).type == "cuda"):
            image = self.network.blip["visual_encoder"](pixels)
            rewards = self.network(image, tokens.input_ids, tokens.attention_mask)
        return rewards.float().cpu().numpy()

    def info(self) -> dict[str, str]:
        return {
            "version": "ImageReward v1.0",
            "checkpoint": self.checkpoint,
            "scale": f"(reward - {MEAN:.4f}) / {STD:.4f}, about -3 to 3",
            "preprocessing": self.pixels.describe(),
            "truncates": f"prompts after {MAX_TOKENS} tokens",
            "precision": "bf16 autocast" if torch.device(self.device).type == "cuda" else "fp32",
        }

    def count_truncated(self, prompts: Sequence[str]) -> int:
        lengths = {prompt: len(self.tokenizer(prompt).input_ids) for prompt in set(prompts)}
        return sum(lengths[prompt] > MAX_TOKENS for prompt in prompts)


def config_path(checkpoint: Path) -> Path:
    """`med_config.json` beside the checkpoint, else the published one."""
    path = checkpoint.with_name(MED_CONFIG)
    if path.is_file():
        return path
    return Path(find_weights("official", "", Published(ImageReward.published.repository, MED_CONFIG, "1 kB")))


def read_config(checkpoint: Path) -> blip.TextConfig:
    """The number of heads and the epsilon of the text encoder, from `med_config.json`."""
    path = config_path(checkpoint)
    try:
        given = json.loads(path.read_text())
        return blip.TextConfig(given["num_attention_heads"], given["layer_norm_eps"])
    except (ValueError, KeyError) as error:
        raise BenchError(f"{path} is not the configuration of a MED text encoder: {error!r}") from error


def build(state: dict[str, Tensor], config: blip.TextConfig) -> Network:
    """The filled network that a state dict in the published format describes; every tensor must find its place."""
    state = {name: value.float() for name, value in state.items() if name != POSITIONS and not name.startswith(UNUSED)}
    try:
        with torch.device("meta"):  # no time and memory for initial weights that are replaced
            head = {name.removeprefix("mlp."): value for name, value in state.items() if name.startswith("mlp.")}
            network = Network(
                blip.image_encoder(state, "blip.visual_encoder."),
                blip.text_encoder(state, "blip.text_encoder.", config),
                head_layers(head_sizes(head)),
            )
        network.load_state_dict(state, strict=True, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())[:300]
        raise BenchError(f"not an ImageReward checkpoint: {cause}") from error
    return network


def _open_tokenizer(source: str) -> BertTokenizer:
    try:
        return BertTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        cause = first_line(error)
        raise BenchError(
            f"ImageReward needs the vocabulary of bert-base-uncased (vocab.txt, 0.2 MB): put it beside "
            f"ImageReward.pt, or {TOKENIZER} into the folder that BENCH_WEIGHTS names ({cause})"
        ) from error
