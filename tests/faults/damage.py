"""Damage of every kind to a file of any kind."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file

KINDS = ("flip", "truncate", "empty", "delete", "swap", "version")


def do(kind: str, path: Path, others: list[Path], draw: random.Random) -> bool:
    """Damage a file; False where there is no such damage: nothing to swap it with, no bit to flip.

    A second name of the file (a hard link) is damaged with it, but for `delete`.
    """
    content = path.read_bytes()
    if kind == "delete":
        path.unlink()
        return True
    if kind == "swap":
        same = [other for other in others if other.suffix == path.suffix and other.read_bytes() != content]
        new = draw.choice(same).read_bytes() if same else content
    elif kind == "flip":
        new = bytearray(content)
        if content:
            new[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        new = content[: draw.randrange(len(content))] if content else content
    elif kind == "empty":
        new = b""
    else:
        new = foreign(path)
    path.write_bytes(new)
    return bytes(new) != content


def foreign(path: Path) -> bytes:
    """A sound file of the same format, as another version of this or of another program might write it."""
    buffer = io.BytesIO()
    if path.suffix == ".json":
        return json.dumps({"version": 99, "files": {}, "seconds": "soon"}).encode()
    if path.suffix == ".npy":
        np.save(buffer, np.arange(3, dtype=np.int8))
    elif path.suffix == ".png":
        Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(buffer, "png")
    elif path.suffix == ".parquet":
        pd.DataFrame({"version": [99]}).to_parquet(buffer)
    elif path.suffix == ".pt":
        torch.save({"version": 99}, buffer)
    elif path.suffix == ".safetensors":
        aside = path.with_name("foreign.tmp")
        save_file({"version": torch.zeros(1)}, aside)
        buffer.write(aside.read_bytes())
        aside.unlink()
    else:
        return b"version 99\n"
    return buffer.getvalue()


def place(path: Path) -> str:
    """A file's name without what differs from trial to trial: dates, hashes, numbers of processes."""
    name = re.sub(r"runs/[^/]+", "runs/RUN", path.as_posix())
    name = re.sub(r"(-|\.)[0-9a-f]{16}", r"\1*", name)
    return re.sub(r"\.\d+@[^/]+\.tmp", ".*.tmp", name)


def sort(path: Path) -> str:
    """What kind of file it is: its place without numbers."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "N", place(path))


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder with its hard links: a run's images of the base are those of the cache."""
    seen: dict[int, Path] = {}
    for path in sorted(source.rglob("*")):
        new = target / path.relative_to(source)
        if path.is_dir():
            new.mkdir(parents=True, exist_ok=True)
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        inode = path.stat().st_ino
        if inode in seen:
            new.hardlink_to(seen[inode])
        else:
            seen[inode] = new
            shutil.copy2(path, new)
