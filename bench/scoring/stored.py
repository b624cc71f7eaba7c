"""Scores of before, looked up by what they depend on."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.mini import MINI_WEIGHTS
from bench.storage.digests import content_digest
from bench.storage.stages import fingerprint


class Scores:
    """Scores by (image, prompt, scorer, protocol), and what scorers said of themselves, in one small database."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(path, timeout=60)
        for table, kind in (("scores", "REAL"), ("truncated", "INTEGER"), ("scorers", "TEXT")):
            self.database.execute(f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, value {kind})")

    def close(self) -> None:
        self.database.close()

    def get(self, table: str, keys: Sequence[str]) -> list[Any]:
        """The value of each key, None where there is none."""
        query = (
            f"SELECT {table}.value FROM json_each(?) AS asked LEFT JOIN {table} ON {table}.key = asked.value "
            "ORDER BY asked.key"
        )
        return [value for (value,) in self.database.execute(query, (json.dumps(list(keys)),))]

    def put(self, table: str, values: Mapping[str, Any]) -> None:
        with self.database:
            self.database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", values.items())


def identity(name: str, options: Mapping[str, Any], made_with: Mapping[str, str]) -> str:
    """What a scorer's numbers depend on, as far as can be told without loading it.

    Whatever option names a file or folder, weights or backbone, counts by its content; what lies in BENCH_WEIGHTS, of
    which only a part may be read, by name, size and time. Weights that are in none of the folders come from the hub's
    cache and count as their name.
    """
    named = [value for value in {"weights": "mini", **options}.values() if isinstance(value, str)]
    roots = [MINI_WEIGHTS if value == "mini" else Path(value).expanduser() for value in named]
    content = content_digest(file for root in roots if root.exists() for file in _files(root))
    beside = Path(os.environ.get("BENCH_WEIGHTS") or os.devnull).expanduser()
    state = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in _files(beside))
    return fingerprint([name, dict(options), content, state, made_with])


def _files(root: Path) -> list[Path]:
    return [path for path in ([root] if root.is_file() else root.glob("**/*")) if path.is_file()]
