"""What several scorers make of the same images is made once, pixels in threads while a GPU works on the last ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.metrics.base import Images

THREADS = 8
"""For a GPU: to decode a 512-pixel image and resize it for five scorers takes one core about 15 ms (measured), several
times what their passes over it need. On a processor the models have the cores."""

T = TypeVar("T")
S = TypeVar("S", bound=Sequence)
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


def even_batches(items: S, size: int) -> list[S]:
    """`items` in order, in as few batches of at most `size` as hold them, none much smaller than another."""
    count = -(-len(items) // size)
    return [items[len(items) * index // count : len(items) * (index + 1) // count] for index in range(count)]


def pixel_batches(images: Images, transform: Callable[[Images], Tensor], size: int, device: str) -> Iterator[Tensor]:
    """`transform` of `size` images at a time, on the device: fp32 [<= size, 3, S, S]."""
    batches = even_batches(images, size)
    if torch.device(device).type == "cpu":
        yield from once((transform, size), images, lambda: [transform(batch) for batch in batches])
    else:
        for started in once((transform, size), images, lambda: in_threads(transform, batches)):
            yield started.result().to(device)


def in_threads(call: Callable[[Images], T], batches: Sequence[Images]) -> list[Future[T]]:
    """Start on all batches, in order."""
    pool = ThreadPoolExecutor(THREADS)
    started = [pool.submit(call, batch) for batch in batches]
    pool.shutdown(wait=False)  # takes no more work; what it was given is done
    return started
