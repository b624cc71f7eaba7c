"""Small tables of prompts in whatever form they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError, UsageError, first_line

if TYPE_CHECKING:
    import pandas as pd

PROMPT_COLUMNS = ("prompt", "Prompt", "caption", "text")  # ours, PartiPrompts', and what metadata files often say
FILE_NAME = "file_name"
CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.jsonl", "captions.csv", "prompts.csv")
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")


def read_table(path: Path) -> pd.DataFrame:
    """Read a file with one row a line or entry; a list of texts gives the one column `prompt`.

    Values stay as they were written: a prompt that looks like a number or a date is still text.
    """
    import pandas as pd  # only here: listing commands start without it

    if not path.is_file():
        raise BenchError(f"prompts file not found: {path}")
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: prompts are read from {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} files")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix in (".csv", ".tsv"):
            quoting = {"sep": "\t", "quoting": 3} if path.suffix == ".tsv" else {}  # 3: a quote is a character
            return pd.read_csv(path, dtype=str, keep_default_na=False, **quoting)
        text = path.read_text(encoding="utf-8-sig")
        lines = text.splitlines()
        if path.suffix == ".txt":
            return pd.DataFrame({"prompt": lines})
        entries = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines if line.strip()]
        if not isinstance(entries, list):
            raise ValueError(f"expected a list of prompts, found a {type(entries).__name__}")
        return pd.DataFrame([entry if isinstance(entry, dict) else {"prompt": entry} for entry in entries])
    except (ValueError, OSError) as error:
        raise BenchError(f"{path} cannot be read: {first_line(error)}") from error


def read_column(path: Path, table: pd.DataFrame, names: Sequence[str] = PROMPT_COLUMNS) -> list[str]:
    """The first of these columns that the table has, as text without the space around it."""
    column = next((name for name in names if name in table), None)
    if column is None:
        found = ", ".join(map(str, table.columns)) or "nothing"
        raise BenchError(f"{path}: no column '{names[0]}'; found {found}")
    return table[column].fillna("").astype(str).str.strip().tolist()
