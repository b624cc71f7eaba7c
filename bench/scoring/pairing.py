"""Which image of a folder belongs to which prompt; whatever belongs to none is named."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.data.images import IMAGE_SUFFIXES, images_in
from bench.data.tables import CAPTION_FILES, FILE_NAME, read_column, read_table
from bench.errors import BenchError, UsageError

PROMPT_FILES = (*CAPTION_FILES, "prompts.txt")


@dataclass
class Item:
    """One row of the output; `problem` says why it has no scores."""

    file_name: str
    path: Path
    prompt: str
    problem: str = ""
    digest: str = ""


def collect(folder: Path, prompts: Path | None) -> list[Item]:
    """Pair the images of a folder with a prompts file (by default one in the folder).

    Rows with `file_name` are paired by it; a list of prompts alone belongs to the images in order of their names.
    """
    if not folder.is_dir():
        raise BenchError(f"no such folder of images: {folder}")
    prompts = prompts or next((folder / name for name in PROMPT_FILES if (folder / name).is_file()), None)
    if prompts is None:
        raise UsageError(f"--prompts is missing, and {folder} holds none of {', '.join(PROMPT_FILES)}")
    table = read_table(prompts)
    texts = read_column(prompts, table)
    names = read_column(prompts, table, (FILE_NAME,)) if FILE_NAME in table else None
    found = images_in(folder)
    if not found and names is None:
        raise BenchError(f"{folder}: no {', '.join(IMAGE_SUFFIXES)} files in it")
    items = _in_order(folder, found, texts) if names is None else _by_name(folder, names, texts, set(found))
    named = {item.file_name for item in items}
    items += [Item(name, folder / name, "", "no prompt for this image") for name in found if name not in named]
    for item in items:
        if not item.problem and not item.prompt:
            item.problem = "empty prompt"
    return items


def _by_name(folder: Path, names: Sequence[str], texts: Sequence[str], found: Container[str]) -> list[Item]:
    items, seen = [], set()
    for name, prompt in zip(names, texts, strict=True):
        problem = "" if name in found else _problem(folder, name)
        items.append(Item(name, folder / name, prompt, "named twice" if name in seen else problem))
        seen.add(name)
    return items


def _problem(folder: Path, name: str) -> str:
    """What is wrong with a name in somebody's metadata, "" when it is that of a file in the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "outside the folder"
    try:
        return "" if (folder / name).is_file() else "no such image"
    except (OSError, ValueError):  # a name that no file can have
        return "no such image"


def _in_order(folder: Path, found: Sequence[str], prompts: Sequence[str]) -> list[Item]:
    """Image by image in order of the names; prompts left over become rows without an image."""
    items = [Item(name, folder / name, prompt) for name, prompt in zip(found, prompts, strict=False)]
    return items + [Item("", folder, prompt, "no image for this prompt") for prompt in prompts[len(found) :]]
