"""As a script under torchrun: processes that are late by more than an exchange allows, waited for and not."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch

from bench.runtime import processes

EXCHANGE, LATE = 2.0, 3.0  # seconds


def main() -> None:
    processes.EXCHANGE = timedelta(seconds=EXCHANGE)
    together = processes.Processes(processes.accelerator("no"))
    assert together.once(lambda: time.sleep(LATE) or 7) == 7
    if not together.main:
        time.sleep(LATE)
    together.wait()
    with together.main_first():
        time.sleep(LATE if together.main else 0)
    print("all waits were patient", flush=True)
    began = time.monotonic()
    if together.main:
        try:
            together.accelerator.reduce(torch.ones(1))
        except RuntimeError as error:
            took = time.monotonic() - began
            print(f"gave up: lost {processes.lost(error)}, in time {took < EXCHANGE + LATE}", flush=True)
    else:
        time.sleep(2 * (EXCHANGE + LATE))
    os._exit(0)  # an orderly exit would wait for the exchange


if __name__ == "__main__":
    main()
