"""What several scorers make of the same images is made once, pixels in threads while a GPU works on the last ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from metrics.base import Images

THREADS = 8
"""For a GPU: to decode a 512-pixel image and resize it for five scorers takes one core about 15 ms (measured), several
times what their passes over it need. On a processor one thread reads ahead, for the model has the cores."""

T = TypeVar("T")
_made: dict[tuple[Hashable, int], tuple[Images, Any]] | None = None


@contextmanager
def shared() -> Iterator[None]:
    """Within the block, equal work on the same `images` object is done once."""
    global _made
    outer, _made = _made, {}
    try:
        yield
    finally:
        _made = outer


def once(kind: Hashable, images: Images, make: Callable[[], T]) -> T:
    """What `make` returns, or has returned before in this block for equal `kind` and the same images."""
    if _made is None:
        return make()
    key = (kind, id(images))
    if key not in _made:
        _made[key] = (images, make())  # the images are kept so that their id cannot be reused while it is stored
    return _made[key][1]


def pixel_batches(images: Images, transform: Callable[[Images], Tensor], size: int, device: str) -> Iterator[Tensor]:
    """`transform` of `size` images at a time, on the device: fp32 [<= size, 3, S, S]."""
    for batch in once((transform, size), images, lambda: _started(images, transform, size, device)):
        yield batch.result().to(device)


def _started(images: Images, transform: Callable[[Images], Tensor], size: int, device: str) -> Sequence[Future[Tensor]]:
    pool = ThreadPoolExecutor(_threads(device))
    batches = [pool.submit(transform, images[start:start + size]) for start in range(0, len(images), size)]
    pool.shutdown(wait=False)  # takes no more work; what it was given is done
    return batches


def _threads(device: str) -> int:
    return 1 if torch.device(device).type == "cpu" else THREADS
