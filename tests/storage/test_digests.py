"""Which weights made a number: every byte of them, read once."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.metrics.base import checkpoint_digest, weights_digest
from bench.mini import MINI_WEIGHTS
from bench.scoring import stored
from bench.storage import digests, runs


def test_one_bit_of_the_last_value_of_a_network_tells_it_apart():
    network = nn.Linear(200, 3)
    before = weights_digest(network)
    with torch.no_grad():
        network.weight.view(-1).view(torch.int32)[-1] ^= 1
    assert weights_digest(network) != before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_checkpoint_counts_by_the_content_of_what_is_read_of_it(tmp_path, name):
    folder = tmp_path / "clip"
    shutil.copytree(MINI_WEIGHTS / "clip", folder)
    before = checkpoint_digest(folder)
    assert before == checkpoint_digest(MINI_WEIGHTS / "clip")  # where it lies does not matter
    (folder / "pytorch_model.bin").write_text("not read where there are safetensors")
    assert checkpoint_digest(folder) == before
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert checkpoint_digest(folder) != before


def test_a_large_file_is_hashed_again_only_when_it_may_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WORTH", 4)
    monkeypatch.setattr(runs, "CACHE", tmp_path / "cache")
    read = []
    monkeypatch.setattr(digests, "sha256", lambda path, real=digests.sha256: read.append(path) or real(path))
    path = tmp_path / "weights"
    path.write_bytes(b"12345")
    first = digests.digest(path)
    digests.digest(path)
    assert len(read) == 2  # just written: it could change again within one tick of its time stamp
    old = time.time() - 60
    os.utime(path, (old, old))
    monkeypatch.setattr(digests, "SETTLED", -1.0)
    assert digests.digest(path) == digests.digest(path) == first and len(read) == 3
    path.unlink()
    path.write_bytes(b"12346")
    os.utime(path, (old, old))
    assert digests.digest(path) != first
    (tmp_path / "cache" / digests.MEMORY).write_text("{half")
    assert digests.digest(path) != first


def test_a_scorer_of_bench_score_counts_every_path_it_is_given_by_content(tmp_path):
    """The backbone of the aesthetic head is an option of its own; changed in place, with size and time kept."""
    backbone = tmp_path / "clip"
    shutil.copytree(MINI_WEIGHTS / "clip", backbone)
    path = backbone / "model.safetensors"

    def identity() -> str:
        return stored.identity("aesthetic", {"backbone": str(backbone)}, {})

    before, stat, content = identity(), path.stat(), bytearray(path.read_bytes())
    assert identity() == before
    content[-1] ^= 1
    with open(path, "r+b") as handle:
        handle.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity() != before
    assert Path(path).stat().st_size == stat.st_size
