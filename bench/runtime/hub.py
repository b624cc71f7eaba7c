"""The Hugging Face hub: names on it, the files behind them, and outages of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

from bench.errors import BenchError, first_line

T = TypeVar("T")
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".parquet")  # what a hub name cannot end in
PATIENCE = timedelta(hours=2)  # the outage that a job outlasts; the other processes wait for longer (processes.py)
FIRST, MOST = 5.0, 300.0  # seconds before the second attempt, doubled with every other one, and at most
LATER = (408, 429)  # answers that may be other ones later, besides all of 500 and above
UNANSWERED = ("TransportError", "RequestException")  # of httpx and of requests: the hub's client has used both


class Clock(Protocol):
    """What of `time` is needed here."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


def is_hub_id(name: str) -> bool:
    """Whether a name is one on the hub: OWNER/NAME, not a path, and nothing of that name is on this machine."""
    path = Path(name).expanduser()
    return name.count("/") == 1 and name[0] not in "./~" and path.suffix not in FILES and not path.exists()


@dataclass(frozen=True)
class Repository:
    """A model repository at one revision: what it holds, and a way to those files that are wanted."""

    name: str
    revision: str | None
    names: tuple[str, ...]

    @classmethod
    def look_up(cls, name: str, revision: str | None = None) -> Repository:
        """List a repository without fetching anything; where the hub cannot be reached, what is cached of it."""
        from huggingface_hub import HfApi, snapshot_download

        try:
            return cls(name, revision, tuple(HfApi().list_repo_files(name, revision=revision)))
        except Exception as error:  # the hub's client raises errors of several libraries
            try:
                folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
            except Exception:
                at = f" at revision {revision}" if revision else ""
                raise BenchError(
                    f"{name}: no such file or folder, and the hub failed{at}: {first_line(error)}; a name on the hub "
                    "needs the network once, a folder never"
                ) from error
            return cls(name, revision, tuple(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")))

    def fetch(self, names: Sequence[str]) -> Path:
        """The folder that holds these files (and, as the hub's client keeps more, others); its name is the commit."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(self.name, revision=self.revision, allow_patterns=list(names)))
        except Exception as error:
            raise BenchError(f"{self.name}: the hub failed: {first_line(error)}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BenchError(f"{self.name}: {missing[0]} is not cached, and the hub cannot be reached")
        return folder


def outlast(call: Callable[[], T], what: str, clock: Clock = time) -> T:
    """What `call` returns, asked again and again while the hub is out of order or out of reach.

    The hub's client itself gives up after half a minute. Raises its error at once where waiting does not help (a file
    that is not there, no permission), and after PATIENCE where it did not.
    """
    deadline, pause = clock.monotonic() + PATIENCE.total_seconds(), FIRST
    while True:
        try:
            return call()
        except Exception as error:  # the client raises errors of several libraries
            if not passing(error) or clock.monotonic() + pause > deadline:
                raise
            print(
                f"bench: {what}: the hub failed ({first_line(error)}); next attempt in {pause:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        clock.sleep(pause)
        pause = min(2 * pause, MOST)


def passing(error: Exception) -> bool:
    """Whether an error says that the hub cannot answer now, and not what its answer is."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in LATER or status >= 500
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "OfflineModeIsEnabled" in kinds:  # a ConnectionError by descent, but a setting by nature
        return False
    return isinstance(error, (ConnectionError, TimeoutError)) or not kinds.isdisjoint(UNANSWERED)
