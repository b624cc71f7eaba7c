"""What a run will cost before anything is spent: operations, GPU-hours, peak memory and disk, stage by stage."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench import models, registry, walk
from bench.costs import memory
from bench.costs.operations import Operations
from bench.costs.scorers import scoring_cost
from bench.data import load_pairs, load_prompts
from bench.experiment import planned_iterations
from bench.methods.base import Pairing
from bench.models.architecture import Architecture, architecture
from bench.storage.runs import CACHE, Result
from bench.suites import Suite

FP32 = 4  # bytes
PNG = 0.6  # bytes of a PNG over those of its pixels, for photographs; drawings take less
ROW = 40  # bytes of one score in parquet
TRAIN_SPLIT = 851_293, 58_960  # pairs without ties and prompts of Pick-a-Pic v2 (Diffusion-DPO, arXiv 2311.12908)
PROMPTS = {"partiprompts": 1632, "hpsv2": 3200, "test_unique": 500, "validation_unique": 500}  # as published


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
    trained = [name for name in methods if name not in suite.models]
    stages = [maker.encode(trained)] if trained else []
    for name in methods:
        # as bench run does: with several methods, the number of iterations asked for is that of self-play
        for stage in walk.walk(suite, name, planned_iterations(name, suite, iters, len(methods) > 1)):
            kinds = {
                walk.Opponent: maker.opponent,
                walk.Training: maker.train,
                walk.Given: maker.given,
                walk.Evaluation: maker.remember,
            }
            stages += walk.dispatch(stage, kinds)
    stages += [maker.sampling(), maker.scoring()]
    return Plan(suite.name, tuple(methods), tuple(stages), tuple(dict.fromkeys(maker.notes)))


class Planner:
    """Counts of one suite; each is made once, and only when a stage asks for it."""

    def __init__(self, suite: Suite, seed: int):
        self.suite, self.seed, self.dtype = suite, seed, suite.model.dtype
        self.models: Architecture = architecture(suite.model.weights)
        self.operations = Operations(self.models, self.models.tokens)
        self.shape, self.tokens = self.operations.shape, self.operations.tokens
        self.results: set[Result] = set()  # what is sampled and scored; all methods share one base
        self.notes: list[str] = []
        self.peaks: dict[Hashable, int] = {}

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
        flops = images * self.operations.coding[0] + self.prompts * self.operations.text
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

    def opponent(self, span: walk.Opponent) -> list[StagePlan]:
        """Losers for every distinct pair the iteration sees, kept as latents."""
        settings, pairs = self.suite.opponents(span.method), span.count(self.seed, self.pairs)
        flops = self.operations.latents(
            pairs,
            scheduler=settings.scheduler,
            steps=settings.steps,
            guidance=settings.guidance,
            roundtrip=settings.roundtrip,
        )
        rows = min(settings.batch_size, pairs) * (1 if settings.guidance == 1 else 2)
        made = StagePlan(
            f"{span.method} {span.iteration}: opponent",
            pairs,
            "images",
            flops,
            self.resident + self.unet_weights + self.unet_pass(rows),
            pairs * int(np.prod(self.shape)) * FP32,
            self.dtype,
        )
        return [made]

    def train(self, span: walk.Training) -> list[StagePlan]:
        """Policy forward and backward, reference forward; the result and each checkpoint is the UNet in fp32.

        A method with a statistic of the batch runs both forward once more.

        A policy whose adapter is on the reference's weights is the reference too, with the adapter off.
        """
        method, settings = self.suite.method(span.method), self.suite.training(span.method)
        reference, images = method.needs_reference, 1 if method.pairing is Pairing.WINNER else 2
        own = settings.lora_rank and (span.iteration == 1 or method.pairing is Pairing.SELF_PLAY)
        policy = self.operations.forward_and_backward(settings.gradient_checkpointing, settings.lora_rank)
        expected = self.operations.forward if reference else 0
        again = self.operations.forward + expected if method.has_statistic() else 0
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
        made = StagePlan(
            f"{span.method} {span.iteration}: training",
            span.samples,
            "images" if images == 1 else "pairs",
            span.samples * images * (policy + expected + again),
            self.resident + peak,
            (1 + len(span.settings.checkpoints)) * memory.parameter_bytes(self.models.unet),
            settings.precision,
        )
        return [made]

    def given(self, given: walk.Given) -> list[StagePlan]:
        """A model's UNet, read and kept in fp32; what must be fetched first is as large, or half of that."""
        kept = memory.parameter_bytes(self.models.unet)
        return [StagePlan(f"{given.result.method}: read", 1, "models", 0, 0, kept, "fp32")]

    def remember(self, evaluation: walk.Evaluation) -> list[StagePlan]:
        """Evaluations are added up: `sampling` and `scoring` are of all results together."""
        self.results.add(evaluation.result)
        return []

    def training_peak(self, rows: int, **options: Any) -> int:
        """Counted once for all iterations that share it."""
        key = (rows, *options.items())
        if key not in self.peaks:
            self.peaks[key] = memory.training_bytes(self.models.unet, self.shape, self.tokens, rows, **options)
        return self.peaks[key]

    def sampling(self) -> StagePlan:
        """Images of every result, for all prompt sets, guidance scales and seeds."""
        settings, models = self.suite.evaluation, len(self.results)
        flops = sum(
            self.operations.images(self.images, scheduler=settings.scheduler, steps=settings.steps, guidance=guidance)
            for guidance in settings.guidance
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

    def scoring(self) -> StagePlan:
        """All scorers, which on a GPU run under bf16 autocast whatever the suite says of the models."""
        images = len(self.results) * len(self.suite.evaluation.guidance) * self.images
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
