"""Teaching the miniature HPS v2 and ImageReward as their originals were, saved in the published formats.

HPS v2 learns from rankings of several images a prompt, ImageReward from rated pairs, reading image and prompt
together. Both report their held-out accuracy as the scorers of bench.mini.scorers do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer

from bench.data import drawings, world
from bench.data.drawings import Drawing
from bench.metrics import blip
from bench.metrics.aesthetic import head_layers
from bench.metrics.clip_family import ClipBackbone
from bench.metrics.hpsv2 import HPSv2
from bench.metrics.imagereward import MAX_TOKENS, MED_CONFIG, ImageReward, Network
from bench.metrics.open_clip_format import CONFIG_FILE, from_transformers
from bench.metrics.pixels import CLIP_MEAN, CLIP_STD, normalised
from bench.mini.fit import fit
from bench.mini.pools import Pool, RoundTrip, pair_pool, pool_of
from bench.mini.scorers import (
    MAX_LOGIT_SCALE,
    PROJECTION,
    TEXT,
    VISION,
    embed,
    measure,
    pick_pairs,
    shares,
    tokenise,
    trainable,
    with_round_trips,
)
from bench.mini.text import vocabulary_text

GROUP = 4  # images of a ranking
RANKED_STREAM, RANKING_STREAM = 31, 32
MED = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "add_cross_attention": True,
    "add_type_embeddings": False,
    "encoder_width": VISION["hidden_size"],
}
REWARD_HEAD = (MED["hidden_size"], 128, 64, 32, 16, 1)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# --- HPS v2: rankings of several images of one prompt ---


def train_hpsv2(
    folder: Path,
    checkpoint: Path,
    clip_folder: Path,
    *,
    seed: int = 0,
    steps: int = 1500,
    batch_size: int = 24,
    lr: float = 5e-4,
    rankings: int = 5000,
    held_out: int = 2000,
    roundtrip: RoundTrip | None = None,
    samples: Pool | None = None,
    device: str = "cpu",
) -> None:
    """Fine-tune the miniature CLIP on noisy rankings of `GROUP` images (Wu et al. 2023); saves hpsv2.pt.

    batch_size: rankings a step. rankings: even. samples: `GROUP` generated images of each prompt, in any order.
    """
    torch.manual_seed(seed)
    clip = ClipBackbone.load(str(clip_folder), "clip")
    model, processor = trainable(copy.deepcopy(clip.model), device), clip.pixels.processor
    data = with_round_trips(ranked_pool(seed, rankings), roundtrip, grouped(samples) if samples else None)
    tokens = tokenise(clip.tokenizer, data.captions[0::GROUP])

    def loss(step: int) -> Tensor:
        groups = np.random.default_rng([seed, step]).choice(len(tokens), min(batch_size, len(tokens)), replace=False)
        rows = (GROUP * groups[:, None] + np.arange(GROUP)).ravel()
        image, text = embed(model, processor, data.images[rows], tokens[groups], device)
        cosine = (image.unflatten(0, (-1, GROUP)) * text[:, None, :]).sum(-1)
        logits = model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * cosine
        order = torch.from_numpy(noisy_rankings(data.utility[rows], [seed, step]))  # another person's every time
        return plackett_luce(logits.gather(1, order.to(device)))

    model = fit(model, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="HPS v2", ema=0.995)
    save_hpsv2(model, clip.tokenizer, folder)
    measure(HPSv2.load(str(folder / "hpsv2.pt"), device), folder, data, seed + 1, held_out, roundtrip)


def plackett_luce(logits: Tensor) -> Tensor:
    """Mean negative log-probability of rankings whose logits [B, K] are given best first:
    sum_i (logsumexp(s_i..s_K) - s_i)."""
    rest = logits.flip(1).logcumsumexp(1).flip(1)
    return (rest - logits).sum(1).mean()


def ranked_pool(seed: int, count: int) -> Pool:
    """`count` times `GROUP` drawings of one caption: two thirds of the groups are of the generators that made the
    preference pairs, two drawings each; the others range from nearly right to an untrained generator's."""
    broad = dict.fromkeys(world.DEFECTS, (1.0, 2.5, 1.0))
    items = []
    for index in range(count):
        rng = np.random.default_rng([seed, RANKED_STREAM, index])
        rough = index % 3 == 2
        asked = world.random_scene(rng, counts=(1, 2, 2, 2, 3), split="train")
        text = world.caption(asked, int(rng.integers(world.CAPTION_VARIANTS)))
        for place in range(GROUP):
            rate, spread = (rng.uniform(0, 0.3), broad) if rough else drawings.GENERATORS[place % 2]
            items.append(
                Drawing(
                    text,
                    asked,
                    world.with_errors(asked, rng, rate),
                    drawings.severities(rng, spread),
                    int(rng.integers(2**62)),
                )
            )
    return pool_of(items)


