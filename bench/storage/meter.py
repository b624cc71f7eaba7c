"""What a piece of work really cost: seconds, peak memory and energy, as far as this machine can tell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.runtime.processes import Processes
from bench.storage.stages import Stage, atomic_write

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # of VmHWM; see proc(5)
Spent = dict[str, float | int | None]


@contextmanager
def metered() -> Iterator[Spent]:
    """Measure the block; the dictionary it yields is filled when the block ends, with

    seconds; devices, the number of processes the work was spread over; peak_memory_bytes, of this process: on a GPU
    what torch allocated there, else resident memory with everything Python had loaded before; energy_joules, of the
    energy_devices GPUs this node works with, all they drew in that time. What cannot be told is None.
    """
    spent: Spent = {}
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    counters = _energy_counters()
    reset = gpu or _reset_resident_peak()
    before, started = _joules(counters), time.perf_counter()
    yield spent
    if gpu:
        torch.cuda.synchronize()
    spent["seconds"] = round(time.perf_counter() - started, 3)
    after = _joules(counters)
    spent["devices"] = int(os.environ.get("WORLD_SIZE", "1"))
    spent["peak_memory_bytes"] = _peak_memory(gpu) if reset else None
    known = before is not None and after is not None
    spent["energy_joules"] = round(after - before, 1) if known else None
    spent["energy_devices"] = len(counters) if known else None


def write_spent(folder: Path, name: str, spent: Spent, earlier: float, **counts: int) -> None:
    """Leave in a folder what making it cost, and how much was made (pairs, images, flops).

    `earlier` are the seconds of processes that were stopped and whose work was gone on with; their energy is not known.
    """
    if earlier:
        spent = {**spent, "seconds": round(spent["seconds"] + earlier, 3), "energy_joules": None}
    atomic_write(folder / "cost.json", json.dumps({"name": name, **spent, **counts}))


@contextmanager
def timed(stage: Stage, processes: Processes, name: str, earlier: float = 0.0, **counts: int) -> Iterator[Path | None]:
    """Fill a stage and leave in it what it cost: what `metered` tells, and the counts given (pairs, images, flops).

    `earlier` are the seconds of a process that was stopped and whose work is gone on with. The main process is given
    the folder to fill, the others None; all leave when the stage is done.
    """
    if processes.main:
        with stage.fresh() as folder:
            with metered() as spent:
                yield folder
            write_spent(folder, name, spent, earlier, **counts)
    else:
        yield None
    processes.wait()
    processes.expect(lambda: stage.done, stage.directory)


def mfu(flops: float | None, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: useful operations per second over what the devices could do; None where unknown."""
    if not flops or not seconds or not peak:
        return None
    return round(flops / (seconds * devices * peak), 4)


def _peak_memory(gpu: bool) -> int | None:
    return torch.cuda.max_memory_allocated() if gpu else _resident("VmHWM")


def _resident(field: str) -> int | None:
    """A memory figure of this process in bytes; None where the system keeps none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _reset_resident_peak() -> bool:
    """Forget the highest resident memory so far; False where the system does not allow it."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _energy_counters() -> list[Any]:
    """NVML handles of the GPUs this node's processes work with; empty without a GPU or its library."""
    if not torch.cuda.is_available():
        return []
    try:
        import pynvml  # the package nvidia-ml-py

        pynvml.nvmlInit()
        used = range(min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()))
        first = torch.cuda.current_device() if len(used) == 1 else 0
        uuids = [str(torch.cuda.get_device_properties(first + index).uuid) for index in used]
        return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
    except Exception:  # no library, an old driver, a container without NVML: energy is then simply not known
        return []


def _joules(counters: Sequence[Any]) -> float | None:
    """Energy drawn since the driver was loaded, summed over the GPUs; they count in millijoules."""
    if not counters:
        return None
    import pynvml

    try:
        return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(counter) for counter in counters) / 1000
    except pynvml.NVMLError:  # cards older than Volta have no counter
        return None
