"""Several processes over gloo, started by torchrun: the same weights as one, and one line when something is wrong."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import train_tiny
from tiny import make_unet

from bench.methods.diffusion_dpo import DiffusionDPO
from bench.models import load_unet
from bench.runtime import processes
from bench.training.train import train

TESTS = Path(__file__).parents[1]


def launch(node: int, port: int, *command: str, nodes: int = 1) -> subprocess.Popen[str]:
    """One node's torchrun; two processes in all."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            str(nodes),
            "--node-rank",
            str(node),
            "--nproc-per-node",
            str(2 // nodes),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(port),
            *command,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_nodes_equal_one_process(accelerator, tmp_path):
    """Ten steps of an uneven global batch (7 pairs: 3 and 4), two torchruns meeting over loopback."""
    port = free_port()
    nodes = [launch(node, port, str(TESTS / "train_tiny.py"), str(tmp_path / "unet"), nodes=2) for node in (0, 1)]
    try:
        for node in nodes:
            _, said = node.communicate(timeout=300)
            assert node.returncode == 0, said
    finally:
        for node in nodes:
            node.kill()
    torch.manual_seed(0)
    policy = make_unet()
    train(
        policy,
        copy.deepcopy(policy),
        DiffusionDPO(500.0),
        train_tiny.make_data(),
        replace(train_tiny.SETTINGS, steps=10, batch_size=7),
        train_tiny.SCHEDULER,
        0,
        accelerator,
    )
    together = load_unet(tmp_path / "unet" / DiffusionDPO.name)
    one, two = (torch.cat([p.detach().flatten() for p in unet.parameters()]) for unet in (policy, together))
    assert (one - two).norm() / one.norm() < 1e-6


def test_a_mistake_is_one_line_whatever_the_number_of_processes(tmp_path):
    process = launch(0, free_port(), "-m", "bench", "run", "--method", "spinn")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1  # torchrun's; its own report names the process and its exit status, 2
    (line,) = [line for line in said.splitlines() if line.startswith("bench: ")]
    assert "unknown method 'spinn'" in line


def test_gradients_are_waited_for_minutes_and_all_else_for_hours():
    """A hang of one process must not cost the others half a day, nor its long work their exchange."""
    assert processes.EXCHANGE < timedelta(hours=1) < processes.PATIENCE
    said, errors = launch(0, free_port(), str(TESTS / "late.py")).communicate(timeout=300)
    assert said.count("all waits were patient") == 2, errors
    assert "gave up: lost True, in time True" in said, errors
