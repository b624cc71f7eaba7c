"""The contract of a metric: numbers for every (image, prompt), what they mean, and a record of how they came about."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from bench.data.depth import eight_bits
from bench.errors import BenchError, first_line
from bench.metrics.columns import Column, Reads
from bench.mini import MINI_WEIGHTS
from bench.runtime.hub import is_hub_id
from bench.storage.digests import content_digest

SETTINGS_FILES = (
    "config.json",
    "open_clip_config.json",
    "med_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
"""What else a checkpoint's folder holds that decides a score."""
FILE_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
"""What tells a missing file from a repository on the hub: both may look like `name/name`."""

Images = Sequence[Image.Image] | np.ndarray
"""PIL images of any size and mode, or one uint8 array [N, H, W, 3]."""


class Published(NamedTuple):
    """A checkpoint as its authors published it: a file of a repository on the hub, or (without) all of it."""

    repository: str
    file: str | None
    size: str


class Cost(NamedTuple):
    """Operations of one image with its prompt, and bytes of weights."""

    flops: int
    weights: int


class Metric(ABC):
    """Scores images against their prompts."""

    name: ClassVar[str]
    """The name in suites, tables and on the command line."""
    title: ClassVar[str]
    """The name shown to people."""
    reads: ClassVar[Reads] = "image and prompt"
    """What a score depends on."""
    columns: ClassVar[tuple[Column, ...]]
    """What it gives for every image; by default one number of the metric's name and title, the better the higher."""
    published: ClassVar[Published | None] = None
    """What `weights="official"` stands for."""
    cost: ClassVar[Cost | None] = None
    """What a score costs with other weights than "mini", which a plan does not load to see; None: not known."""

    def __init_subclass__(cls, **options: Any) -> None:
        """A class of a name of its own does not inherit the columns of another name."""
        super().__init_subclass__(**options)
        if "name" in vars(cls) and "columns" not in vars(cls):
            cls.columns = (Column(cls.name, getattr(cls, "title", cls.name)),)

    @classmethod
    @abstractmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 64) -> Metric:
        """Load the model once. `weights`: "mini" (bundled), "official", a path or a Hugging Face repository."""

    @abstractmethod
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray | dict[str, np.ndarray]:
        """Score image i against prompt i, without gradients: float32 [N]; of several columns, that by column's name."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """What makes two scores comparable: version, checkpoint, scale, preprocessing, truncates, precision."""

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many of these prompts lose their end before they are read."""
        return 0

    @classmethod
    def table_columns(cls) -> tuple[Column, ...]:
        """Its columns by the names that tables know them by."""
        if len(cls.columns) == 1:
            return (replace(cls.columns[0], name=cls.name),)
        return tuple(replace(column, name=f"{cls.name}/{column.name}") for column in cls.columns)

    @classmethod
    def description(cls) -> dict[str, Any]:
        """What protocol.json says of it beside `info`: how its numbers are called and read, which changes none."""
        return {"title": cls.title, "reads": cls.reads, "columns": [asdict(column) for column in cls.table_columns()]}

    @classmethod
    def weights_of(cls, options: Mapping[str, Any]) -> str:
        """The weights that these options of `load` name, or its default; "mini" where it takes none."""
        taken = signature(cls.load).parameters.get("weights")
        return str(options.get("weights", taken.default if taken else "mini"))

    def table_scores(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """`score` by the names of `table_columns`: float32 [N] each. Raises BenchError where it is not as declared."""
        scores = self.score(images, prompts)
        by_name = scores if isinstance(scores, dict) else {self.columns[0].name: scores}
        declared = [column.name for column in self.columns]
        if sorted(by_name) != sorted(declared):
            raise BenchError(
                f"metric '{self.name}' declares the columns {', '.join(declared)}, but its score gave "
                f"{', '.join(map(str, by_name)) if isinstance(scores, dict) else 'one array'}"
            )
        shaped = {name: np.asarray(values, np.float32) for name, values in by_name.items()}
        for name, values in shaped.items():
            if values.shape != (len(prompts),):
                raise BenchError(
                    f"metric '{self.name}': {name} has shape {list(values.shape)} for {len(prompts)} "
                    "images; one number an image is expected"
                )
        return {column.name: shaped[own] for column, own in zip(self.table_columns(), declared, strict=True)}


def check_lengths(images: Images, prompts: Sequence[str]) -> None:
    """Refuse images and prompts that do not belong together."""
    if len(images) != len(prompts):
        raise BenchError(f"{len(images)} images but {len(prompts)} prompts; every image needs one")


def to_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """One image as PIL knows it, in the mode it came in; 16-bit grey scaled to 8 bits."""
    if isinstance(image, Image.Image):
        return eight_bits(image)
    if image.dtype != np.uint8:
        raise BenchError(f"images must be uint8 [N, H, W, 3], got {image.dtype} values")
    return Image.fromarray(image)


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """One image as 8-bit RGB; an alpha channel is dropped, not blended.

    The scorers were trained and published with PIL's own conversion. transformers 5 blends alpha onto white,
    which changes scores, so images are converted here before its image processor sees them.
    """
    return to_pil(image).convert("RGB")


def find_weights(weights: str, bundled: str, published: Published | None = None) -> str:
    """Turn the name of a checkpoint into what a loader opens: an existing path, or a repository on the hub.

    Looked up in this order: "mini" (the bundled folder `bundled`), a path, `$BENCH_WEIGHTS/<weights>`,
    `$BENCH_WEIGHTS/<last part of weights>`, the Hugging Face cache, a download. "official" is what `published`
    names; what is in none of the folders must be that, or look like `owner/name`.
    """
    if weights == "official":
        if published is None:
            raise BenchError("weights 'official' are not published as a file that can be fetched; name a path")
        weights = published.file or published.repository
    if weights == "mini":
        candidates = [MINI_WEIGHTS / bundled]
        fix = "restore bench/mini/weights from the repository, or rebuild it with `python -m bench.mini`"
    else:
        candidates = [Path(weights).expanduser()]
        if os.environ.get("BENCH_WEIGHTS"):
            root = Path(os.environ["BENCH_WEIGHTS"]).expanduser()
            candidates += dict.fromkeys([root / weights, root / Path(weights).name])
        fix = "download it and name its path, or put it into the folder that BENCH_WEIGHTS names"
    for candidate in candidates:
        if candidate.exists():
            return str(candidate.resolve())
    if published is not None and weights == published.file:
        return _from_hub(published, candidates)
    if is_hub_id(weights):
        return weights
    raise BenchError(f"weights '{weights}' not found; looked at {', '.join(map(str, candidates))}; {fix}")


def _from_hub(published: Published, candidates: Sequence[Path]) -> str:
    """The file in the Hugging Face cache, downloaded if need be."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(published.repository, published.file)
    except Exception as error:  # the hub's client raises errors of several libraries
        cause = first_line(error)
        raise BenchError(
            f"{published.file} ({published.size}) not found: looked at {', '.join(map(str, candidates))}, the "
            f"Hugging Face cache and online; download it from {published.repository} and put it into the folder "
            f"that BENCH_WEIGHTS names ({cause})"
        ) from error


def weights_digest(module: nn.Module) -> str:
    """A short hash of a small network in memory: every tensor's name, type, shape and bytes.

    Of a checkpoint on disk, `checkpoint_digest` also knows the tokenizer, and large files are not read twice.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def checkpoint_digest(*sources: str | Path) -> str:
    """A short hash of the content of checkpoints: files, folders, or repositories as the hub's cache holds them.

    Of a folder the settings and tokenizer, and the weights that `from_pretrained` reads: safetensors where there are
    any.
    """
    return content_digest(dict.fromkeys(file for source in sources for file in _files_read(str(source))))


def _files_read(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(source, name) for name in SETTINGS_FILES]
        folders = {Path(name).parent for name in found if isinstance(name, str)}
        return [file for folder in sorted(folders) for file in _files_read(str(folder))]
    weights = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    return weights + [path / name for name in SETTINGS_FILES if (path / name).is_file()]
