"""What a stage cost, as the machine tells."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import protocol
from bench.storage import meter, runs
from bench.storage.meter import metered, mfu
from bench.suites import load_suite


def test_mfu_is_useful_work_over_what_the_devices_could_do():
    """600 operations in 2 seconds on 3 devices that do 200 a second each: half."""
    assert mfu(600, 2.0, 3, 200) == 0.5
    assert mfu(None, 2.0, 3, 200) is None
    assert mfu(600, 2.0, 3, None) is None


def test_seconds_and_peak_memory_are_those_of_the_block():
    with metered() as first:
        held = np.ones(30_000_000)  # 240 MB
        time.sleep(0.02)
        del held
    with metered() as second:
        pass
    assert first["seconds"] >= 0.02 > second["seconds"]
    assert first["devices"] == 1
    if first["peak_memory_bytes"] is None:
        pytest.skip("this system keeps no record of peak memory that can be reset")
    assert first["peak_memory_bytes"] - second["peak_memory_bytes"] > 200e6
    assert (first["energy_joules"], first["energy_devices"]) == (None, None)


def test_energy_is_the_difference_of_the_drivers_counters(monkeypatch):
    """Two GPUs: 1000 and 2500 millijoules more at the end are 3.5 joules."""
    readings = iter([10_000, 20_000, 11_000, 22_500])
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        NVMLError=RuntimeError,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name, value in {
        "is_available": True,
        "device_count": 2,
        "max_memory_allocated": 7,
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "get_device_properties": SimpleNamespace(uuid="x"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with metered() as spent:
        pass
    assert spent["energy_joules"] == 3.5
    assert (spent["devices"], spent["energy_devices"], spent["peak_memory_bytes"]) == (4, 2, 7)


def test_what_cannot_be_told_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(meter, "CLEAR", tmp_path / "no" / "such" / "file")
    with metered() as spent:
        pass
    assert spent["peak_memory_bytes"] is None


def test_a_training_is_measured_against_the_peak_of_its_own_precision(tmp_path, monkeypatch):
    """fp32 weights that are sampled from in fp32 and trained in bf16: 989 and 67 TFLOP/s on an H100."""
    monkeypatch.setattr(protocol, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    run = runs.Run("r", "spin", 0, 1, load_suite("mini", ["train.precision=bf16"]))
    folders = []
    for kind, flops in (("train", 98.9e12), ("opponent", 6.7e12)):
        folders.append(run.folder / kind)
        folders[-1].mkdir(parents=True)
        (folders[-1] / "cost.json").write_text(json.dumps({"name": f"iter1/{kind}", "seconds": 1.0, "flops": flops}))
    protocol.write_cost(
        run, folders, SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cuda")), common={})
    )
    cost = json.loads((run.folder / "cost.json").read_text())
    assert [stage["mfu"] for stage in cost["stages"]] == [0.1, 0.1]
    assert (cost["peak_flops_per_s"], cost["train_peak_flops_per_s"]) == (67e12, 989e12)
