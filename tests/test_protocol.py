"""Who made a run: every process is kept, with its code and what may change the last bits; none is overwritten."""

from __future__ import annotations

import json
import subprocess

import pytest
import tiny_bench
import torch

from bench import protocol, registry
from bench.runtime import machine
from bench.shared import Shared
from bench.storage import runs
from bench.suites import load_suite


@pytest.fixture
def shared(tiny_pipeline_folder, tmp_path, monkeypatch) -> Shared:
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
    tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)
    monkeypatch.chdir(tmp_path)
    return Shared(load_suite("tiny.yaml"))


def test_every_process_is_kept_and_the_first_one_s_word_stands(shared, monkeypatch):
    run = runs.create("sft", shared.suite, 0, 1)

    def written(commit: str, threads: int) -> dict:
        monkeypatch.setattr(protocol, "git_commit", lambda: commit)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        protocol.write_protocol(run, shared)
        return json.loads((run.folder / "protocol.json").read_text())

    first, second = written("aaa", 1), written("bbb+changes", 2)
    assert second["git_commit"] == first["git_commit"] == "aaa" and second["created"] == first["created"]
    assert [(one["git_commit"], one["threads"]) for one in second["processes"]] == [("aaa", 1), ("bbb+changes", 2)]
    assert second["processes"][0] == first["processes"][0]
    assert {"versions", "device", "created", "processes"} <= set(second["processes"][1])


@pytest.mark.parametrize("content", ["", "{half", "[]", "{}", '{"model": 1}'])
def test_a_broken_protocol_is_named_and_set_aside(shared, capsys, content):
    run = runs.create("sft", shared.suite, 0, 1)
    (run.folder / "protocol.json").write_text(content)
    protocol.write_protocol(run, shared)
    said = capsys.readouterr().err
    assert "protocol.json is no protocol that can be read: set aside as protocol.json.damaged-1, and begun anew" in said
    assert (run.folder / "protocol.json.damaged-1").read_text() == content
    assert len(json.loads((run.folder / "protocol.json").read_text())["processes"]) == 1


def test_code_that_git_does_not_know_counts_as_a_change(tmp_path, monkeypatch):
    (tmp_path / "bench" / "runtime").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    for name in ("bench/runtime/machine.py", "results/kept"):
        (tmp_path / name).write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for line in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *line], check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "bench" / "runtime" / "machine.py"))
    (tmp_path / "results" / "run").write_text("")  # what a run writes is no code
    clean = machine.git_commit()
    assert "+" not in clean
    (tmp_path / "bench" / "new.py").write_text("")
    assert machine.git_commit() == f"{clean}+changes"
