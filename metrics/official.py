"""What the official scorers are made of: their files, where those are on this machine, and what a score costs.

Nothing here loads weights or goes to the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPModel

from bench.metrics import aesthetic, blip, clip_family, hpsv2, imagereward, pickscore
from bench.metrics.base import Cost, Metric, Published
from bench.metrics.clip import CLIPScore, CLIPScoreL14
from bench.metrics.open_clip_format import VIT_H_14, VIT_L_14, clip_config
from bench.mini import MINI_WEIGHTS
from bench.runtime.hub import is_hub_id

CLIP_L = CLIPScoreL14.published
H14_SETTINGS = Published(clip_family.H14_REPOSITORY, "tokenizer.json", "2 MB")
READINGS = Published(clip_family.H14_REPOSITORY, "preprocessor_config.json", "1 kB")
MED = Published(imagereward.ImageReward.published.repository, imagereward.MED_CONFIG, "1 kB")
VOCABULARY = Published(imagereward.TOKENIZER, "vocab.txt", "0.2 MB")
SETTINGS = (H14_SETTINGS, READINGS, VOCABULARY)
"""Read from a repository as a whole: tokenizer and image settings."""

FILES: dict[str, tuple[Published, ...]] = {
    "pickscore": (pickscore.PickScore.published, H14_SETTINGS, READINGS),
    "pickscore_cosine": (pickscore.PickScore.published, H14_SETTINGS, READINGS),
    "hpsv2": (hpsv2.HPSv2.published, H14_SETTINGS),
    "hpsv21": (hpsv2.HPSv21.published, H14_SETTINGS),
    "imagereward": (imagereward.ImageReward.published, MED, VOCABULARY),
    "aesthetic": (Published(aesthetic.Aesthetic.source, aesthetic.Aesthetic.file, "3.7 MB"), CLIP_L),
    "aesthetic_v1": (Published(aesthetic.AestheticV1.source, aesthetic.AestheticV1.file, "4 kB"), CLIP_L),
    "clip": (CLIPScore.published,),
    "clip_l14": (CLIPScoreL14.published,),
}
"""What `weights: official` reads, by metric."""

MINI_FILES: dict[str, tuple[str, ...]] = {
    "pickscore": ("pickscore/model.safetensors",),
    "pickscore_cosine": ("pickscore/model.safetensors",),
    "hpsv2": (hpsv2.HPSv2.bundled,),
    "hpsv21": (hpsv2.HPSv21.bundled,),
    "imagereward": ("imagereward/ImageReward.pt",),
    "aesthetic": (aesthetic.Aesthetic.bundled, "clip/model.safetensors"),
    "aesthetic_v1": (aesthetic.AestheticV1.bundled, "clip/model.safetensors"),
    "clip": ("clip/model.safetensors",),
    "clip_l14": ("clip/model.safetensors",),
    "judge": ("judge/judge.safetensors",),
    "judge2": ("judge2/judge.safetensors",),
}
"""What `weights: mini` reads, below the folder of the bundled weights."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
MODEL_FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
CLIP_H, CLIP_L14 = "CLIP ViT-H/14", "CLIP ViT-L/14"
ENCODERS: dict[str, tuple[str, bool]] = {
    "pickscore": ("PickScore", True),
    "pickscore_cosine": ("PickScore", True),
    "hpsv2": ("HPS v2.0", True),
    "hpsv21": ("HPS v2.1", True),
    "imagereward": ("ImageReward", True),
    "aesthetic": (CLIP_L14, False),
    "aesthetic_v1": (CLIP_L14, False),
    "clip": (CLIP_H, True),
    "clip_l14": (CLIP_L14, True),
}
"""Which model a metric runs, and whether it reads the prompt; metrics with the same model share its pass."""


class Found(NamedTuple):
    """A file a scorer reads, and where it is; `path` None when it is not on this machine."""

    published: Published
    path: Path | None

    @property
    def name(self) -> str:
        return self.published.file or self.published.repository