def grouped(samples: Pool) -> Pool:
    """The rows of each prompt side by side."""
    order = np.argsort(np.array(samples.captions), kind="stable")
    return Pool(
        samples.images[order],
        [samples.captions[row] for row in order],
        samples.utility[order],
        samples.aesthetics[order],
        samples.judged,
    )


def noisy_rankings(utility: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Places best first, int64 [G, GROUP]: Plackett-Luce draws by the utilities [G * GROUP] (Gumbel's trick)."""
    noise = np.random.default_rng([*seed, RANKING_STREAM]).gumbel(size=len(utility))
    noisy = (utility / drawings.LABEL_TEMPERATURE + noise).reshape(-1, GROUP)
    return np.argsort(-noisy, axis=1)


def save_hpsv2(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """hpsv2.pt as HPS v2 is published, in half precision, with open_clip's configuration and the tokenizer."""
    model = copy.deepcopy(model).cpu().half()
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": from_transformers(model.state_dict())}, folder / "hpsv2.pt")
    described = {
        "embed_dim": PROJECTION,
        "vision_cfg": {
            "image_size": VISION["image_size"],
            "layers": VISION["num_hidden_layers"],
            "width": VISION["hidden_size"],
            "patch_size": VISION["patch_size"],
            "head_width": VISION["hidden_size"] // VISION["num_attention_heads"],
        },
        "text_cfg": {
            "context_length": TEXT["max_position_embeddings"],
            "vocab_size": len(tokenizer),
            "width": TEXT["hidden_size"],
            "heads": TEXT["num_attention_heads"],
            "layers": TEXT["num_hidden_layers"],
        },
    }
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=1))
    tokenizer.save_pretrained(folder)


# --- ImageReward: which of two images is better, image and prompt read together ---


def train_imagereward(
    folder: Path,
    checkpoint: Path,
    clip_folder: Path,
    *,
    seed: int = 0,
    steps: int = 3000,
    batch_size: int = 64,
    lr: float = 5e-4,
    pairs: int = 10_000,
    held_out: int = 2000,
    roundtrip: RoundTrip | None = None,
    samples: Pool | None = None,
    device: str = "cpu",
) -> None:
    """Train BLIP with its reward head on choices, -log sigmoid(r_winner - r_loser) (Xu et al. 2023), for the shares of
    people who would choose so.

    The image encoder starts from the miniature CLIP's blocks, in place of BLIP's pretraining.
    batch_size: pairs a step. samples: rated pairs of generated images (rows 2k and 2k + 1).
    """
    torch.manual_seed(seed)
    tokenizer = bert_tokenizer()
    network = new_network(len(tokenizer))
    start_from_clip(network.blip["visual_encoder"], ClipBackbone.load(str(clip_folder), "clip").model)
    network = network.to(device)
    data = with_round_trips(pair_pool(seed, pairs, "train", rough=True), roundtrip, samples)
    tokens = tokenizer(data.captions[0::2], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    chosen = torch.from_numpy(shares(data.utility))

    def loss(step: int) -> Tensor:
        rows = pick_pairs(seed, step, len(data), batch_size)
        torch.manual_seed(step)  # dropout of the head
        texts = rows // 2
        pixels = torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2) / 255
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            image = network.blip["visual_encoder"](normalised(pixels, CLIP_MEAN, CLIP_STD).to(device))
            rewards = network(image, tokens.input_ids[texts].to(device), tokens.attention_mask[texts].to(device))
        return cross_entropy(rewards.float().unflatten(0, (-1, 2)), chosen[texts[0::2]].to(device))

    trained = fit(network, loss, steps=steps, lr=lr, checkpoint=checkpoint, description="ImageReward", ema=0.995)
    save_imagereward(trained, tokenizer, folder)
    measure(ImageReward.load(str(folder / "ImageReward.pt"), device), folder, data, seed + 1, held_out, roundtrip)


def bert_tokenizer() -> BertTokenizer:
    """BERT's tokenizer with the words of the drawn world; other words fall apart into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-,.'"
    words = sorted({word for text in vocabulary_text() for word in text.split()} | set(letters))
    pieces = [*SPECIAL, *words, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, model_max_length=512)


def new_network(vocabulary: int) -> Network:
    """An untrained ImageReward of about 1.5 million parameters for 64x64 pixels."""
    side = VISION["image_size"] // VISION["patch_size"]
    image = blip.ImageEncoder(
        VISION["hidden_size"],
        VISION["num_hidden_layers"],
        VISION["patch_size"],
        side**2 + 1,
        VISION["intermediate_size"],
    )
    text = blip.TextEncoder(
        vocabulary,
        MED["max_position_embeddings"],
        MED["hidden_size"],
        MED["num_hidden_layers"],
        VISION["hidden_size"],
        MED["intermediate_size"],
        blip.TextConfig(MED["num_attention_heads"], MED["layer_norm_eps"]),
    )
    for embedding in (text.embeddings["word_embeddings"], text.embeddings["position_embeddings"]):
        torch.nn.init.normal_(embedding.weight, std=0.02)
    return Network(image, text, head_layers(REWARD_HEAD))


@torch.no_grad()
def start_from_clip(encoder: blip.ImageEncoder, clip: CLIPModel) -> None:
    """Copy patches, positions and blocks; CLIP's norm before the blocks has no place in BLIP and is left out."""
    vision = clip.vision_model
    encoder.patch_embed["proj"].weight.copy_(vision.embeddings.patch_embedding.weight)
    encoder.patch_embed["proj"].bias.zero_()
    encoder.pos_embed.copy_(vision.embeddings.position_embedding.weight[None])
    encoder.cls_token.copy_(vision.embeddings.class_embedding[None, None])
    for block, theirs in zip(encoder.blocks, vision.encoder.layers, strict=True):
        block.norm1.load_state_dict(theirs.layer_norm1.state_dict())
        block.norm2.load_state_dict(theirs.layer_norm2.state_dict())
        attention = theirs.self_attn
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(attention, f"{letter}_proj"), kind) for letter in "qkv"]
            getattr(block.attn["qkv"], kind).copy_(torch.cat(parts))
        block.attn["proj"].load_state_dict(attention.out_proj.state_dict())
        block.mlp["fc1"].load_state_dict(theirs.mlp.fc1.state_dict())
        block.mlp["fc2"].load_state_dict(theirs.mlp.fc2.state_dict())


def save_imagereward(network: Network, tokenizer: BertTokenizer, folder: Path) -> None:
    """ImageReward.pt and med_config.json as published, in half precision, with the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().half() for name, value in network.state_dict().items()}
    torch.save(state, folder / "ImageReward.pt")
    (folder / MED_CONFIG).write_text(json.dumps(MED | {"vocab_size": len(tokenizer)}, indent=1))
    tokenizer.save_pretrained(folder)
