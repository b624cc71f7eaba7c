"""Names that would lead outside results/, or that no file can have, are refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.errors import UsageError, printable
from bench.storage import runs
from bench.suites import load_suite, override, stored_suite

NAMES = ["/tmp/outside", "../outside", "a.b", "..", "a/b", "nul\0", "x" * 300, "-rf", "", "esc\x1b[31m"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["methods", "prompt_sets"])
def test_a_suite_refuses_them_with_the_name(kind, name):
    settings = load_suite("mini").model_dump()
    place = settings["methods"] if kind == "methods" else settings["evaluation"]["prompt_sets"]
    place[name] = next(iter(place.values()))
    with pytest.raises(UsageError) as caught:
        stored_suite(settings)
    assert f"{kind}.{printable(name, 80)}: an entry's name" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_run_of_such_a_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run '") as caught:
        runs.load(name)
    assert str(caught.value).isprintable()


def test_settings_are_stored_in_the_order_of_the_suite(tmp_path, monkeypatch):
    """A page shows its prompt sets in that order, also after the run was resumed."""
    monkeypatch.chdir(tmp_path)
    sets = "{z: {prompts: 'world:test'}, a: {prompts: 'world:hard'}}"
    suite = override(load_suite("mini"), [f"evaluation.prompt_sets={sets}"])
    run = runs.create("sft", suite, 0, 1)
    assert json.dumps(runs.load(run.id).suite.model_dump()) == json.dumps(suite.model_dump())
    stored = json.loads(Path(run.folder, "config.json").read_text())
    assert list(stored["suite"]["evaluation"]["prompt_sets"]) == ["z", "a"]


def test_text_from_outside_is_made_printable():
    assert printable("\x1b]0;title\x07 \u202e\ud800é") == "\\x1b]0;title\\x07 \\u202e\\ud800é"
    assert printable("abcdef", 3) == "abc..."
