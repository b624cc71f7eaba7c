"""What a wheel built from this tree holds: installed in a folder of its own, it shows the published values."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("methods", "metrics", "reports")  # rooms beside bench/ that are packages in it
TREE = ("bench", *LINKED, "results/published.csv", "pyproject.toml", "README.md", "LICENSE")


def call(*arguments: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content; built from a copy, offline, so that the tree stays as it is."""
    work = tmp_path_factory.mktemp("wheel")
    tree = work / "tree"
    tree.mkdir()
    for name in TREE:
        (tree / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    call(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(work), str(tree), cwd=work)
    (wheel,) = work.glob("*.whl")
    call(*pip, "install", "--no-index", "--no-deps", "--target", str(work / "installed"), str(wheel), cwd=work)
    return work / "installed"


def test_published_values_are_shown_without_any_run(installed: Path, tmp_path: Path) -> None:
    printed = call("-m", "bench", "table", "--paper", "1", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "Table 1 of the paper" in printed and "(22.0)" in printed and "there is no run" in printed
    assert "could be verified" not in printed and not list(tmp_path.iterdir())
    found = call("-c", "import bench; print(bench.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert found.startswith(str(installed))  # not the tree's


def test_every_file_that_is_read_at_run_time_is_there(installed: Path) -> None:
    """Beside the modules: suites, weights, the page's parts, published numbers, examples."""
    beside = [file.relative_to(ROOT) for file in (ROOT / "bench").rglob("*") if file.is_file()]
    linked = [Path("bench", file.relative_to(ROOT)) for room in LINKED for file in (ROOT / room).rglob("*")]
    needed = [file for file in (*beside, *linked) if "__pycache__" not in file.parts and file.suffix not in ("", ".md")]
    assert len(needed) > 150
    assert [str(file) for file in needed if not (installed / file).is_file()] == []
