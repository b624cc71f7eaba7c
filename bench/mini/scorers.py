"""Teaching the miniature CLIP, PickScore and Aesthetic as their originals were, saved in the same formats.

Every training renders a pool of images first (with round trips through the autoencoder, because that is how
generated images look), goes on from its checkpoint when it was killed, and stores in
accuracy.json how often the finished scorer prefers the better of two held-out drawings (their exact utility).
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.data import drawings, world
from bench.data.drawings import Drawing
from bench.metrics.aesthetic import Aesthetic, head_layers
from bench.metrics.base import Metric
from bench.metrics.clip import CLIPScore
from bench.metrics.clip_family import ClipBackbone
from bench.metrics.pickscore import PickScore
from bench.mini.fit import fit
from bench.mini.pools import Pool, RoundTrip, pair_pool, pairwise, pool_of
from bench.storage.stages import atomic_write

WIDTH = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "hidden_act": "gelu"}
VISION = WIDTH | {"num_hidden_layers": 4, "image_size": world.SIZE, "patch_size": 8}
TEXT = WIDTH | {"num_hidden_layers": 2, "max_position_embeddings": 77}
PROJECTION = 128
MAX_LOGIT_SCALE = math.log(100)  # as in CLIP's own training
HEAD_SIZES = (PROJECTION, 128, 64, 32, 16, 1)
RATING_NOISE = 0.7  # standard deviation of a person's rating on the scale of 1 to 10
CLIP_STREAM, RATINGS_STREAM = 21, 22

QUALITY_WORDS = {
    "fade": "faded",
    "oversaturation": "garish",
    "blotches": "blotchy",
    "displacement": "crooked",
    "shadow": "dark",
}
"""People mention what is striking; this is how CLIP comes to know quality, on which Aesthetic builds."""


# --- CLIP: image and text find each other ---


def train_clip(
    folder: Path,
    checkpoint: Path,
    tokenizer: CLIPTokenizer,
    *,
    seed: int = 0,
    steps: int = 6000,
    batch_size: int = 128,
    lr: float = 1e-3,
    pool: int = 40_000,
    held_out: int = 2000,
    roundtrip: RoundTrip | None = None,
    samples: Pool | None = None,
    device: str = "cpu",
) -> None:
    """Contrastive training on drawings with alternative texts; saves a CLIPModel folder.

    Rows 2k and 2k + 1 of the pool differ in a few attributes and share a batch, so that details count.
    samples: generated images with their prompts, mixed in as they are.
    """
    torch.manual_seed(seed)
    model, processor = trainable(CLIPModel(clip_config(tokenizer)), device), image_processor()
    data = with_round_trips(alternative_pool(seed, pool // 2), roundtrip, samples)
    tokens = tokenise(tokenizer, data.captions)
    names = torch.from_numpy(np.unique(data.captions, return_inverse=True)[1])

    def loss(step: int) -> Tensor:
        rows = pick_pairs(seed, step, len(data), batch_size // 2)
        image, text = embed(model, processor, data.images[rows], tokens[rows], device)
        logits = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * image @ text.T
        # Two samples of one prompt are no negatives of each other.
        twins = (names[rows][:, None] == names[rows][None, :]).fill_diagonal_(False)
        logits = logits.masked_fill(twins.to(device), -math.inf)
        target = torch.arange(len(rows), device=device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    model = fit(model, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="CLIP", ema=0.995)
    save_clip(model, tokenizer, processor, folder)
    measure(CLIPScore.load(str(folder), device), folder, data, seed + 1, held_out, roundtrip)


def alternative_pool(seed: int, count: int) -> Pool:
    """`count` labelled drawings, each followed by one with some other attributes; with alternative texts."""
    items = []
    for index in range(count):
        rng = np.random.default_rng([seed, CLIP_STREAM, index])
        first, twin = drawings.labelled(seed, 2 * index), drawings.labelled(seed, 2 * index + 1)
        other = first.drawn
        while other == first.drawn:
            other = world.with_errors(first.drawn, rng, 0.15)
        second = replace(twin, asked=other, drawn=other, caption=world.caption(other, int(rng.integers(4))))
        items += [replace(item, caption=alternative_text(item, rng)) for item in (first, second)]
    return pool_of(items)


def alternative_text(drawing: Drawing, rng: np.random.Generator) -> str:
    """The caption, half of the time with words for the defects: "a faded, dark picture of a small ..."."""
    strong = [
        QUALITY_WORDS[name] for name, severity in zip(world.DEFECTS, drawing.defects, strict=True) if severity > 0.4
    ]
    words = strong or (["clean"] if max(drawing.defects) < 0.2 else [])
    if not words or rng.random() < 0.5:
        return drawing.caption
    return f"a {', '.join(words)} picture of {drawing.caption.removeprefix('a picture of ')}"


# --- PickScore: which of two images do people choose ---


def train_pickscore(
    folder: Path,
    checkpoint: Path,
    clip_folder: Path,
    *,
    seed: int = 0,
    steps: int = 4000,
    batch_size: int = 64,
    lr: float = 5e-4,
    pairs: int = 20_000,
    held_out: int = 2000,
    roundtrip: RoundTrip | None = None,
    samples: Pool | None = None,
    device: str = "cpu",
) -> None:
    """Fine-tune the miniature CLIP on choices between two images of one prompt (Kirstain et al. 2023).

    The probability of a choice is the softmax of exp(logit scale) * cosine over the two images; its target is the
    share of people who would choose so.

    batch_size: pairs a step. samples: rated pairs of generated images (rows 2k and 2k + 1).
    """
    torch.manual_seed(seed)
    clip = ClipBackbone.load(str(clip_folder), "clip")
    model, processor = trainable(copy.deepcopy(clip.model), device), clip.pixels.processor
    data = with_round_trips(pair_pool(seed, pairs, "train", rough=True), roundtrip, samples)
    tokens = tokenise(clip.tokenizer, data.captions[0::2])
    chosen = torch.from_numpy(shares(data.utility))

    def loss(step: int) -> Tensor:
        rows = pick_pairs(seed, step, len(data), batch_size)
        image, text = embed(model, processor, data.images[rows], tokens[rows[0::2] // 2], device)
        cosine = (image.unflatten(0, (-1, 2)) * text[:, None, :]).sum(-1)
        logits = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * cosine
        return cross_entropy(logits, chosen[rows[0::2] // 2].to(device))

    model = fit(model, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="PickScore", ema=0.995)
    save_clip(model, clip.tokenizer, processor, folder)
    measure(PickScore.load(str(folder), device), folder, data, seed + 1, held_out, roundtrip)


def shares(utility: np.ndarray) -> np.ndarray:
    """The share of people who choose each image of a pair, float32 [K, 2]: Bradley-Terry on the utilities [2K]."""
    first = 1 / (1 + np.exp((utility[1::2] - utility[0::2]) / drawings.LABEL_TEMPERATURE))
    return np.stack([first, 1 - first], axis=1).astype(np.float32)


# --- Aesthetic: a rating from the frozen image embedding ---


def train_aesthetic(
    folder: Path,
    checkpoint: Path,
    clip_folder: Path,
    *,
    seed: int = 0,
    steps: int = 3000,
    batch_size: int = 512,
    lr: float = 1e-3,
    pool: int = 20_000,
    held_out: int = 2000,
    roundtrip: RoundTrip | None = None,
    samples: Pool | None = None,
    device: str = "cpu",
) -> None:
    """Regress noisy ratings on the miniature CLIP's normalised image embeddings; saves head.safetensors."""
    torch.manual_seed(seed)
    head = head_layers(HEAD_SIZES).to(device)
    items = [drawings.labelled(seed, index) for index in range(pool)]
    data = with_round_trips(pool_of(items), roundtrip, samples)
    inputs = ClipBackbone.load(str(clip_folder), "clip", device).embed_images(data.images, 256).clone()
    noise = np.random.default_rng([seed, RATINGS_STREAM]).normal(0, RATING_NOISE, len(data))
    ratings = torch.from_numpy(rating(data.aesthetics) + noise).float()

    def loss(step: int) -> Tensor:
        rows = np.random.default_rng([seed, step]).integers(len(data), size=batch_size)
        torch.manual_seed(step)  # dropout
        return mse_loss(head(inputs[rows].to(device)).squeeze(1), ratings[rows].to(device))

    trained = fit(head, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="Aesthetic", ema=0.995)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"layers.{name}": value.contiguous() for name, value in trained.state_dict().items()},
        folder / "head.safetensors",
    )
    scorer = Aesthetic.load(str(folder / "head.safetensors"), device, backbone=str(clip_folder))
    measure(scorer, folder, data, seed + 1, held_out, roundtrip)


