"""The one way in which CLIP-family scorers load, preprocess and embed.

A backbone is loaded once per process however many metrics use it, a prompt is embedded once however often it
occurs, and inside `sharing.shared()` an image goes through each distinct backbone once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from bench.errors import BenchError, first_line
from bench.metrics import open_clip_format
from bench.metrics.base import FILE_SUFFIXES, Images, Metric, Published, check_lengths, checkpoint_digest, find_weights
from bench.metrics.pixels import CLIP_MEAN, CLIP_STD, LongestSide, ShortestSide, Transformers
from bench.metrics.sharing import even_batches, once, pixel_batches
from bench.runtime.progress import track

H14_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Holds the tokenizer and image settings of every scorer that was tuned from it: PickScore and HPS v2."""


@dataclass(frozen=True)
class Reading:
    """Whose way of reading images and prompts: "transformers", "open_clip" or "hpsv2" (see bench.metrics.pixels).

    antialias: of the resize of "hpsv2" alone; the other two resize with PIL, which always does.
    """

    style: str = "transformers"
    antialias: bool = True


TRANSFORMERS, OPEN_CLIP = Reading(), Reading("open_clip")

_loaded: WeakValueDictionary[tuple[str, str, str, Reading], ClipBackbone] = WeakValueDictionary()


class ClipBackbone:
    """A CLIP image and text encoder with its preprocessing; embeddings are L2-normalised fp32 [N, D]."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        processor: CLIPImageProcessorPil | None,
        checkpoint: str,
        device: str = "cpu",
        reading: Reading = TRANSFORMERS,
    ):
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.reading = reading
        self.max_tokens = model.config.text_config.max_position_embeddings
        self.checkpoint = checkpoint
        mean, std = (processor.image_mean, processor.image_std) if processor else (CLIP_MEAN, CLIP_STD)
        size, mean, std = model.config.vision_config.image_size, tuple(mean), tuple(std)
        self.pixels = {
            "transformers": lambda: Transformers(processor),
            "open_clip": lambda: ShortestSide(size, mean, std),
            "hpsv2": lambda: LongestSide(size, reading.antialias, mean, std),
        }[reading.style]()

    @classmethod
    def load(
        cls,
        weights: str,
        bundled: str,
        device: str = "cpu",
        processor: str | None = None,
        reading: Reading = TRANSFORMERS,
        published: Published | None = None,
        architecture: dict | None = None,
    ) -> ClipBackbone:
        """Load a folder or repository in transformers' CLIPModel format, or a file in open_clip's; once.

        weights, bundled, published: see `find_weights`.
        processor: where tokenizer and image settings are for a checkpoint that does not hold them itself.
        architecture: of an open_clip file that has no `open_clip_config.json` beside it.
        """
        source = find_weights(weights, bundled, published)
        folder = source if not source.endswith(FILE_SUFFIXES) else str(Path(source).parent)
        complete = any(Path(folder, name).exists() for name in ("tokenizer.json", "vocab.json"))
        settings = folder if complete or processor is None else find_weights(processor, bundled)
        key = (source, settings, device, reading)
        if (known := _loaded.get(key)) is not None:
            return known
        tokenizer = _open(CLIPTokenizer, settings)
        if source.endswith(FILE_SUFFIXES):
            described = open_clip_format.architecture(Path(source), architecture or open_clip_format.VIT_H_14)
            model, images = open_clip_format.load_model(Path(source), described, tokenizer.eos_token_id), None
            weights = Path(source).name if weights != "mini" else weights
        else:
            # Asked for explicitly: a checkpoint stored in half precision would otherwise also be run in it.
            model = _open(CLIPModel, source, dtype=torch.float32, output_loading_info=True)
            images = _open(CLIPImageProcessorPil, settings)
            weights = source if weights == "official" else weights
        checkpoint = f"{weights} ({checkpoint_digest(source, settings)})"
        backbone = cls(model, tokenizer, images, checkpoint, device, reading)
        _loaded[key] = backbone
        return backbone

    @property
    def logit_scale(self) -> float:
        """The factor by which the model multiplies a cosine: exp of its learned temperature."""
        return self.model.logit_scale.exp().item()

    def embed_images(self, images: Images, batch_size: int = 64) -> Tensor:
        """Normalised image embeddings: fp32 [N, D] on the CPU."""
        return once(
            self,
            images,
            lambda: self._embedded(
                pixel_batches(images, self.pixels, batch_size, self.device), len(images), "image", self._encode_images
            ),
        )

    def embed_texts(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Normalised text embeddings: fp32 [N, D] on the CPU; each distinct prompt is encoded once."""
        unique = sorted(dict.fromkeys(prompts), key=len)  # a batch is padded to its longest: like beside like
        row = {prompt: index for index, prompt in enumerate(unique)}
        table = self._embedded(even_batches(unique, batch_size), len(unique), "prompt", self._encode_texts)
        return table[[row[prompt] for prompt in prompts]]

    def cosine(self, images: Images, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Cosine of image i and prompt i: fp32 [N]."""
        return (self.embed_images(images, batch_size) * self.embed_texts(prompts)).sum(1)

    def describe_truncation(self) -> str:
        """What is cut off a long prompt, for the protocol."""
        return f"prompts after {self.max_tokens} tokens"

    def describe_precision(self) -> str:
        """In what precision the encoders run, for the protocol."""
        return "bf16 autocast" if torch.device(self.device).type == "cuda" else "fp32"

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of these prompts are longer than the text encoder reads."""
        lengths = {prompt: len(self.tokenizer(self._read(prompt)).input_ids) for prompt in set(prompts)}
        return sum(lengths[prompt] > self.max_tokens for prompt in prompts)

    def _read(self, prompt: str) -> str:
        return prompt if self.reading.style == "transformers" else open_clip_format.clean(prompt)

    def _encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixels).pooler_output

    def _encode_texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            [self._read(prompt) for prompt in prompts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.device)
        return self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output

    @torch.inference_mode()
    def _embedded(self, batches: Iterable[Any], total: int, unit: str, encode: Callable[[Any], Tensor]) -> Tensor:
        parts = [torch.empty(0, self.model.config.projection_dim)]
        with track(None, f"embedding {unit}s", total=total, unit=unit) as bar:
            for batch in batches:
                with torch.autocast("cuda", torch.bfloat16, enabled=torch.device(self.device).type == "cuda"):
                    encoded = encode(batch)
                parts.append(normalize(encoded.float(), dim=-1).cpu())
                bar.update(len(batch))
        return torch.cat(parts)


