"""What a run will cost before anything is spent: operations, GPU-hours, peak memory and disk, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from bench import models, registry
from bench.costs import cost, memory
from bench.costs.cards import Card
from bench.data import load_pairs, load_prompts
from bench.errors import BenchError
from bench.experiment import planned_iterations
from bench.methods.base import Pairing
from bench.metrics import official
from bench.metrics.base import Metric
from bench.models.architecture import Architecture, architecture
from bench.runtime.progress import quiet
from bench.sampling.sample import SCHEDULERS, latent_shape
from bench.scoring.evaluate import Scorers
from bench.storage.runs import CACHE
from bench.suites import Iteration, Suite
from bench.training.batches import sample_order

FP32 = 4  # bytes
PNG = 0.6  # bytes of a PNG over those of its pixels, for photographs; drawings take less
ROW = 40  # bytes of one score in parquet
TRAIN_SPLIT = 851_293, 58_960  # pairs without ties and prompts of Pick-a-Pic v2 (Diffusion-DPO, arXiv 2311.12908)
PROMPTS = {"partiprompts": 1632, "hpsv2": 3200, "test_unique": 500, "validation_unique": 500}  # as published
EXAMPLE = load_prompts("world:test", 1).prompts[0]  # a caption that every scorer can read, the judge too


UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"))


@dataclass(frozen=True)
class StagePlan:
    """One stage: how many of what, operations, peak bytes on the device, bytes left on disk."""

    name: str
    count: int
    unit: str
    flops: float
    peak_memory_bytes: int
    disk_bytes: int
    dtype: str  # what it computes in


@dataclass(frozen=True)
class Plan:
    """All stages of one or several methods of a suite, and what could not be counted."""

    suite: str
    methods: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def peak_memory_bytes(self) -> int:
        return max(stage.peak_memory_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)


def plan(suite: Suite, methods: Sequence[str], iters: int | None = None, seed: int = 0) -> Plan:
    """Plan the runs `bench run` would make with the same arguments; latents and base samples are made once."""
    maker = Planner(suite, seed)
    # as bench run does: with several methods, the number of iterations asked for is that of self-play
    schedules = {
        name: suite.schedule(name, planned_iterations(name, suite, iters, len(methods) > 1)) for name in methods
    }
    stages = [maker.encode(methods)]
    for name, schedule in schedules.items():
        stages += maker.training(name, schedule)
    models = 1 + sum(len(iteration.checkpoints) + 1 for schedule in schedules.values() for iteration in schedule)
    stages += [maker.sampling(models), maker.scoring(models)]
    return Plan(suite.name, tuple(methods), tuple(stages), tuple(dict.fromkeys(maker.notes)))


class Planner:
    """Counts of one suite; each is made once, and only when a stage asks for it."""

    def __init__(self, suite: Suite, seed: int):
        self.suite, self.seed, self.dtype = suite, seed, suite.model.dtype
        self.models: Architecture = architecture(suite.model.weights)
        self.shape, self.tokens = latent_shape(self.models.unet), self.models.tokens
        self.notes: list[str] = []
        self.counted: dict[Hashable, int] = {}

    @cached_property
    def forward(self) -> int:
        return cost.unet_flops(self.models.unet, self.shape, self.tokens)

    def forward_and_backward(self, checkpointing: bool, lora_rank: int | None) -> int:
        return self.once(
            (checkpointing, lora_rank),
            lambda: cost.unet_training_flops(self.models.unet, self.shape, self.tokens, checkpointing, lora_rank),
        )

    def once(self, key: Hashable, count: Callable[[], int]) -> int:
        """What was counted for this key, counted now if it was not: iterations mostly share their training step."""
        if key not in self.counted:
            self.counted[key] = count()
        return self.counted[key]

    @cached_property
    def coding(self) -> tuple[int, int]:
        """Encoding and decoding one image."""
        return cost.vae_flops(self.models.vae, self.shape)

    @cached_property
    def unet_weights(self) -> int:
        return memory.parameter_bytes(self.models.unet, self.dtype)

    @cached_property
    def resident(self) -> int:
        """Weights that stay on the device during a whole run: autoencoder, text encoder, every scorer in fp32."""
        frozen = (self.models.vae, self.models.text_encoder)
        return sum(memory.parameter_bytes(part, self.dtype) for part in frozen) + self.scorers[1]

    @cached_property
    def scorers(self) -> tuple[int, int]:
        """Operations for one image with its prompt, bytes of weights."""
        return scoring_cost(self.suite, self.notes)

    def encode(self, methods: Sequence[str]) -> StagePlan:
        """Latents of winners (and losers, where a method reads them) and prompt embeddings, made once."""
        data = self.suite.data
        human = any(self.suite.method(name).pairing is Pairing.HUMAN for name in methods)
        images = self.pairs * (2 if human else 1) * (2 if data.flip else 1)
        flops = images * self.coding[0] + self.prompts * cost.text_flops(self.models.text_encoder, self.tokens)
        batch = memory.vae_bytes(self.models.vae, self.shape, min(data.batch_size, self.pairs), self.dtype)[0]
        embedding = self.tokens * self.models.unet.config.cross_attention_dim
        stored = images * int(np.prod(self.shape)) + self.prompts * embedding
        return StagePlan(
            "encode",
            images,
            "images",
            flops,
            self.resident + batch,
            stored * models.DTYPES[data.precision].itemsize,
            self.dtype,
        )

    @property
    def pairs(self) -> int:
        return self.data[0]

    @property
    def prompts(self) -> int:
        return self.data[1]

    @cached_property
    def data(self) -> tuple[int, int]:
        """Training pairs and distinct prompts. A data set on the hub is not opened: that would be a scan of it."""
        data = self.suite.data
        kind, _, source = data.pairs.partition(":")
        if kind == "pickapic" and not Path(source.partition("#")[0]).expanduser().exists():
            pairs = min(data.size or TRAIN_SPLIT[0], TRAIN_SPLIT[0])
            self.notes.append(
                f"{data.pairs} is not on this machine: counted as {pairs:,} pairs, as published of v2's "
                "train split, less what is left out for broken images"
            )
            return pairs, min(pairs, TRAIN_SPLIT[1])
        source = load_pairs(
            data.pairs,
            size=data.size,
            seed=data.seed,
            resolution=self.models.pixels[0],
            cache=CACHE,
            deduplicate=data.deduplicate,
        )
        return len(source), len(set(source.prompts))

    def training(self, name: str, schedule: Sequence[Iteration]) -> list[StagePlan]:
        """Opponent and training of every iteration of one method."""
        method, stages, first = self.suite.method(name), [], 0
        for number, iteration in enumerate(schedule, 1):
            if method.pairing is Pairing.SELF_PLAY:
                stages.append(self.opponent(name, number, first, iteration.steps))
            stages.append(
                self.train(
                    name,
                    number,
                    iteration.steps,
                    paired=method.pairing is not Pairing.WINNER,
                    reference=method.needs_reference,
                    checkpoints=len(iteration.checkpoints),
                )
            )
            first += iteration.steps
        return stages

    def opponent(self, method: str, number: int, first_step: int, steps: int) -> StagePlan:
        """Losers for every distinct pair the iteration sees, kept as latents."""
        settings, size = self.suite.opponents(method), self.suite.training(method).batch_size
        pairs = distinct_pairs(self.seed, first_step * size, steps * size, self.pairs)
        evaluations = solver_evaluations(settings.scheduler, settings.steps)
        flops = cost.sampling_flops(self.forward, 0, pairs, steps=evaluations, guidance=settings.guidance)
        rows = min(settings.batch_size, pairs) * (1 if settings.guidance == 1 else 2)
        return StagePlan(
            f"{method} {number}: opponent",
            pairs,
            "images",
            flops,
            self.resident + self.unet_weights + self.unet_pass(rows),
            pairs * int(np.prod(self.shape)) * FP32,
            self.dtype,
        )

    def train(
        self, method: str, number: int, steps: int, paired: bool, reference: bool, checkpoints: int = 0
    ) -> StagePlan:
        """Policy forward and backward, reference forward; the result and each checkpoint is the UNet in fp32.

        A method with a statistic of the batch runs both forward once more.

        A policy whose adapter is on the reference's weights is the reference too, with the adapter off.
        """
        settings = self.suite.training(method)
        own = settings.lora_rank and (number == 1 or self.suite.method(method).pairing is Pairing.SELF_PLAY)
        samples, images = steps * settings.batch_size, 2 if paired else 1
        policy = self.forward_and_backward(settings.gradient_checkpointing, settings.lora_rank)
        expected = self.forward if reference else 0
        again = self.forward + expected if self.suite.method(method).has_statistic() else 0
        flops = samples * images * (policy + expected + again)
        micro = min(settings.micro_batch, settings.batch_size)
        peak = self.training_peak(
            micro * images,
            dtype=settings.precision,
            reference=reference and not own,
            accumulate=settings.batch_size > micro,
            checkpointing=settings.gradient_checkpointing,
            optimizer=settings.optimizer,
            ema=settings.ema is not None,
            lora_rank=settings.lora_rank,
        )
        return StagePlan(
            f"{method} {number}: training",
            samples,
            "pairs" if paired else "images",
            flops,
            self.resident + peak,
            (1 + checkpoints) * memory.parameter_bytes(self.models.unet),
            settings.precision,
        )

    def training_peak(self, rows: int, **options: Any) -> int:
        return self.once(
            (rows, *options.items()),
            lambda: memory.training_bytes(self.models.unet, self.shape, self.tokens, rows, **options),
        )

    def sampling(self, models: int) -> StagePlan:
        """Images of the base and of every result, for all prompt sets, guidance scales and seeds."""
        settings, flops = self.suite.evaluation, 0.0
        evaluations = solver_evaluations(settings.scheduler, settings.steps)
        for guidance in settings.guidance:
            flops += cost.sampling_flops(
                self.forward, self.coding[1], self.images, steps=evaluations, guidance=guidance
            )
        rows = min(settings.batch_size, self.images)
        guided = 2 if any(guidance != 1 for guidance in settings.guidance) else 1
        batch = max(self.unet_pass(rows * guided), memory.vae_bytes(self.models.vae, self.shape, rows, self.dtype)[1])
        images, (height, width) = models * len(settings.guidance) * self.images, self.models.pixels
        return StagePlan(
            "evaluation: sampling",
            images,
            "images",
            models * flops,
            self.resident + self.unet_weights + batch,
            int(images * height * width * 3 * PNG),
            self.dtype,
        )

    def scoring(self, models: int) -> StagePlan:
        """All scorers, which on a GPU run under bf16 autocast whatever the suite says of the models."""
        images = models * len(self.suite.evaluation.guidance) * self.images
        return StagePlan(
            "evaluation: scoring",
            images,
            "images",
            images * self.scorers[0],
            self.resident,
            images * max(1, sum(len(registry.metric(name).columns) for name in self.suite.metrics)) * ROW,
            "bf16",
        )

    @cached_property
    def images(self) -> int:
        """Of one model at one guidance scale."""
        return sum(map(self.prompt_count, self.suite.evaluation.prompt_sets)) * len(self.suite.evaluation.seeds)

    def prompt_count(self, name: str) -> int:
        """Of a prompt set; what is not on this machine counts as published."""
        given = self.suite.evaluation.prompt_sets[name]
        published = PROMPTS.get(given.prompts) or PROMPTS.get(given.prompts.partition("#")[2])
        kind, _, source = given.prompts.partition(":")
        here = kind == "world" or Path((source or kind).partition("#")[0]).expanduser().exists()
        if here or not published:
            return len(load_prompts(given.prompts, given.limit))
        return min(published, given.limit or published)

    def unet_pass(self, rows: int) -> int:
        return memory.unet_bytes(self.models.unet, self.shape, self.tokens, rows, self.dtype)


def distinct_pairs(seed: int, first: int, count: int, size: int) -> int:
    """How many different pairs positions first..first+count-1 of the endless shuffled order hold."""
    to_epoch = -first % size
    if count >= to_epoch + size:
        return size
    if count <= to_epoch or to_epoch == 0:
        return count
    return len(np.unique(sample_order(seed, first, count, size)))


def solver_evaluations(scheduler: str, steps: int) -> int:
    """UNet evaluations of so many steps: PNDM takes one more than it is asked for."""
    solver = SCHEDULERS[scheduler](DDIMScheduler().config)
    solver.set_timesteps(steps)
    return len(solver.timesteps)


def scoring_cost(suite: Suite, notes: list[str]) -> tuple[int, int]:
    """Operations for one image with its prompt, and bytes of weights, over all scorers.

    Miniatures are run once and counted; of official checkpoints the architecture is known, of others what the metric
    declares.
    """
    given = {name: suite.metric_options.get(name, {}) for name in suite.metrics}
    kinds = {name: registry.metric(name) for name in suite.metrics}
    small = [name for name, kind in kinds.items() if kind.weights_of(given[name]) == "mini"]
    large = [name for name in suite.metrics if name not in small and name in official.ENCODERS]
    flops, weights = official.cost(large)
    for name in (name for name in suite.metrics if name not in {*small, *large}):
        if (declared := kinds[name].cost) is None:
            notes.append(f"metric {name} is not counted: it declares no cost, and is too large to be loaded for a plan")
        else:
            flops, weights = flops + declared.flops, weights + declared.weights
    loaded: dict[str, Metric] = {}
    for name in small:
        try:
            loaded |= Scorers.load([name], options=given).metrics
        except BenchError as error:
            notes.append(f"metric {name} is not counted: {error}")
    with quiet():
        flops += cost.flops(lambda: Scorers(loaded).score(np.zeros((1, 64, 64, 3), np.uint8), [EXAMPLE]))
    return flops, weights + sum(map(_weights, loaded.values()))


def _weights(scorer: Any) -> int:
    """Bytes of all networks a scorer holds, and of those its parts hold."""
    parts = [scorer, *vars(scorer).values()]
    nested = [value for part in parts if hasattr(part, "__dict__") for value in vars(part).values()]
    modules = {id(part): part for part in [*parts, *nested] if isinstance(part, torch.nn.Module)}
    return sum(memory.parameter_bytes(module) for module in modules.values())


# --- output ---


def as_record(made: Plan, card: Card, mfu: float, gpus: int) -> dict[str, Any]:
    """The plan in numbers: `gpu_hours` = FLOPs / (MFU x peak); `wall_hours` on all GPUs together."""

    def priced(hours: float) -> dict[str, float]:
        return {"gpu_hours": hours, "wall_hours": hours / gpus}

    hours = [stage.flops / (mfu * card.peak(stage.dtype) * 3600) for stage in made.stages]
    total = {
        "flops": made.flops,
        **priced(sum(hours)),
        "peak_memory_bytes": made.peak_memory_bytes,
        "disk_bytes": made.disk_bytes,
    }
    return {
        "suite": made.suite,
        "methods": list(made.methods),
        "assumptions": {
            "card": card.title,
            "gpus": gpus,
            "mfu": mfu,
            "card_memory_bytes": card.memory,
            "peak_flops_per_s": {dtype: card.peak(dtype) for dtype in sorted({stage.dtype for stage in made.stages})},
            "flops": "two per multiply-add; matrix products, convolutions and attention, counted by "
            "torch's FlopCounterMode on the models' shapes",
            "memory": "tensors alive at once in a simulated pass, per device; without allocator waste, "
            "workspaces (a third more, resident, on the miniature), CUDA context (1 to 2 GB) or "
            "Python (about 0.7 GB)",
        },
        "stages": [{**asdict(stage), **priced(spent)} for stage, spent in zip(made.stages, hours, strict=True)],
        "total": total,
        "notes": list(made.notes),
    }


def as_text(record: dict[str, Any]) -> str:
    """The table, the assumptions it stands on, and what does not fit."""
    assumed, total = record["assumptions"], record["total"]
    size, unit = next((unit for unit in UNITS if total["flops"] >= unit[0]), UNITS[-1])
    rows = [("stage", "amount", unit, "GPU-hours", "peak GB", "disk GB")]
    for stage in record["stages"]:
        rows.append((stage["name"], f"{stage['count']:,} {stage['unit']}", *_figures(stage, size)))
    rows.append(("total", "", *_figures(total, size)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines[1:1] = ["-" * len(lines[0])]
    lines.insert(-1, lines[1])
    peaks = ", ".join(f"{peak / 1e12:g} TFLOP/s ({dtype})" for dtype, peak in assumed["peak_flops_per_s"].items())
    lines += [
        "",
        f"{assumed['gpus']} x {assumed['card']} at {assumed['mfu']:.0%} of {peaks}: "
        f"{_number(total['wall_hours'])} hours.",
        f"Memory: {assumed['memory']}.",
    ]
    if total["peak_memory_bytes"] > assumed["card_memory_bytes"]:
        lines.append(
            f"It does not fit: {assumed['card']} has {assumed['card_memory_bytes'] / 1e9:g} GB; lower "
            "train.micro_batch or the batch sizes of opponent and evaluation."
        )
    return "\n".join([*lines, *(f"Note: {note}" for note in record["notes"])])


def _figures(row: dict[str, Any], size: float) -> tuple[str, ...]:
    return (
        _number(row["flops"] / size),
        _number(row["gpu_hours"]),
        _number(row["peak_memory_bytes"] / 1e9),
        _number(row["disk_bytes"] / 1e9),
    )


def _number(value: float) -> str:
    """Three digits, and no exponent where a person can do without."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 1e-3 else f"{value:.1e}"
