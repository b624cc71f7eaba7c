"""Names on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".parquet")  # what a hub name cannot end in


def is_hub_id(name: str) -> bool:
    """Whether a name is one on the hub: OWNER/NAME, not a path, and nothing of that name is on this machine."""
    path = Path(name).expanduser()
    return name.count("/") == 1 and name[0] not in "./~" and path.suffix not in FILES and not path.exists()