class CosineMetric(Metric):
    """A CLIP's cosine of image and prompt, times `factor`."""

    version: ClassVar[str]
    factor: float = 1.0
    scale: str = "cosine, -1 to 1"

    def __init__(self, backbone: ClipBackbone, batch_size: int = 64):
        self.backbone = backbone
        self.batch_size = batch_size

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        check_lengths(images, prompts)
        return (self.factor * self.backbone.cosine(images, prompts, self.batch_size)).numpy()

    def info(self) -> dict[str, str]:
        return {
            "version": self.version,
            "checkpoint": self.backbone.checkpoint,
            "scale": self.scale,
            "preprocessing": self.backbone.pixels.describe(),
            "truncates": self.backbone.describe_truncation(),
            "precision": self.backbone.describe_precision(),
        }

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return self.backbone.count_truncated(prompts)


def _open(kind: type, source: str, **options):
    """`kind.from_pretrained(source)`, with failures told in one line and incomplete weights refused."""
    try:
        opened = kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        cause = first_line(error)
        raise BenchError(
            f"cannot load a {kind.__name__} from '{source}' (looked on disk, in BENCH_WEIGHTS, "
            f"in the Hugging Face cache and online): {cause}"
        ) from error
    if not options.get("output_loading_info"):
        return opened
    model, report = opened
    # from_pretrained fills absent tensors with random values; a score from those would be worthless.
    faulty = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
    if faulty:
        raise BenchError(
            f"'{source}' is not a complete CLIP checkpoint: {len(faulty)} tensors missing, such as {faulty[0]}"
        )
    return model
