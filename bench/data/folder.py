"""A folder of images with captions: one image a prompt, the data most people have."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.data.images import IMAGE_SUFFIXES, READING, images_in, read_images
from bench.data.tables import CAPTION_FILES, FILE_NAME, read_column, read_table
from bench.errors import BenchError
from bench.storage.stages import fingerprint


class Folder:
    """Images with captions from `metadata.jsonl`, `captions.csv` or the like, or from a .txt beside each image.

    A caption file has file_name (relative to the folder) and prompt, caption or text. Images without a
    caption, and captions without an image, are left out and counted. size: only the first images.
    """

    paired = False

    def __init__(self, spec: str, *, resolution: int, size: int | None = None):
        self.folder, self.resolution = Path(spec).expanduser(), resolution
        if not self.folder.is_dir():
            raise BenchError(f"{spec}: no such folder of images")
        found = images_in(self.folder)
        if not found:
            raise BenchError(f"{spec}: expected {', '.join(IMAGE_SUFFIXES)} files, found none")
        captions = self._captions(found)
        found = [name for name in found if (self.folder / name).is_file()]  # no link to nothing, no pipe
        usable = {name: caption for name, caption in captions.items() if caption and name in set(found)}
        lost = [f"{name}: no such image" for name in captions if name not in set(found)]
        lost += [f"{name}: no caption" for name in found if not captions.get(name)]
        self.counts = {
            "rows": len(set(found) | set(captions)),
            "left_out": {
                reason: count
                for reason in ("no caption", "no such image")
                if (count := sum(line.endswith(f": {reason}") for line in lost))
            },
        }
        self.examples = lost
        self.names = sorted(usable)[:size]
        if not self.names:
            raise BenchError(
                f"{spec}: {len(found)} images, but none with a caption; expected captions in "
                f"{', '.join(CAPTION_FILES)} (columns file_name and caption), or NAME.txt beside NAME.png"
            )
        self.prompts = [usable[name] for name in self.names]

    def _captions(self, found: Sequence[str]) -> dict[str, str]:
        """Caption by file name."""
        table = next((self.folder / name for name in CAPTION_FILES if (self.folder / name).is_file()), None)
        if table is not None:
            rows = read_table(table)
            return dict(zip(read_column(table, rows, (FILE_NAME,)), read_column(table, rows), strict=True))
        texts = {name: (self.folder / name).with_suffix(".txt") for name in found}
        return {name: _caption(text) for name, text in texts.items() if text.is_file()}

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of captions and image files."""
        files = [hashlib.sha256((self.folder / name).read_bytes()).hexdigest() for name in self.names]
        return fingerprint(["folder", files, self.prompts, self.resolution, READING, "16 bits scaled"])

    def name(self, row: int) -> str:
        return self.names[row]

    def record(self) -> dict[str, Any]:
        """Where the images come from and what was left out, for the protocol."""
        return {
            "source": f"folder:{self.folder}",
            "pairs": len(self),
            "resolution": self.resolution,
            "images": READING,
            **self.counts,
            "examples": self.examples,
        }

    def winners(self, rows: Sequence[int]) -> np.ndarray:
        """The images, uint8 [n, R, R, 3]; BrokenRows when some cannot be decoded."""
        return read_images({row: [(self.folder / self.names[row]).read_bytes()] for row in rows}, self.resolution)

    def losers(self, rows: Sequence[int]) -> np.ndarray:
        raise BenchError(f"folder:{self.folder} has one image a prompt, so there are no losers")


def _caption(path: Path) -> str:
    """The text in a file, in one line; "" where it is no UTF-8."""
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except UnicodeDecodeError:
        return ""
