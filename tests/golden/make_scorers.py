"""Golden scores of the published scorers' own code: run in their environment, never in the project's.

    python tests/golden/make_scorers.py WORK [--full]

The environment: bench/scoring/official/requirements.txt (its comment says how) and open-clip-torch 3.3.0 beside.
image-reward imports `clip`, which is clip-anytorch's, without declaring it; hpsv2's wheel lacks
`hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz`; the copy in clip-anytorch is the same file.

WORK holds BERT's vocabulary as WORK/bert-base-uncased/vocab.txt and CLIP's tokenizer files as WORK/clip-tokenizer
(vocab.json, merges.txt). Writes scorers.json beside this script: scores, token ids, the parts of both
vocabularies that the prompts need, and versions. With --full the models have their published sizes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import inputs

PACKAGES = (
    "hpsv2",
    "image-reward",
    "open-clip-torch",
    "clip-anytorch",
    "transformers",
    "torch",
    "torchvision",
    "timm",
    "fairscale",
    "ftfy",
    "pillow",
)


def grid(score) -> list[list[float]]:
    """Every picture (rows) with every prompt (columns)."""
    return [[score(picture, prompt) for prompt in inputs.PROMPTS] for picture in inputs.pictures()]


def products(image: torch.Tensor, text: torch.Tensor) -> list[list[float]]:
    return (image @ text.T).tolist()


@torch.no_grad()
def hps(config: dict) -> dict[str, list[list[float]]]:
    """hpsv2's model, transform and tokenizer, put together as its `score` does; with both kinds of resize."""
    from hpsv2.src.open_clip import get_tokenizer, transform
    from hpsv2.src.open_clip.model import CLIP

    preprocess = transform.image_transform(224, is_train=False, resize_longest_max=True)
    model = CLIP(**config, output_dict=True).eval()
    inputs.fill(model.state_dict())
    tokens = get_tokenizer("ViT-H-14")(inputs.PROMPTS)
    resize, found = transform.F.resize, {}
    for name, antialias in (("hpsv2", True), ("hpsv2_no_antialias", False)):
        # torchvision before 0.17 resized tensors without antialiasing.
        transform.F.resize = partial(resize, antialias=antialias)
        # An image with alpha keeps four channels here, which the model refuses; it is scored as its RGB part.
        pixels = torch.stack([preprocess(picture.convert("RGB")) for picture in inputs.pictures()])
        outputs = model(pixels, tokens)
        found[name] = products(outputs["image_features"], outputs["text_features"])
    transform.F.resize = resize
    return found


@torch.no_grad()
def clip(config: dict) -> tuple[list[list[float]], torch.Tensor]:
    """open_clip's CLIP with its transform and tokenizer; also the normalised image embeddings."""
    import open_clip
    from open_clip.model import CLIP
    from open_clip.transform import image_transform

    model = CLIP(**config).eval()
    inputs.fill(model.state_dict())
    preprocess = image_transform(224, is_train=False)
    image = model.encode_image(torch.stack([preprocess(picture) for picture in inputs.pictures()]), normalize=True)
    text = model.encode_text(open_clip.tokenize(inputs.PROMPTS), normalize=True)
    return products(image, text), image


@torch.no_grad()
def pickscore(work: Path, config: dict) -> list[list[float]]:
    """transformers' CLIPModel and CLIPProcessor, used as the model card of PickScore does."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    processor = CLIPProcessor(CLIPImageProcessor(), CLIPTokenizerFast.from_pretrained(work / "clip-tokenizer"))
    model = CLIPModel(hf_config(config)).eval()
    inputs.fill(model.state_dict())
    image = processor(images=inputs.pictures(), padding=True, truncation=True, max_length=77, return_tensors="pt")
    text = processor(text=inputs.PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    image, text = model.get_image_features(**image), model.get_text_features(**text)
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    return products(model.logit_scale.exp() * image, text)


def hf_config(config: dict):
    """The same sizes in transformers' names, with the published end-of-text token."""
    from transformers import CLIPConfig

    vision, text = config["vision_cfg"], config["text_cfg"]
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "image_size": 224,
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "patch_size": 14,
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "hidden_act": "gelu",
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "eos_token_id": 49407,
            "bos_token_id": 49406,
        },
    )


def heads(embeddings: torch.Tensor) -> dict[str, list[float]]:
    """LAION's two heads, written as their repositories write them, on normalised image embeddings."""
    from torch import nn

    width = embeddings.shape[1]
    layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()
    v2, v1 = nn.ModuleDict({"layers": layers}), nn.Linear(width, 1)
    with torch.no_grad():
        for head in (v1, v2):
            inputs.fill(head.state_dict(), 3.0)
        found = {
            "aesthetic": layers(embeddings).squeeze(1).tolist(),
            "aesthetic_v1": v1(embeddings).squeeze(1).tolist(),
        }
        released = Path(os.environ.get("BENCH_WEIGHTS", ""), "sac+logos+ava1-l14-linearMSE.pth")
        if width == 768 and released.is_file():
            v2.load_state_dict(torch.load(released, map_location="cpu", weights_only=True))
            found["aesthetic_released"] = layers(embeddings).squeeze(1).tolist()
    return found


