"""The processes of one launch (torchrun, accelerate launch): all of them work, one writes, and they fail as one.

Outside a launcher there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from bench.errors import BenchError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# The longest that the others wait while one encodes a data set or writes: on a group of its own, over sockets.
PATIENCE = timedelta(hours=12)
# The longest that gradients of one process wait for those of another: a hang costs all their devices. Between two
# exchanges lie a micro-batch, its data off a disk that may stall, and once some minutes of compiling.
EXCHANGE = timedelta(minutes=15)
SEEN_WITHIN = 120.0  # seconds after which a shared file system must show one host what another one wrote


def count() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def index() -> int:
    """Which of them this one is; 0 is the main process, the only one that prints and writes results."""
    return int(os.environ.get("RANK", 0))


def accelerator(mixed_precision: str) -> Accelerator:
    """Bring the launch's processes together; what is said to compute in fp32 does so in all its bits."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # left alone, a GPU's convolutions round their inputs to TF32's 10 bits and its matrix products do not
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # without a GPU, accelerate lets every process run on its own unless it is told to use the CPU
    made = Accelerator(
        cpu=count() > 1 and not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=EXCHANGE)],
    )
    if made.num_processes != count():
        raise BenchError(f"the launcher started {count()} processes, of which {made.num_processes} found each other")
    if made.num_processes > 1:
        _patient()  # made now, while nobody is late
    return made


def tf32() -> dict[str, bool]:
    """Whether a GPU's fp32 matrix products and convolutions are TF32's; for the record of a process."""
    import torch

    return {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolution": torch.backends.cudnn.allow_tf32}


class Processes:
    """What the processes of a run do together; each method is called by all of them, in the same order."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.count, self.index = accelerator.num_processes, accelerator.process_index

    @property
    def main(self) -> bool:
        return self.index == 0

    def once(self, call: Callable[[], T]) -> T:
        """What `call` returns on the main process, on all of them.

        Whatever depends on the clock or on files is decided this way: two hosts may see different things.
        """
        if self.count == 1:
            return call()
        import torch.distributed as dist

        found: list[Any] = [call() if self.main else None]
        dist.broadcast_object_list(found, group=_patient())
        return found[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of a list that all have."""
        return items[self.index :: self.count]

    def wait(self) -> None:
        """Go on when all have come here, however long one of them takes."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier(group=_patient())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process make what the others then find."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def expect(self, seen: Callable[[], bool], folder: Path) -> None:
        """Wait until this process sees what another one has written into `folder`."""
        deadline = time.monotonic() + SEEN_WITHIN
        while not seen():
            if self.count == 1 or time.monotonic() > deadline:
                raise BenchError(
                    f"process {self.index} on {socket.gethostname()} does not see all of "
                    f"{folder.absolute()}: all hosts must share the folder that bench is started in"
                )
            time.sleep(0.1)

    def end(self) -> None:
        """Take leave of the others; what follows is done by each on its own."""
        if self.count > 1:
            self.accelerator.end_training()


@cache
def _patient() -> ProcessGroup:
    """The group in which processes wait for each other; all must ask for it at the same point, as for all it does.

    Of sockets: a wait on the devices' own group is an exchange like any other, and ends when EXCHANGE does.
    """
    import torch.distributed as dist

    return dist.new_group(timeout=PATIENCE, backend="gloo")


def lost(error: Exception) -> bool:
    """Whether an error means that another process has died or cannot be reached."""
    if count() == 1:
        return False
    from torch.distributed import DistError

    said = str(error).lower()
    return isinstance(error, DistError) or "gloo" in said or "connection closed by peer" in said


def fail(message: str, code: int) -> NoReturn:
    """End this process with one line on stderr, and with it the launch.

    Of all processes that fail, often one after the other because the first one is gone, only the first speaks.
    """
    if count() > 1:  # on a line of its own, whatever another process was drawing
        message = f"\n{message} [process {index()} of {count()}, on {socket.gethostname()}]"
    if _first_to_fail():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(1)  # the launcher stops all when one ends, and the first may still be speaking
    if count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)  # an orderly exit would wait for collectives that the others no longer take part in


def _first_to_fail() -> bool:
    if count() == 1:
        return True
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10)
        )
        return store.add(f"bench/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True  # nobody to ask
