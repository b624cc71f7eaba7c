"""The signals of a training: summed on the device, read once a log interval, and watched for a collapse."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from bench.costs import cards
from bench.errors import BenchError
from bench.methods.base import Method
from bench.methods.signals import EVERY_TRAINING, GRAD_NORM, LOSS, WINNER_ERROR, Signal

Row = dict[str, float]

BUCKETS = 4  # equal ranges of timesteps, for the signals that are shown in them
PER_STEP = (GRAD_NORM.name,)  # one value a step and process; all other signals have one a sample
UNKNOWN = float("nan")  # null in history.parquet

PATIENCE = 3  # rows in a row that must show the same collapse
SATURATED = 1e-4  # loss; the gradient of -log sigmoid is scaled by 1 - exp(-loss), so by as little
DIVERGED = 10  # times the loss of a policy equal to its reference
NOISE = 2.0  # winner error of an answer that is unrelated noise: the variances of both add up


class Signals:
    """Sums since the last row. Nothing here waits for the device but `read` and `totals`.

    A row has the mean over the interval of the loss and of every signal of the method, and

    - of one with `spread` its standard deviation over the samples of the interval, `logit_std`;
    - of one `by_timestep` the same in ranges of timesteps, `winner_drift_t0_249` and so on; null where no sample of
      the interval fell into the range;
    - `winner_error`, the policy's, which is 1 for a model that answers 0;
    - `pairs_per_s` (samples of the method: pairs, or single images), `images_per_s`, both over all processes;
    - `mfu`: operations of the model, 8 or 3 forward passes a sample and whatever gradient checkpointing adds not
      counted, over what the cards could do at most in that time (bench/costs/cards.py); null where that is not known.
      fp32 is compared with the peak without TF32, which cuDNN's convolutions may use;
    - `peak_memory_gib`, as torch allocated it on this process's GPU since the training began; null on a CPU.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        timesteps: int,
        batch_size: int,
        paired: bool,
        declared: Sequence[Signal],
        flops_per_sample: float | None = None,
    ):
        self.declared = {signal.name: signal for signal in (*EVERY_TRAINING, *declared)}
        self.accelerator, self.timesteps, self.batch_size = accelerator, timesteps, batch_size
        self.images = 2 if paired else 1
        self.flops_per_sample, self.peak = flops_per_sample, peak_rate(accelerator)
        self.exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.buckets = torch.arange(BUCKETS, device=accelerator.device)
        self.sums: dict[str, Tensor] = {}
        self.steps, self.started = 0, time.perf_counter()

    def add(self, name: str, values: Tensor, timesteps: Tensor | None = None) -> None:
        """Add the values of a declared signal `[B]`, or a single one; `timesteps` `[B]` where it belongs to samples."""
        signal = self.declared[name]
        values = values.detach().to(self.exact)
        total = values.sum().reshape(1)
        if signal.spread:
            total = torch.cat([total, values.square().sum().reshape(1)])
        if signal.by_timestep:
            assert timesteps is not None
            # a product with an indicator, because adding by index is not deterministic on a GPU
            inside = (timesteps[:, None] * BUCKETS // self.timesteps == self.buckets).to(self.exact)
            total = torch.cat([total, values @ inside, inside.sum(0)])
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def totals(self) -> dict[str, list[float]]:
        """The sums over all processes, by name; one wait for the device."""
        flat = self.accelerator.reduce(torch.cat(list(self.sums.values())), "sum") if self.sums else torch.empty(0)
        parts = flat.cpu().split([len(total) for total in self.sums.values()])
        return {name: part.tolist() for name, part in zip(self.sums, parts, strict=True)}

    def read(self, step: int, lr: float) -> Row:
        """The row of the steps since the last call, `step` (from 1, over all iterations) being the last."""
        totals, samples = self.totals(), self.steps * self.batch_size
        seconds = time.perf_counter() - self.started
        row: Row = {"step": step}
        for name, total in totals.items():
            count = self.steps * self.accelerator.num_processes if name in PER_STEP else samples
            row |= self._columns(name, total, count)
        rate = samples / seconds
        row |= {
            "lr": lr,
            "pairs_per_s": rate,
            "images_per_s": rate * self.images,
            "mfu": self._mfu(rate),
            "peak_memory_gib": peak_memory(self.accelerator.device),
        }
        self.sums, self.steps, self.started = {}, 0, time.perf_counter()
        return row

    def _columns(self, name: str, total: list[float], count: int) -> Row:
        columns, signal = {name: total[0] / count}, self.declared[name]
        if signal.spread:
            variance = total[1] / count - columns[name] ** 2
            columns[f"{name}_std"] = math.sqrt(max(0.0, variance)) if math.isfinite(variance) else UNKNOWN
        if signal.by_timestep:
            ranges = zip(bounds(self.timesteps), total[-2 * BUCKETS : -BUCKETS], total[-BUCKETS:], strict=True)
            columns |= {
                f"{name}_t{low}_{high}": drift / seen if seen else UNKNOWN for (low, high), drift, seen in ranges
            }
        return columns

    def _mfu(self, rate: float) -> float:
        if self.flops_per_sample is None or self.peak is None:
            return UNKNOWN
        return rate * self.flops_per_sample / (self.peak * self.accelerator.num_processes)

    def state(self) -> dict:
        """What a later process needs to go on with the interval: plain numbers, summed over all processes."""
        return {"totals": self.totals(), "steps": self.steps, "seconds": time.perf_counter() - self.started}

    def restore(self, state: dict) -> None:
        """Go on from `state`; the main process takes over what all processes had added."""
        share = 1.0 if self.accelerator.is_main_process else 0.0
        device = self.accelerator.device
        self.sums = {
            name: share * torch.tensor(total, dtype=self.exact, device=device)
            for name, total in state["totals"].items()
        }
        self.steps, self.started = state["steps"], time.perf_counter() - state["seconds"]


def bounds(timesteps: int) -> list[tuple[int, int]]:
    """First and last timestep of each bucket."""
    edges = [math.ceil(bucket * timesteps / BUCKETS) for bucket in range(BUCKETS + 1)]
    return [(low, high - 1) for low, high in zip(edges, edges[1:], strict=False)]


def peak_rate(accelerator: Accelerator) -> float | None:
    """What one device can do at most, in operations per second at the training's precision."""
    if accelerator.device.type != "cuda":
        return None
    card = cards.recognise(torch.cuda.get_device_name(accelerator.device))
    precision = accelerator.mixed_precision
    return cards.CARDS[card].peak("fp32" if precision == "no" else precision) if card else None


def peak_memory(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else UNKNOWN


class Broken(BenchError):
    """A training that goes on no longer makes sense."""


class Watch:
    """Looks at every row, and stops a training that is broken or has nothing left to learn from.

    At once: a loss or gradient norm that is not finite. After PATIENCE rows in a row of the same collapse:

    - saturated: the mean loss of a method that says where it starts is below SATURATED, and each of its signals with
      a ceiling is there: every single pair of the interval is told apart. The gradient of a pair is scaled by
      1 - exp(-loss), so what is left of it is a ten-thousandth: weight decay and Adam's normalisation of vanishing
      gradients are all that still moves the weights.
    - diverged: the mean loss of such a method is above DIVERGED times its start, which a policy that is still its
      reference has: the average pair is then ranked wrong by a margin of ten or so, not just a few outliers.
    - noise: the winners' error is above NOISE, that of an answer which has nothing to do with its input, and
      above what it was in the first row (random weights may begin there, and then come down).

    The limits are wide on purpose: a healthy training, or one that merely learns nothing, is never stopped.
    """

    def __init__(self, method: Method | type[Method], collapse: bool = True, scaled: bool = False):
        self.method, self.start, self.collapse = method.name, method.start, collapse
        self.ceilings = {signal.name: signal.ceiling for signal in method.signals if signal.ceiling is not None}
        # under fp16 the loss scaler skips steps whose gradient overflowed, so there only the loss counts
        self.finite = (LOSS.name,) if scaled else (LOSS.name, GRAD_NORM.name)
        self.first: Row | None = None
        self.kind, self.rows = "", 0

    @property
    def calm(self) -> bool:
        """Whether the last row showed no sign of a collapse."""
        return not self.kind

    def see(self, row: Row, steps: int) -> None:
        """Judge a row over `steps` steps. Raises Broken."""
        for name in self.finite:
            if not math.isfinite(row[name]):
                raise Broken(
                    f"{self.method}: {name} became {row[name]} in steps {row['step'] - steps + 1} to "
                    f"{row['step']} (lr {row['lr']:g}); try a lower lr or a longer warm-up"
                )
        self.first = self.first or row
        kind = self._collapsed(row)
        self.rows = self.rows + 1 if kind == self.kind else 1
        self.kind = kind
        if kind and self.rows >= PATIENCE and self.collapse:
            raise Broken(
                f"{self.method}: collapsed: {kind}, in the last {self.rows} rows of the log to step "
                f"{row['step']} (lr {row['lr']:g}); try a lower lr or other beta, or go on all the "
                "same with train.stop_on_collapse=false"
            )

    def _collapsed(self, row: Row) -> str:
        loss, error = row[LOSS.name], WINNER_ERROR.name
        if self.start is not None:
            won = all(row.get(name) == ceiling for name, ceiling in self.ceilings.items())
            if won and loss < SATURATED:
                told = "".join(f"{name} is {ceiling:g} and " for name, ceiling in self.ceilings.items())
                return f"{told}the loss is below {SATURATED:g}, so nothing more is learned"
            if loss > DIVERGED * self.start:
                return f"the loss is above {DIVERGED * self.start:.1f}, {DIVERGED} times that of an untrained policy"
        if self.first is not None and NOISE < row[error] > self.first[error]:
            return f"the winners' error is above {NOISE:g}, so the model answers with noise"
        return ""
