"""The one training loop: a method plugs in its loss, everything else is shared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from bench.errors import BenchError, did_you_mean
from bench.methods.base import Errors, Facts, Method, Pairing
from bench.methods.signals import LOSS, WINNER_ERROR
from bench.models import adapters
from bench.models.compiled import expect_same_gradients
from bench.runtime.processes import Processes
from bench.runtime.progress import track
from bench.training.batches import Batch, TrainData, facts, micro_batches, sample_order
from bench.training.checkpoint import Checkpoints, Writer, copied, load_state, save_state
from bench.training.denoising import Denoiser, denoising_errors, differences, inner_products
from bench.training.recipe import TrainSettings, expect_trainable, make_optimizer
from bench.training.signals import Broken, Row, Signals, Watch
from bench.training.weights import copied_weights, load_weights, moving_average, place

__all__ = ["TrainData", "TrainSettings", "train"]

Keep = Callable[[int, float], None]  # of a step and the seconds until then


class Pass(NamedTuple):
    """What policy and reference made of a micro-batch, and what is known of its samples."""

    policy: Errors
    reference: Errors | None
    facts: Facts


def train(
    policy: UNet2DConditionModel,
    reference: UNet2DConditionModel | None,
    method: Method,
    data: TrainData,
    settings: TrainSettings,
    noise_scheduler: Any,
    seed: int,
    accelerator: Accelerator,
    description: str = "training",
    checkpoints: Checkpoints | None = None,
    flops_per_sample: float | None = None,
    results: Collection[int] = (),
    keep: Keep | None = None,
) -> list[Row]:
    """Train `policy` in place with fp32 weights and return the logged signals.

    `noise_scheduler` is the pipeline's (any diffusers scheduler): its `alphas_cumprod` and `prediction_type`
    define the forward process. Each process takes its slice of the same global batch, so the number of
    processes changes nothing but rounding. There is a row per log interval (signals.py), with `step` counted
    over all iterations, `grad_norm` before clipping, and `lr`.

    With `settings.lora_rank` the policy comes with an adapter attached (models/adapters.py), which alone is trained
    and stays attached; then `reference` may be the policy itself, which stands for it with the adapter off. With
    `settings.ema` the policy ends as the moving average of its trained weights.

    With `checkpoints` a training that was killed goes on after the newest of them and ends with the weights and
    signals of an undisturbed one, bit for bit on a CPU.

    After each number of steps in `results` the main process calls `keep` with it and with the seconds the training
    took until then; meanwhile `policy` is what it would be if the training ended there. Nothing is restarted, and the
    end is the same to the last bit. Raises BenchError when the training breaks or collapses.
    """
    expect_trainable(policy, reference, method, data, settings, accelerator)
    loop = Loop(policy, reference, method, data, settings, noise_scheduler, seed, accelerator, flops_per_sample)
    start = loop.resume(checkpoints) if checkpoints else 0
    steps = range(start, settings.steps)
    if accelerator.is_main_process:
        steps = track(steps, description, total=settings.steps, unit="step", initial=start)
    try:
        for step in steps:
            loop.step(step)
            if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                loop.log(step)
            if keep and step + 1 in results:  # before the state to resume from: no resumed training passes it by
                loop.result(step + 1, keep)
            if checkpoints and checkpoints.due(step + 1) and step + 1 < settings.steps:
                loop.save(checkpoints, step)
        loop.finish()
    except Broken as error:
        loop.writer.wait()
        kept = checkpoints.newest() if checkpoints else None
        raise Broken(f"{error}; last good checkpoint: {kept or 'none was written yet'}") from None
    finally:
        loop.close()
    return loop.history


class Loop:
    """The state of one training run: models, optimizer, signals and history."""

    def __init__(
        self,
        policy: UNet2DConditionModel,
        reference: UNet2DConditionModel | None,
        method: Method,
        data: TrainData,
        settings: TrainSettings,
        noise_scheduler: Any,
        seed: int,
        accelerator: Accelerator,
        flops_per_sample: float | None,
    ):
        self.policy, self.method, self.data, self.settings, self.seed = policy, method, data, settings, seed
        self.accelerator, self.processes = accelerator, Processes(accelerator)
        self.paired = method.pairing is not Pairing.WINNER
        device, prediction_type = accelerator.device, noise_scheduler.config.prediction_type
        self.alpha_bar = noise_scheduler.alphas_cumprod.to(device, torch.float32)
        unet = self._compiled(place(policy, device))
        self.reference, self.own_reference = None, reference is policy
        if reference is not None:
            frozen = unet if self.own_reference else self._compiled(place(reference, device).requires_grad_(False))
            self.reference = Denoiser(frozen, prediction_type)
        if settings.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        if accelerator.scaler is not None:  # the accelerator's has the scale that the last training ended with
            accelerator.scaler = torch.amp.GradScaler(device.type)
        trained = self.trained = [weight for weight in policy.parameters() if weight.requires_grad]
        self.processes.wait()  # models may come from a busy disk; from here on processes wait for exchanges only
        self.denoiser, self.optimizer = accelerator.prepare(
            Denoiser(unet, prediction_type), make_optimizer(trained, settings, device)
        )
        self.ema = None if settings.ema is None else moving_average(trained, settings.ema)
        self.signals = Signals(
            accelerator, len(self.alpha_bar), settings.batch_size, self.paired, method.signals, flops_per_sample
        )
        self.watch = Watch(method, settings.stop_on_collapse, scaled=accelerator.scaler is not None)
        self.history: list[Row] = []
        self.started = self.saved = time.perf_counter()
        self.earlier, self.writer = 0.0, Writer(beside=device.type == "cuda")
        if settings.compile:
            self._check_compiler(Denoiser(policy, prediction_type))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _compiled(self, unet: UNet2DConditionModel) -> nn.Module:
        return torch.compile(unet) if self.settings.compile else unet

    def _check_compiler(self, plain: Denoiser) -> None:
        """Compare the gradients of the first micro-batch with those of the model as it is."""
        batch = next(self._batches(0))

        def errors(denoiser: nn.Module) -> Tensor:
            return differences(denoiser, batch).square().mean(dim=(1, 2, 3))

        with self.accelerator.no_sync(self.denoiser), self.accelerator.autocast():
            expect_same_gradients(
                lambda: errors(self.denoiser), lambda: errors(plain), self.trained, self.settings.precision
            )

    def step(self, step: int) -> None:
        """One optimizer step; `step` counts from 0 in this iteration. Never waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(step)
        mean = self._batch_mean(step) if self.method.has_statistic() else None
        last = math.ceil(len(self._own_samples(step)) / self.settings.micro_batch) - 1
        for number, batch in enumerate(self._batches(step)):
            # gradients of several processes are exchanged once a step, with the last micro-batch
            with nullcontext() if number == last else self.accelerator.no_sync(self.denoiser):
                self._accumulate(batch, mean)
        norm = self.accelerator.clip_grad_norm_(self.trained, self.settings.max_grad_norm)
        self.signals.add("grad_norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.trained)
        self.signals.steps += 1

    def _batches(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of a step."""
        settings, number = self.settings, self.settings.first_step + step
        return micro_batches(
            self.data,
            self._own_samples(step),
            paired=self.paired,
            seed=self.seed,
            step=number,
            micro_batch=settings.micro_batch,
            alpha_bar=self.alpha_bar,
            prompt_dropout=settings.prompt_dropout,
        )

    def _own_samples(self, step: int) -> np.ndarray:
        """This process's slice, by position, of the global batch."""
        size, processes = self.settings.batch_size, self.accelerator.num_processes
        index = self.accelerator.process_index
        batch = sample_order(self.seed, (self.settings.first_step + step) * size, size, len(self.data))
        return batch[size * index // processes : size * (index + 1) // processes]

    def _pass(self, batch: Batch) -> Pass:
        """Run reference and policy on a micro-batch.

        The reference runs first, on the same rows in the same order as the policy: equal weights then go
        through equal kernels and give equal bits, and the first loss of DPO and SPIN is exactly log 2. (Compiled,
        the two are different graphs, and equal only up to rounding.)
        """
        expected = None
        if self.reference is not None:
            with torch.no_grad(), self.accelerator.autocast(), self._adapter_off():
                expected = differences(self.reference, batch)
        found = differences(self.denoiser, batch)
        samples = len(found) // (2 if self.paired else 1)
        told = facts(batch.timesteps[:samples], self.alpha_bar)
        if self.method.needs_products:
            told = told._replace(products=inner_products(found, expected, self.paired))
        reference = None if expected is None else denoising_errors(expected, self.paired)
        return Pass(denoising_errors(found, self.paired), reference, told)

    def _batch_mean(self, step: int) -> Tensor:
        """The mean of the method's statistic over the global batch, fp32 []; it costs a pass over all of it."""
        with torch.no_grad():
            sums = [
                self._expect_rows("statistic", self.method.statistic(*found), found).to(self.signals.exact).sum()
                for found in map(self._pass, self._batches(step))
            ]
        total = self.accelerator.reduce(torch.stack(sums).sum(), "sum")
        return (total / self.settings.batch_size).float()

    def _accumulate(self, batch: Batch, batch_mean: Tensor | None) -> None:
        """Add a micro-batch's share of the gradient of the mean loss over the global batch."""
        found = self._pass(batch)
        told = found.facts._replace(batch_mean=batch_mean)
        loss, signals = self.method.loss(found.policy, found.reference, told)
        self._expect_rows("loss", loss, found)
        # processes average their gradients, so the sum over all of them is divided by the batch size alone
        scale = self.accelerator.num_processes / self.settings.batch_size
        self.accelerator.backward(loss.sum() * scale)
        for name, signal in {LOSS.name: loss, WINNER_ERROR.name: found.policy.winner, **signals}.items():
            if name not in self.signals.declared:
                raise BenchError(
                    f"{self.method.name}: its loss logs '{name}', which is not among its signals"
                    f"{did_you_mean(name, self.signals.declared)}"
                )
            self.signals.add(name, self._expect_rows(name, signal, found), told.timestep)

    def _expect_rows(self, name: str, values: Tensor, found: Pass) -> Tensor:
        """One value a sample: of a mean, the scale of the gradient would be silently wrong."""
        if values.shape != found.policy.winner.shape:
            raise BenchError(
                f"{self.method.name}: {name} has shape {list(values.shape)}, but one value a sample, "
                f"{list(found.policy.winner.shape)}, is asked for"
            )
        return values

    def _adapter_off(self) -> AbstractContextManager[None]:
        return adapters.switched_off(self.policy) if self.own_reference else nullcontext()

    def log(self, step: int) -> None:
        """Add a row to the history, unless it shows that the training broke; waits for the device."""
        steps = self.signals.steps
        row = self.signals.read(self.settings.first_step + step + 1, self.settings.learning_rate(step))
        self.watch.see(row, steps)
        self.history.append(row)

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Keep everything that decides the steps after this one; never a state that looks broken.

        On a GPU the training waits for a copy of it alone, some seconds; it is written while the next steps are made.
        """
        if not self._rested(checkpoints):
            return
        signals = self.signals.state()
        if not (self.watch.calm and self._finite(signals["totals"])):
            return
        began = self.saved = time.perf_counter()
        if self.accelerator.is_main_process:
            self.writer.wait()  # first, so that there is one copy at a time
            scaler = self.accelerator.scaler
            state = copied(
                {
                    "step": step + 1,
                    "signals": signals,
                    "history": list(self.history),
                    "optimizer": self.optimizer.state_dict(),
                    "ema": self.ema.state_dict() if self.ema is not None else None,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                }
            )
            save_weights, seconds = copied_weights(self.policy), self.earlier + began - self.started

            def write() -> None:
                with checkpoints.write(step + 1, seconds) as folder:
                    save_weights(folder)
                    save_state(folder, state)

            self.writer.write(write)
        self.processes.wait()
        self.signals.started += time.perf_counter() - began  # the rates are those of the training alone

    def _rested(self, checkpoints: Checkpoints) -> bool:
        """Whether the last checkpoint is long enough ago; by the main process's clock, since all take part in one."""
        if not checkpoints.minutes:
            return True
        return self.processes.once(lambda: time.perf_counter() - self.saved >= 60 * checkpoints.minutes)

    def _finite(self, totals: dict[str, list[float]]) -> bool:
        """Whether the signals since the last row and the weights themselves are finite."""
        summed = all(math.isfinite(totals[name][0]) for name in self.watch.finite if name in totals)
        return summed and self._weights_finite()

    def _weights_finite(self) -> bool:
        return bool(torch.stack([weight.isfinite().all() for weight in self.trained]).all())

    def result(self, step: int, keep: Keep) -> None:
        """Show the policy as it would be if the training ended after `step` steps."""
        self.expect_finite(step)
        began = time.perf_counter()
        if self.accelerator.is_main_process:
            with self._averaged():
                keep(step, self.earlier + began - self.started)
        self.processes.wait()
        self.signals.started += time.perf_counter() - began  # the rates are those of the training alone

    def expect_finite(self, step: int) -> None:
        """Refuse to make a result of weights that the last step broke; the log would show it in the next one only."""
        if not self._weights_finite():
            raise Broken(
                f"{self.method.name}: the weights are not finite after step {self.settings.first_step + step} "
                f"(lr {self.settings.learning_rate(step - 1):g}); try a lower lr or a longer warm-up"
            )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Lend the policy the moving average, where one is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        yield
        self.ema.restore(self.trained)

    def resume(self, checkpoints: Checkpoints) -> int:
        """Take over the newest checkpoint and return the step to go on with, 0 when there is none."""
        folder = checkpoints.newest()
        if folder is None:
            return 0
        state = load_state(folder)
        load_weights(self.policy, folder)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for row in state["history"]:
            self.watch.see(row, self.settings.log_every)
        self.history = state["history"]
        self.signals.restore(state["signals"])
        self.earlier = checkpoints.seconds()
        return state["step"]

    def finish(self) -> None:
        """Leave the moving average in the policy, where one is kept."""
        self.expect_finite(self.settings.steps)
        self.writer.wait()
        if self.ema is not None:
            self.ema.copy_to(self.trained)

    def close(self) -> None:
        """Leave nothing of the training on the policy but its weights, and nothing that keeps the policy.

        The forward that accelerate puts on a model for mixed precision refers to the model: a cycle, which would hold
        weights, gradients and optimizer on the device until Python happens to look for cycles.
        """
        self.writer.close()
        if self.settings.gradient_checkpointing:
            self.policy.disable_gradient_checkpointing()
        plain = self.accelerator.unwrap_model(self.denoiser, keep_fp32_wrapper=False)
        vars(plain).pop("forward", None)  # the class's own, bound to the model: a cycle too
        del self.denoiser, self.optimizer, self.reference, plain
        self.accelerator.free_memory()
