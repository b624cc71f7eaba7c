"""The one way in which CLIP-family scorers load, preprocess and embed.

A backbone is loaded once per process however many metrics use it, a prompt is embedded once however often it
occurs, and inside `shared_embeddings()` an image goes through each distinct backbone once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import PILImageResampling

from bench.errors import BenchError
from bench.progress import track
from metrics.base import Images, find_weights, to_rgb, weights_digest

_loaded: WeakValueDictionary[tuple[str, str, str], ClipBackbone] = WeakValueDictionary()
_shared: dict[tuple[int, int], tuple[Images, Tensor]] | None = None


@contextmanager
def shared_embeddings() -> Iterator[None]:
    """Within the block, scorers with equal backbones share one pass over the same `images` object."""
    global _shared
    outer, _shared = _shared, {}
    try:
        yield
    finally:
        _shared = outer


class ClipBackbone:
    """A CLIP image and text encoder with its preprocessing; embeddings are L2-normalised fp32 [N, D]."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil,
                 checkpoint: str, device: str = "cpu"):
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.processor = processor
        self.device = device
        self.max_tokens = model.config.text_config.max_position_embeddings
        self.checkpoint = f"{checkpoint} ({weights_digest(model)})"

    @classmethod
    def load(cls, weights: str, bundled: str, device: str = "cpu",
             processor: str | None = None) -> ClipBackbone:
        """Load a folder or repository in transformers' CLIPModel format, or return it if it is loaded.

        weights, bundled: see `find_weights`.
        processor: where tokenizer and image settings are for a checkpoint that does not hold them itself.
        """
        source = find_weights(weights, bundled)
        complete = Path(source, "preprocessor_config.json").exists()
        settings = source if complete or processor is None else find_weights(processor, bundled)
        key = (source, settings, device)
        if (known := _loaded.get(key)) is not None:
            return known
        # Asked for explicitly: a checkpoint stored in half precision would otherwise also be run in it.
        model = _open(CLIPModel, source, dtype=torch.float32, output_loading_info=True)
        tokenizer = _open(CLIPTokenizer, settings)
        backbone = cls(model, tokenizer, _open(CLIPImageProcessorPil, settings), weights, device)
        _loaded[key] = backbone
        return backbone

    @property
    def logit_scale(self) -> float:
        """The factor by which the model multiplies a cosine: exp of its learned temperature."""
        return self.model.logit_scale.exp().item()

    def embed_images(self, images: Images, batch_size: int = 32) -> Tensor:
        """Normalised image embeddings: fp32 [N, D] on the CPU."""
        key = (id(self), id(images))
        if _shared is not None and key in _shared:
            return _shared[key][1]
        embeddings = self._batched(images, batch_size, "embedding images", "image", self._encode_images)
        if _shared is not None:
            # The images are kept beside the result so that their id cannot be reused while it is stored.
            _shared[key] = (images, embeddings)
        return embeddings

    def embed_texts(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Normalised text embeddings: fp32 [N, D] on the CPU; each distinct prompt is encoded once."""
        unique = list(dict.fromkeys(prompts))
        row = {prompt: index for index, prompt in enumerate(unique)}
        table = self._batched(unique, batch_size, "embedding prompts", "prompt", self._encode_texts)
        return table[[row[prompt] for prompt in prompts]]

    def cosine(self, images: Images, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Cosine of image i and prompt i: fp32 [N]."""
        return (self.embed_images(images, batch_size) * self.embed_texts(prompts)).sum(1)

    def preprocess(self, images: Images) -> Tensor:
        """Pixels as the image encoder sees them: fp32 [N, 3, S, S]."""
        return self.processor(images=[to_rgb(image) for image in images], return_tensors="pt")["pixel_values"]

    def describe_preprocessing(self) -> str:
        """The image preprocessing in words, for the protocol."""
        given = self.processor
        size = ", ".join(f"{name} {value}" for name, value in dict(given.size).items() if value is not None)
        crop = dict(given.crop_size)
        mean, std = ([round(value, 4) for value in row] for row in (given.image_mean, given.image_std))
        resample = PILImageResampling(given.resample).name.lower()
        return (f"RGB (alpha dropped), PIL {resample} resize to {size}, "
                f"centre crop {crop['height']}x{crop['width']}, mean {mean}, std {std}")

    def describe_truncation(self) -> str:
        """What is cut off a long prompt, for the protocol."""
        return f"prompts after {self.max_tokens} tokens"

    def _encode_images(self, images: Images) -> Tensor:
        return self.model.get_image_features(self.preprocess(images).to(self.device)).pooler_output

    def _encode_texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.max_tokens,
                                return_tensors="pt").to(self.device)
        return self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output

    @torch.inference_mode()
    def _batched(self, items: Images | Sequence[str], size: int, description: str, unit: str,
                 encode: Callable[[Images | Sequence[str]], Tensor]) -> Tensor:
        parts = [torch.empty(0, self.model.config.projection_dim)]
        with track(None, description, total=len(items), unit=unit) as bar:
            for start in range(0, len(items), size):
                batch = items[start:start + size]
                parts.append(normalize(encode(batch).float(), dim=-1).cpu())
                bar.update(len(batch))
        return torch.cat(parts)


def _open(kind: type, source: str, **options):
    """`kind.from_pretrained(source)`, with failures told in one line and incomplete weights refused."""
    try:
        opened = kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0]
        raise BenchError(f"cannot load a {kind.__name__} from '{source}' (looked on disk, in BENCH_WEIGHTS, "
                         f"in the Hugging Face cache and online): {cause}") from error
    if not options.get("output_loading_info"):
        return opened
    model, report = opened
    # from_pretrained fills absent tensors with random values; a score from those would be worthless.
    faulty = sorted(map(str, [*report["missing_keys"], *report.get("mismatched_keys", [])]))
    if faulty:
        raise BenchError(f"'{source}' is not a complete CLIP checkpoint: {len(faulty)} tensors missing, "
                         f"such as {faulty[0]}")
    return model
