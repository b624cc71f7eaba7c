"""What the machine says when it gives out, in words that name cause and remedy; and what to do when told to stop."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.errors import first_line

GO_ON = "what is done is kept: bench run --resume RUN goes on from there"
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FAILING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
# libraries write in other languages and hand on no error number
SAYS_FULL = ("no space left on device", "disk quota exceeded", "inline_container.cc", "pytorchstreamwriter failed")
SAYS_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


class Terminated(KeyboardInterrupt):
    """SIGTERM: what batch systems and launchers send."""

    def __str__(self) -> str:
        return (
            "stopped by SIGTERM (from the batch system, or from the launcher because another process ended: then "
            "its report names that one)"
        )


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """Let SIGTERM unwind the block like Ctrl-C, so that what is half done is put away and said."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(error: BaseException) -> str:
    """What stopped the work: a person, or a signal; `error` may be what click made of it."""
    found = next((one for one in (error, error.__cause__, error.__context__) if isinstance(one, Terminated)), None)
    return str(found or "interrupted")


def explained(error: Exception) -> str | None:
    """One line for a disk that is full or fails, a folder that may not be written to, too little memory; else None."""
    number, said = getattr(error, "errno", None), str(error).lower()
    place = getattr(error, "filename", None)
    where = f" ({place})" if place else ""
    if number in FULL or any(text in said for text in SAYS_FULL):
        return f"the disk is full{where}: make room, or start where there is more; {GO_ON} ({first_line(error)})"
    if number in FORBIDDEN:
        return (
            f"{place or 'a file'} cannot be written or read ({first_line(error)}): change its mode, or start "
            "in a folder of your own"
        )
    if number in FAILING:
        return (
            f"{place or 'a file'} cannot be written or read ({first_line(error)}): the disk, or the connection to it, "
            f"fails; when that is mended, {GO_ON}"
        )
    if isinstance(error, MemoryError) or any(text in said for text in SAYS_MEMORY):
        return (
            "out of memory: take a smaller train.micro_batch (the numbers stay the same), then smaller batch_size "
            f"of evaluation, opponent and data; {GO_ON} ({first_line(error)})"
        )
    return None