def rating(aesthetics: np.ndarray) -> np.ndarray:
    """Aesthetics in [0, 1] on a person's scale of 1 to 10."""
    return 1 + 9 * aesthetics


# --- shared ---


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A CLIP of about 1.4 million parameters for 64x64 pixels and the given vocabulary."""
    vocabulary = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shared = {"projection_dim": PROJECTION}
    return CLIPConfig(text_config=TEXT | vocabulary | shared, vision_config=VISION | shared, **shared)


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's own preprocessing at the miniature's size."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": world.SIZE}, crop_size={"height": world.SIZE, "width": world.SIZE}
    )


def trainable(model: CLIPModel, device: str) -> CLIPModel:
    """The model ready for training. On a CPU the fused attention's backward pass takes most of a step."""
    model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    return model.requires_grad_(True).to(device)


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil, folder: Path) -> None:
    """Save in transformers' format, weights in half precision."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)  # what the losses used
    model.half().save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = TEXT["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def with_round_trips(pool: Pool, roundtrip: RoundTrip | None, samples: Pool | None) -> Pool:
    """The pool, the round trips of its first half, and the samples. Pairs stay pairs."""
    parts = [pool]
    if roundtrip is not None:
        parts.append(pool.round_tripped(roundtrip, len(pool) // 4 * 2))
    if samples is not None:
        parts.append(samples)
    return sum(parts[1:], parts[0])


def pick_pairs(seed: int, step: int, rows: int, count: int) -> np.ndarray:
    """Rows of `count` random pairs, the two of a pair side by side: int64 [2 * count]."""
    pairs = np.random.default_rng([seed, step]).choice(rows // 2, size=min(count, rows // 2), replace=False)
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel()


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids, int64 [N, L], padded to the longest."""
    return tokenizer(
        captions, padding=True, truncation=True, max_length=TEXT["max_position_embeddings"], return_tensors="pt"
    ).input_ids


