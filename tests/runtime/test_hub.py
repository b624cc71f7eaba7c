"""One answer to "is this a name on the hub?"."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.runtime.hub import is_hub_id


@pytest.mark.parametrize("name", ["owner/name", "stable-diffusion-v1-5/stable-diffusion-v1-5", "UCLA-AGI/x-v1.5"])
def test_owner_and_name_are_on_the_hub(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["mini", "./a/b", "../name", "/a", "~/models", "a/b/c", "out/model.safetensors", "out/pairs.parquet"]
)
def test_paths_are_not(name: str) -> None:
    assert not is_hub_id(name)


def test_a_folder_that_is_there_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name") and is_hub_id("owner/other")