def imagereward(work: Path, full: bool) -> list[list[float]]:
    """ImageReward's own class; for the small one its BLIP is asked for a smaller image encoder."""
    published = import_module("ImageReward.ImageReward")  # the package's attribute of this name is the class
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    config = inputs.MED_CONFIG if full else inputs.SMALL_MED
    path = work / "med_config.json"
    path.write_text(json.dumps(config))
    if not full:
        small = VisionTransformer(img_size=224, patch_size=16, **inputs.SMALL_VIT)
        blip_pretrain.create_vit = lambda *_: (small, inputs.SMALL_VIT["embed_dim"])
        head = published.MLP
        published.MLP = lambda _: head(config["hidden_size"])
    with contextlib.chdir(work):
        model = published.ImageReward(med_config=str(path), device="cpu").eval()
    state = model.state_dict()
    inputs.fill(state, IMAGEREWARD_GAIN)
    with torch.no_grad():
        return grid(lambda picture, prompt: model.score(prompt, picture))


IMAGEREWARD_GAIN = 1.6


def token_ids(work: Path) -> dict[str, list[list[int]]]:
    """What each official tokenizer makes of the prompts, unpadded."""
    from hpsv2.src.open_clip import get_tokenizer
    from transformers import BertTokenizer, CLIPTokenizerFast

    bert = BertTokenizer.from_pretrained(work / "bert-base-uncased")
    fast = CLIPTokenizerFast.from_pretrained(work / "clip-tokenizer")
    rows = get_tokenizer("ViT-H-14")(inputs.PROMPTS)
    return {
        "open_clip": [row[: row.argmax() + 1].tolist() for row in rows],
        "transformers": [fast(text, truncation=True, max_length=77).input_ids for text in inputs.PROMPTS],
        "bert": [bert(text, truncation=True, max_length=35).input_ids for text in inputs.PROMPTS],
    }


def vocabularies(work: Path, ids: dict[str, list[list[int]]]) -> dict:
    """The words and merges that the prompts need, with their published numbers.

    Byte-pair encoding applies the first merge of the list that fits. Leaving out merges that are never applied
    to a text cannot change what is applied to it; the same holds for words that are never the longest match.
    """
    from hpsv2.src.open_clip import tokenizer as open_clip_tokenizer

    simple = open_clip_tokenizer.SimpleTokenizer()
    reached: dict[str, None] = {}
    ranks = {a + b: (a, b) for a, b in simple.bpe_ranks}

    def parts(token: str) -> None:
        reached[token] = None
        if token in ranks:
            for part in ranks[token]:
                parts(part)

    for text in inputs.PROMPTS:  # of whole prompts, not of their first 77 tokens
        for number in simple.encode(text):
            parts(simple.decoder[number])
    from transformers import BertTokenizer, CLIPTokenizerFast

    fast = CLIPTokenizerFast.from_pretrained(work / "clip-tokenizer")
    for text in inputs.PROMPTS:
        for token in fast.tokenize(text):
            parts(token)
    merges = sorted((simple.bpe_ranks[ranks[token]], *ranks[token]) for token in reached if token in ranks)
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    words = [*reached, *renamed]
    bert = BertTokenizer.from_pretrained(work / "bert-base-uncased")
    pieces = {piece for text in inputs.PROMPTS for piece in bert.tokenize(text)} | set(bert.all_special_tokens)
    return {
        "clip": {renamed.get(word, word): simple.encoder[word] for word in words},
        "merges": [[first, second] for _, first, second in merges],
        "bert": {piece: bert.convert_tokens_to_ids(piece) for piece in sorted(pieces)},
    }


def main() -> None:
    work, full = Path(sys.argv[1]).resolve(), "--full" in sys.argv
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    from open_clip import get_model_config

    large = {name: get_model_config(name) for name in ("ViT-H-14", "ViT-L-14")}
    h14 = large["ViT-H-14"] if full else inputs.SMALL_CLIP
    l14 = large["ViT-L-14"] | {"quick_gelu": True} if full else inputs.SMALL_CLIP_L
    made: dict = {"versions": {name: version(name) for name in PACKAGES}, "full_size": full, "scores": {}}
    scores = made["scores"]
    scores |= hps(h14)
    gc.collect()
    for name, job in {
        "clip": lambda: clip(h14)[0],
        "pickscore": lambda: pickscore(work, h14),
        "imagereward": lambda: imagereward(work, full),
    }.items():
        scores[name] = job()
        gc.collect()
    scores["clip_l14"], embeddings = clip(l14)
    scores |= heads(embeddings)
    for name, values in scores.items():
        describe(name, values)
    made["tokens"] = token_ids(work)
    target = Path(__file__).with_name("scorers_full.json" if full else "scorers.json")
    if not full:
        made["vocabulary"] = vocabularies(work, made["tokens"])
    target.write_text(json.dumps(made, indent=None, separators=(",", ":"), ensure_ascii=False) + "\n")
    print(target)


def describe(name: str, values: list) -> None:
    """How much scores differ between pictures and between prompts: the worth of the golden."""
    table = torch.tensor(values)
    prompts = f", over prompts {table.std(1).mean():.4f}" if table.ndim == 2 else ""
    print(f"{name}: mean {table.mean():.4f}, spread over pictures {table.std(0).mean():.4f}{prompts}")


if __name__ == "__main__":
    main()