def needed(metric: type[Metric], weights: str) -> list[Found]:
    """The files behind a metric's `weights`, each looked up as `find_weights` does, short of downloading it."""
    if weights == "mini":
        files = [MINI_WEIGHTS / name for name in MINI_FILES.get(metric.name, ())]
        return [
            Found(
                Published("this repository", path.relative_to(MINI_WEIGHTS).as_posix(), ""),
                path if path.is_file() else None,
            )
            for path in files
        ]
    official = FILES.get(metric.name) or tuple(filter(None, [metric.published]))
    if weights != "official":
        own = Published(weights, None, "") if is_hub_id(weights) else Published("", weights, "")
        official = (own, *official[1:])
    first = locate(official[0]) if official else None
    folder = first if first is None or first.is_dir() else first.parent
    return [Found(item, first if item is official[0] else _beside(folder, item) or locate(item)) for item in official]


def _beside(folder: Path | None, item: Published) -> Path | None:
    """A small file that may lie with the weights it goes with; a tokenizer there brings its image settings too."""
    if folder is None or item not in (*SETTINGS, MED):
        return None
    names = (item.file, *(TOKENIZER_FILES if item in (H14_SETTINGS, VOCABULARY) else ()))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def locate(item: Published) -> Path | None:
    """A path, `$BENCH_WEIGHTS/<name>`, `$BENCH_WEIGHTS/<last part>`, or the Hugging Face cache.

    What is read from a whole repository (tokenizer, image settings) counts only in a folder of its name.
    """
    whole = item in SETTINGS
    name = Path(item.repository if whole or not item.file else item.file).expanduser()
    places = [name]
    if os.environ.get("BENCH_WEIGHTS"):
        root = Path(os.environ["BENCH_WEIGHTS"]).expanduser()
        places += [root / name, root / name.name]
    places = [place / item.file for place in places] if whole else places
    return next((place.resolve() for place in places if place.exists()), None) or _cached(item)


def _cached(item: Published) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if item.repository.count("/") != 1:
        return None
    names: Iterable[str] = (item.file,) if item.file else MODEL_FILES
    found = (try_to_load_from_cache(item.repository, name) for name in names)
    path = next((Path(path) for path in found if isinstance(path, str)), None)
    return path if path is None or item.file else path.parent


# --- what a score costs ---


def cost(names: Iterable[str]) -> Cost:
    """Of these metrics together; a model that several of them use runs once, over the prompt if any asks for it."""
    reads: dict[str, bool] = {}
    for name in names:
        model, text = ENCODERS[name]
        reads[model] = reads.get(model, False) or text
    parts = [(_costs(model), text) for model, text in reads.items()]
    return Cost(
        sum(image + (prompt if text else 0) for (image, prompt, _), text in parts),
        sum(weights for (_, _, weights), _ in parts),
    )


@lru_cache
def _costs(model: str) -> tuple[int, int, int]:
    """Operations for an image and for a prompt, and bytes of weights."""
    with torch.device("meta"):
        if model == "ImageReward":
            return _blip_costs()
        described = VIT_L_14 if model == CLIP_L14 else VIT_H_14
        clip = CLIPModel(clip_config(described, end_token=49407))
        size, length = described["vision_cfg"]["image_size"], described["text_cfg"]["context_length"]
        pixels, tokens = torch.empty(1, 3, size, size), torch.zeros(1, length, dtype=torch.long)
        return (
            _count(lambda: clip.get_image_features(pixels)),
            _count(lambda: clip.get_text_features(tokens)),
            _bytes(clip),
        )


def _blip_costs() -> tuple[int, int, int]:
    """BLIP-large: ViT-L/16 at 224 pixels, BERT-base with cross-attention over 35 tokens."""
    image = blip.ImageEncoder(width=1024, depth=24, patch=16, positions=197, hidden=4096)
    text = blip.TextEncoder(30524, 512, 768, 12, image_width=1024, hidden=3072, config=blip.TextConfig(12))
    tokens = torch.zeros(1, imagereward.MAX_TOKENS, dtype=torch.long)
    seen = torch.empty(1, 197, 1024)
    return (
        _count(lambda: image(torch.empty(1, 3, 224, 224))),
        _count(lambda: text(tokens, torch.ones_like(tokens), seen)),
        _bytes(image) + _bytes(text),
    )


def _count(call) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter.get_total_flops()


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * 4 for parameter in module.parameters())
