"""Randomness by name, and folders that are whole or absent."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bench.runtime.seeding import derive, normal
from bench.storage.stages import MARKER, Stage, atomic_write, fingerprint


@given(st.lists(st.one_of(st.integers(), st.text(st.characters(exclude_characters="\x1f")))))
@example(["\ud800"])  # half a character, as a file's name that is no UTF-8 has it
def test_derive_is_a_pure_32_bit_function(parts):
    assert derive(*parts) == derive(*parts)
    assert 0 <= derive(*parts) < 2**32


@pytest.mark.parametrize(
    ("one", "other"),
    [(("\ud800",), ("\ud801",)), ((1, 2), (2, 1)), (("1",), (1,)), (("a", "b"), ("ab",)), ((12,), (1, 2))],
)
def test_derive_tells_parts_apart(one, other):
    assert derive(*one) != derive(*other)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6), st.data())
def test_a_row_of_noise_depends_on_its_seed_alone(seeds, data):
    row = data.draw(st.integers(0, len(seeds) - 1))
    assert torch.equal(normal(seeds, (4, 3, 3))[row], normal([seeds[row]], (4, 3, 3))[0])


def test_noise_is_standard_normal():
    noise = normal(range(200), (4, 8, 8))
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02


def test_fingerprint_ignores_the_order_of_keys_and_sees_values():
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def fill(stage: Stage, text: str = "content") -> None:
    with stage.fresh() as folder:
        (folder / "file").write_text(text)


def test_a_stage_is_done_only_with_its_own_inputs(tmp_path):
    stage = Stage(tmp_path / "stage", {"lr": 1e-4})
    assert not stage.done
    fill(stage)
    assert stage.done and (stage.directory / "file").read_text() == "content"
    assert not Stage(tmp_path / "stage", {"lr": 2e-4}).done


def test_a_failed_stage_leaves_nothing_and_keeps_the_earlier_result(tmp_path):
    stage = Stage(tmp_path / "stage", {})
    fill(stage)
    with pytest.raises(RuntimeError), stage.fresh() as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert (stage.directory / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_a_new_result_replaces_the_old_folder_whole(tmp_path):
    old = Stage(tmp_path / "stage", {"k": 1})
    with old.fresh() as folder:
        (folder / "stale").touch()
    fill(Stage(tmp_path / "stage", {"k": 2}))
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["file", MARKER]


@pytest.mark.parametrize("marker", ["", "{", "{}", json.dumps({"hash": "other"})])
def test_a_broken_marker_is_no_marker(tmp_path, marker):
    stage = Stage(tmp_path / "stage", {})
    fill(stage)
    (stage.directory / MARKER).write_text(marker)
    assert not stage.done


def test_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "deep" / "file"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]
