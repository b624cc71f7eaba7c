"""What a process runs on and from: its device, and the commit of its code."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

CODE = ("bench", "methods", "metrics", "reports")  # the folders whose files, new ones too, may change a number


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def git_commit() -> str | None:
    """The commit this code is a checkout of, "+changes" when its files differ or there are others beside them; None
    outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return None