def embed(
    model: CLIPModel, processor: CLIPImageProcessorPil, images: np.ndarray, tokens: Tensor, device: str
) -> tuple[Tensor, Tensor]:
    """Normalised fp32 embeddings of images uint8 [N, 64, 64, 3] and tokens [M, L], with gradients."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        image = model.get_image_features(pixels.to(device)).pooler_output
        text = model.get_text_features(tokens.to(device)).pooler_output
    return normalize(image.float(), dim=-1), normalize(text.float(), dim=-1)


def measure(
    scorer: Metric, folder: Path, taught: Pool, seed: int, count: int, roundtrip: RoundTrip | None
) -> dict[str, Any]:
    """Store and return how often the scorer prefers the better of `count` held-out preference pairs.

    Beside accuracy.json stands training.json: who said what the images that it was `taught` are worth.
    """
    pairs = pair_pool(seed, count, "validation")
    seen = {"drawings": pairs}
    if roundtrip is not None:
        seen["round_trips"] = pairs.round_tripped(roundtrip)
    report = {}
    for name, pool in seen.items():
        scores = scorer.score(pool.images, pool.captions)
        report[name] = {
            "pairwise": pairwise(scores, pool.utility),
            "pairwise_aesthetics": pairwise(scores, pool.aesthetics),
        }
    atomic_write(folder / "accuracy.json", json.dumps(report, indent=1) + "\n")
    atomic_write(folder / "training.json", json.dumps(labels(len(taught), taught.judged), indent=1) + "\n")
    return report


def labels(images: int, judged: int) -> dict[str, Any]:
    """How many images a scorer was taught, and of how many the worth was read by the judge instead of known."""
    return {"images": images, "labelled_by_judge": judged, "share": round(judged / images, 4)}
