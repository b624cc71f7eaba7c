"""Peak memory before anything is loaded: a pass is simulated on tensors without storage, and what lives is summed.

Counted are tensors. Not counted: what the allocator wastes, the workspaces of cuDNN and oneDNN, the CUDA context and
Python with its libraries; on a GPU leave 1 to 2 GB for those, on a processor about 0.7 GB. On the miniature the sum
is within 1 % of what torch allocates (measured with its profiler, fp32), and resident memory grows by a third more.
Half precision and GPUs are not checked against a measurement.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.models import DTYPES, adapters
from bench.models.chunks import rows_at_once

MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5}  # bytes of AdamW's two moments over those of the fp32 weights


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make until they are freed; `peak` is the most bytes alive at once.

    `known` are tensors that were there before: they are not counted, nor are views of them.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.ignored = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes: dict[int, tuple[Any, int]] = {}
        self.current = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._follow, result)
        self.peak = max(self.peak, self.current)
        return result

    def _follow(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.ignored and key not in self.sizes:
            size = storage.nbytes()
            self.sizes[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
            self.current += size
        return tensor

    def _forget(self, key: int) -> None:
        self.current -= self.sizes.pop(key)[1]


def parameter_bytes(module: nn.Module, dtype: str = "fp32") -> int:
    """Bytes of a module's parameters in a precision."""
    return sum(parameter.numel() for parameter in module.parameters()) * DTYPES[dtype].itemsize


def training_bytes(
    unet: ModelMixin,
    latent_shape: tuple[int, int, int],
    tokens: int,
    rows: int,
    *,
    dtype: str,
    reference: bool,
    accumulate: bool,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    ema: bool = False,
    lora_rank: int | None = None,
) -> int:
    """Peak of one optimizer step: fp32 weights, AdamW's moments, reference, moving average, gradients, activations.

    rows: latents in one policy pass, two a pair. accumulate: whether there are several such passes a step, so that
    all gradients exist beside all activations. reference: whether it is a second fp32 copy, which an adapter makes
    superfluous. lora_rank: of the adapter that is trained instead of the weights.
    """
    with torch.device("meta"):
        twin = type(unet).from_config(unet.config)
    if lora_rank:
        adapters.attach(twin, lora_rank, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _replace_parameters(twin)  # by fake ones, which peft could not have handled
        trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        fixed = parameter_bytes(twin) + reference * parameter_bytes(unet) + int(gradients * (MOMENTS[optimizer] + ema))
        if checkpointing:
            twin.enable_gradient_checkpointing()
            twin.train()
        if accumulate:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        inputs = _unet_inputs(unet, latent_shape, tokens, rows, torch.float32)

        def step() -> None:
            with _autocast(dtype):
                output = twin(*inputs).sample
            (torch.zeros(rows, *latent_shape) - output.float()).square().mean().backward()

        passes = _peak(step, [*twin.parameters(), *twin.buffers()])
    return fixed + (gradients + passes if accumulate else max(gradients, passes))


def fitting_micro_batch(bytes_of: Callable[[int], int], batch_size: int, budget: float) -> int:
    """The largest of the batch, its half, its quarter and so on whose `bytes_of` do not pass the budget, 1 at least."""
    size = batch_size
    while size > 1 and bytes_of(size) > budget:
        size = (size + 1) // 2
    return size


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def unet_bytes(unet: ModelMixin, latent_shape: tuple[int, int, int], tokens: int, rows: int, dtype: str) -> int:
    """What a UNet pass without gradients holds at most, its weights not counted."""
    inputs = (latent_shape, tokens, rows, DTYPES[dtype])
    return _without_gradients(unet, dtype, lambda twin: twin(*_unet_inputs(unet, *inputs)))


def vae_bytes(vae: ModelMixin, latent_shape: tuple[int, int, int], rows: int, dtype: str) -> tuple[int, int]:
    """What encoding and decoding `rows` images at once hold at most, the weights not counted."""
    channels, height, width = latent_shape
    rows = min(rows, rows_at_once(vae, height, width))
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    image = (rows, vae.config.in_channels, height * scale, width * scale)

    def encode(twin: ModelMixin) -> None:
        twin.encode(torch.empty(image, dtype=DTYPES[dtype]))

    def decode(twin: ModelMixin) -> None:
        twin.decode(torch.empty(rows, channels, height, width, dtype=DTYPES[dtype]))

    return _without_gradients(vae, dtype, encode), _without_gradients(vae, dtype, decode)


def _replace_parameters(module: nn.Module) -> None:
    """Give a module parameters of the mode that it is called in."""
    for part in module.modules():
        for name, old in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(old.shape), requires_grad=old.requires_grad))


def _without_gradients(model: ModelMixin, dtype: str, call: Callable[[ModelMixin], object]) -> int:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])  # tensors without storage cannot be cast in place
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            twin = type(model).from_config(model.config)
            return _peak(lambda: call(twin), [*twin.parameters(), *twin.buffers()])
    finally:
        torch.set_default_dtype(usual)


def _peak(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    with LiveBytes(known) as live:
        call()
    return live.peak


def _unet_inputs(
    unet: ModelMixin, latent_shape: tuple[int, int, int], tokens: int, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.empty(rows, tokens, unet.config.cross_attention_dim, dtype=dtype)
    return torch.empty(rows, *latent_shape, dtype=dtype), torch.zeros(rows), context


@contextmanager
def _autocast(dtype: str) -> Iterator[None]:
    """A GPU's autocast, of the processor's and what `_NormsInFp32` adds: torch keeps no gradients of tensors without
    storage for a device that it was not built for."""
    if dtype == "fp32":
        yield
    else:
        with torch.autocast("cpu", DTYPES[dtype]), _NormsInFp32():
            yield


class _NormsInFp32(TorchFunctionMode):
    """What a GPU's autocast does and a processor's does not, as far as a UNet meets it: norms and softmax read and
    write fp32, and their results are kept for the backward pass. Training SD-1.5 takes an eighth more for it."""

    FUNCTIONS = frozenset((F.group_norm, F.layer_norm, F.softmax, Tensor.softmax))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in self.FUNCTIONS:
            args = tree_map_only(Tensor, Tensor.float, args)
        return func(*args, **(kwargs or {}))
