"""The contract of a metric: one number for every (image, prompt), and a record of how it was obtained."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from torch import nn

from bench.errors import BenchError

MINI_WEIGHTS = Path(__file__).resolve().parent.parent / "bench" / "mini" / "weights"
"""Where the bundled miniature scorers live."""

FILE_SUFFIXES = (".pt", ".pth", ".safetensors")
"""What tells a missing file from a repository on the hub: both may look like `name/name`."""

Images = Sequence[Image.Image] | np.ndarray
"""PIL images of any size and mode, or one uint8 array [N, H, W, 3]."""


class Metric(ABC):
    """Scores images against their prompts. Higher is better."""

    name: ClassVar[str]
    """The name in suites, tables and on the command line."""
    title: ClassVar[str]
    """The name shown to people."""

    @classmethod
    @abstractmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32) -> Metric:
        """Load the model once. `weights` is "mini" (bundled), a path, or a Hugging Face repository."""

    @abstractmethod
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Score image i against prompt i, without gradients: float32 [N]."""

    @abstractmethod
    def info(self) -> dict[str, str]:
        """What makes two scores comparable: version, checkpoint, scale, preprocessing, truncates."""


def check_lengths(images: Images, prompts: Sequence[str]) -> None:
    """Refuse images and prompts that do not belong together."""
    if len(images) != len(prompts):
        raise BenchError(f"{len(images)} images but {len(prompts)} prompts; every image needs one")


def to_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """One image as 8-bit RGB; an alpha channel is dropped, not blended.

    The scorers were trained and published with PIL's own conversion. transformers 5 blends alpha onto white,
    which changes scores, so images are converted here before its image processor sees them.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise BenchError(f"images must be uint8 [N, H, W, 3], got {image.dtype} values")
        image = Image.fromarray(image)
    return image.convert("RGB")


def find_weights(weights: str, bundled: str) -> str:
    """Turn the name of a checkpoint into what a loader opens: an existing path, or a repository on the hub.

    Looked up in this order: "mini" (the bundled folder `bundled`), a path, `$BENCH_WEIGHTS/<weights>`,
    `$BENCH_WEIGHTS/<last part of weights>`; what is in none of them must look like `owner/name`.
    """
    if weights == "mini":
        candidates = [MINI_WEIGHTS / bundled]
        fix = "restore bench/mini/weights from the repository, or rebuild it with `python -m bench.mini`"
    else:
        candidates = [Path(weights).expanduser()]
        if os.environ.get("BENCH_WEIGHTS"):
            root = Path(os.environ["BENCH_WEIGHTS"]).expanduser()
            candidates += [root / weights, root / Path(weights).name]
        fix = "download it and name its path, or put it into the folder that BENCH_WEIGHTS names"
    for candidate in candidates:
        if candidate.exists():
            return str(candidate.resolve())
    if weights.count("/") == 1 and weights[0] not in "./~" and Path(weights).suffix not in FILE_SUFFIXES:
        return weights
    raise BenchError(f"weights '{weights}' not found; looked at {', '.join(map(str, candidates))}; {fix}")


def weights_digest(module: nn.Module) -> str:
    """A short hash that tells two checkpoints apart: every tensor's name, shape and first values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        head = value.detach().flatten()[:64].double().cpu().numpy()
        digest.update(f"{name}{tuple(value.shape)}".encode() + head.tobytes())
    return digest.hexdigest()[:12]
