"""One process at a time: locks that end with the process that holds them, and say who that is."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from bench.errors import BenchError, first_line

POLL = 0.2  # seconds between two looks at a lock that another process holds
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # what file systems say that keep no locks


@contextmanager
def held(path: Path, what: str, wait: bool) -> Iterator[None]:
    """Hold the lock at `path`; when another process has it, wait for it or say who that is and leave.

    The kernel keeps it (flock), so a killed process holds nothing. Between hosts that holds as far as their shared file
    system passes locks on: where a record is left of a process of another host, whether it was killed or is not seen
    from here cannot be told, and is said; where there are no locks at all, that is said, and work goes on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _record(path)
    lock = FileLock(path, fallback_to_soft=False, poll_interval=POLL)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        before = _record(path)
        if not wait:
            raise BenchError(
                f"{what} is in the hands of {_named(before)}; wait for that process or stop it (--wait waits for it)"
            ) from None
        _say(f"waiting for {_named(before)}, which has {what}")
        lock.acquire()
        before = ""
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _say(
            f"the file system of {path.parent} keeps no locks ({first_line(error)}): see to it that no other process "
            f"works on {what}"
        )
        yield
        return
    try:
        _expect_here(before, what, path)
        path.write_text(f"{os.getpid()}@{socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who waits for this file sees that it has no name any more
        lock.release()


def _record(path: Path) -> str:
    """Who holds the lock, or held it when it was killed; "" where nobody did."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _named(record: str) -> str:
    return f"process {record}" if record else "another process"


def _expect_here(record: str, what: str, path: Path) -> None:
    """The lock was free, yet somebody's record lies there: harmless when that was a process of this host."""
    host = record.partition("@")[2].partition(" since ")[0]
    if host and host != socket.gethostname():
        _say(
            f"{what} was in the hands of process {record}, which was killed, or still works there and is not seen "
            f"from {socket.gethostname()} (a file system shared without its locks): then stop one of the two ({path})"
        )


def _say(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)
