"""One folder with anything in it never stops a report about the others: it is named and passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fake_runs
import pandas as pd
import pytest

from bench.reports.load import load_runs
from bench.storage.verify import sealed

VALUES = (None, 3, "text", [1], {"a": {"b": []}}, True, float("nan"), "\x1b[31m")


def edited(name: str, *keys: str | int) -> list[tuple[str, Callable[[Path], None]]]:
    """Every one of VALUES in one place of a JSON file."""

    def put(value: object) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            content = node = json.loads((folder / name).read_text())
            for key in keys[:-1]:
                node = node[key]
            node[keys[-1]] = value
            (folder / name).write_text(json.dumps(content))

        return change

    return [(f"{name}:{'.'.join(map(str, keys))}={value!r}", put(value)) for value in VALUES]


def column(file: str, name: str, value: object) -> tuple[str, Callable[[Path], None]]:
    def change(folder: Path) -> None:
        table = pd.read_parquet(folder / file)
        table[name] = value
        table.to_parquet(folder / file)

    return f"{file}:{name}={value!r}", change


def written(name: str, content: bytes) -> tuple[str, Callable[[Path], None]]:
    return f"{name}={content!r}", lambda folder: (folder / name).write_bytes(content) and None


CHANGES = [
    *(
        case
        for keys in (
            ["suite"],
            ["suite", "evaluation"],
            ["suite", "evaluation", "prompt_sets"],
            ["suite", "methods"],
            ["metrics"],
            ["metrics", "clip"],
            ["method"],
            ["method_title"],
            ["seed"],
            ["iterations"],
            ["created"],
            ["git_commit"],
            ["prompt_sets"],
            ["versions"],
            ["judge"],
            ["model"],
        )
        for case in edited("protocol.json", *keys)
    ),
    *(
        case
        for keys in (["stages"], ["stages", 0], ["stages", 0, "name"], ["stages", 0, "seconds"], ["device"])
        for case in edited("cost.json", *keys)
    ),
    *(
        column("scores.parquet", name, value)
        for name in ("method", "iteration", "prompt_set", "prompt_id", "metric", "guidance", "seed", "value")
        for value in (None, 7, "x", "\x1b]0;x\x07")
    ),
    *(column("history.parquet", name, value) for name in ("method", "iteration", "step", "loss") for value in (7, "x")),
    *(
        written(name, content)
        for name in (
            "protocol.json",
            "cost.json",
            "scores.parquet",
            "history.parquet",
            "images/test/prompts.json",
            "seal.json",
        )
        for content in (b"", b"null", b"[]", b"\xff\xfe", b"{}", b"PAR1PAR1")
    ),
]


def test_whatever_one_folder_holds_the_others_are_reported(tmp_path):
    """Each change alone, in a run that is older than the good one or in one that is newer, which decides the rest."""
    unnamed = []
    good = fake_runs.write_run(tmp_path / "good", "spin", count=6, guidance=(1.0,))
    for number, (name, change) in enumerate(CHANGES):
        root = tmp_path / str(number)
        created = f"2026-11-{22 + 2 * (number % 2)}T10:00:00"
        bad = fake_runs.write_run(root, "sft", count=6, guidance=(1.0,), created=created, name="bad")
        change(bad)
        (root / good.name).symlink_to(good)
        try:
            runs = load_runs(None, root)
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error}")
        if good.name not in runs.folders and "bad" not in runs.folders:
            unnamed.append(name)
        if "bad" not in runs.folders and not any(line.startswith("bad: ") for line in runs.problems):
            unnamed.append(name)
        if any("\x1b" in text for text in [*map(str, runs.scores["model"].unique()), *runs.problems]):
            unnamed.append(name)
    assert unnamed == []


def test_a_seal_that_does_not_fit_is_named(tmp_path):
    run = fake_runs.write_run(tmp_path, "spin", count=6, guidance=(1.0,))
    with sealed(run):
        pass
    fake_runs.write_run(tmp_path, "sft", count=6, guidance=(1.0,))
    assert load_runs(None, tmp_path).problems == []
    table = pd.read_parquet(run / "scores.parquet")
    table["value"] += 1
    table.to_parquet(run / "scores.parquet")
    (problem,) = load_runs(None, tmp_path).problems
    assert problem.startswith(f"{run.name}: left out, damaged: ") and "scores.parquet" in problem
