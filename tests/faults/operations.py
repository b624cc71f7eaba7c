"""Faults in what a process asks of its files: killed, stopped, refused or slowed down at a counted operation.

Python announces every opening, renaming, making and removing to its audit hooks before it happens, whichever library
asks; fsync, which it does not announce, is wrapped. A hook cannot be taken off again: use these in a process of
its own.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

Act = Callable[[int, bool, str | None], None]
"""Called with the number of an operation, from 0, whether it changes anything, and the path where it is known."""

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def watch(folder: Path, act: Act) -> Callable[[], int]:
    """Call `act` before every operation on a file below a folder from now on; how many there were so far."""
    inside, count = f"{folder.absolute()}{os.sep}", [0]

    def announce(changes: bool, path: str | None) -> None:
        number, count[0] = count[0], count[0] + 1
        act(number, changes, path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES and event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if os.path.abspath(path).startswith(inside):
            announce(event in CHANGES or bool(arguments[2] & WRITING), path)

    fsync = os.fsync

    def announced_fsync(descriptor: int) -> None:
        announce(True, None)
        fsync(descriptor)

    os.fsync = announced_fsync
    sys.addaudithook(hook)
    return lambda: count[0]


def send(number: int, what: signal.Signals) -> Act:
    """The process gets a signal just before an operation."""

    def act(current: int, changes: bool, path: str | None) -> None:
        if current == number:
            os.kill(os.getpid(), what)

    return act


def refuse(number: int, code: int, once: bool = False) -> Act:
    """Operations fail from one on, or that one alone. A full or a read-only disk still lets files be read."""

    def act(current: int, changes: bool, path: str | None) -> None:
        if (current == number if once else current >= number) and (changes or code == errno.EIO):
            raise OSError(code, os.strerror(code), path)

    return act


def delay(seed: int, longest: float) -> Act:
    """Operations take up to so many seconds longer, most of them nothing."""
    draw = random.Random(seed)

    def act(current: int, changes: bool, path: str | None) -> None:
        if draw.random() < 0.05:
            time.sleep(draw.uniform(0, longest))

    return act


def all_of(*acts: Act) -> Act:
    def act(current: int, changes: bool, path: str | None) -> None:
        for one in acts:
            one(current, changes, path)

    return act


def jump_clock(seed: int) -> Act:
    """The wall clock jumps by up to ten years, back or forth, at one operation of a hundred."""
    draw, offset, clock = random.Random(seed), [0.0], time.time

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=offset[0])

    def act(current: int, changes: bool, path: str | None) -> None:
        if draw.random() < 0.01:
            offset[0] = draw.uniform(-1, 1) * 10 * 365 * 86400

    time.time = lambda: clock() + offset[0]
    for name, module in list(sys.modules.items()):
        if name.startswith("bench.") and getattr(module, "datetime", None) is datetime:
            module.datetime = Jumping
    return act
