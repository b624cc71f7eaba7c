"""What accelerators can do at most, from their makers' data sheets: dense matrix products, without sparsity."""

from __future__ import annotations

from typing import NamedTuple

from bench.errors import UsageError, did_you_mean


class Card(NamedTuple):
    """Peak operations per second by precision (fp32 without TF32), and memory in bytes.

    fp16 runs at the rate of bf16 on all of them but V100 and T4, which have no bf16.
    """

    title: str
    memory: float
    half: float
    fp32: float

    def peak(self, dtype: str) -> float:
        """Operations per second in "bf16", "fp16" or "fp32"."""
        return self.fp32 if dtype == "fp32" else self.half


CARDS = {
    "b200": Card("NVIDIA B200", 180e9, 2250e12, 75e12),
    "h200": Card("NVIDIA H200 SXM", 141e9, 989e12, 67e12),
    "h100": Card("NVIDIA H100 SXM", 80e9, 989e12, 67e12),
    "h100-pcie": Card("NVIDIA H100 PCIe", 80e9, 756e12, 51e12),
    "a100": Card("NVIDIA A100 80 GB", 80e9, 312e12, 19.5e12),
    "a100-40gb": Card("NVIDIA A100 40 GB", 40e9, 312e12, 19.5e12),
    "l40s": Card("NVIDIA L40S", 48e9, 362e12, 91.6e12),
    "a6000": Card("NVIDIA RTX A6000", 48e9, 155e12, 38.7e12),
    "a10g": Card("NVIDIA A10G", 24e9, 70e12, 35e12),
    "rtx4090": Card("NVIDIA RTX 4090", 24e9, 165e12, 82.6e12),
    "rtx3090": Card("NVIDIA RTX 3090", 24e9, 71e12, 35.6e12),
    "v100": Card("NVIDIA V100 SXM2", 32e9, 125e12, 15.7e12),
    "t4": Card("NVIDIA T4", 16e9, 65e12, 8.1e12),
}

# Parts of a driver's name for a card, most particular first: ("H100", "PCIE") before ("H100",).
NAMES = {
    ("B200",): "b200",
    ("H200",): "h200",
    ("H100", "PCIE"): "h100-pcie",
    ("H100",): "h100",
    ("A100", "40GB"): "a100-40gb",
    ("A100",): "a100",
    ("L40S",): "l40s",
    ("A6000",): "a6000",
    ("A10G",): "a10g",
    ("RTX 4090",): "rtx4090",
    ("RTX 3090",): "rtx3090",
    ("V100",): "v100",
    ("TESLA T4",): "t4",
}


def find(name: str) -> Card:
    """The card of a name on the command line."""
    if name not in CARDS:
        raise UsageError(f"unknown card '{name}'{did_you_mean(name, CARDS)}; cards: {', '.join(CARDS)}")
    return CARDS[name]


def recognise(device: str) -> str | None:
    """The card behind a driver's name for a device; None for a processor or a card that is not listed."""
    text = device.upper()
    if "RTX 6000 ADA" in text:  # would pass for nothing listed, but is no A6000 either
        return None
    return next((card for parts, card in NAMES.items() if all(part in text for part in parts)), None)
