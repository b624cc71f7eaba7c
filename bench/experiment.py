"""A run, stage by stage: per iteration an opponent, training, samples, scores; what is done stays done."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import UNet2DConditionModel

from bench import adapters, cost, evaluate, models, registry, runs, tracking
from bench.batches import sample_order
from bench.checkpoint import Checkpoints
from bench.errors import BenchError, UsageError
from bench.protocol import write_cost, write_protocol
from bench.runs import Run
from bench.sample import latent_shape, sample
from bench.seeding import derive
from bench.shared import Model, Shared, Weights, link_tree, timed
from bench.stages import Stage, atomic_write, fingerprint
from bench.suites import Iteration, Suite
from bench.train import TrainData, TrainSettings, train
from methods.base import Method, Pairing


class Interrupted(BenchError):
    """The person stopped a run; the message says how to go on."""

    exit_code = 130


def execute(run: Run, shared: Shared, mongo: str | None = None, sql: str | None = None) -> None:
    """Run all stages of a run that are not done yet, recorded by sacred."""
    runs.sweep(run.folder)
    runs.sweep(runs.CACHE)
    try:
        tracking.record(run.folder, run.config(), Experiment(run, shared).stages, mongo, sql)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; to go on: bench run --resume {run.id}") from None


def build_method(name: str, settings: Iteration) -> Method:
    """A method with the hyperparameters of one iteration."""
    options = {} if settings.beta is None else {"beta": settings.beta}
    try:
        return registry.method(name)(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"methods.{name}: {error}") from error


def planned_iterations(method: str, suite: Suite, asked: int | None, only_self_play: bool = False) -> int:
    """How many iterations to run: as asked, else as the suite lists.

    With `only_self_play` a method that does not play against itself keeps what the suite lists.
    """
    listed = len(suite.schedule(method))
    if only_self_play and registry.method(method).pairing is not Pairing.SELF_PLAY:
        return listed
    return asked or listed


class Experiment:
    """The stages of one run; `shared` holds what does not depend on the method or the seed."""

    def __init__(self, run: Run, shared: Shared):
        self.run, self.shared, self.suite = run, shared, run.suite
        self.schedule = run.suite.schedule(run.method, run.iterations)
        self.methods = [build_method(run.method, settings) for settings in self.schedule]
        self.scores: list[pd.DataFrame] = []
        self.history: list[pd.DataFrame] = []
        self.done: list[Path] = []

    def stages(self, log_scalar: tracking.LogScalar) -> None:
        write_protocol(self.run, self.shared)
        self.evaluate(Model("base", 0, self.shared.base))
        previous = self.shared.base
        for iteration in range(1, self.run.iterations + 1):
            previous = self.iterate(iteration, previous, log_scalar)
            self.evaluate(Model(self.run.method, iteration, previous))

    def iterate(self, iteration: int, previous: Weights, log_scalar: tracking.LogScalar) -> Weights:
        """Train one iteration from the weights of the last; the result is iter<k>/unet."""
        method = self.methods[iteration - 1]
        reference = method.next_reference(self.shared.base, previous)
        opponent = self.opponent(iteration, reference) if method.pairing is Pairing.SELF_PLAY else None
        stage = Stage(self.run.folder / f"iter{iteration}", {
            "method": self.run.method, "beta": self.schedule[iteration - 1].beta, "seed": self.run.seed,
            "settings": self.train_settings(iteration).identity(),
            "policy": previous.key, "reference": reference.key if reference else None,
            "losers": opponent.hash if opponent else method.pairing.value, "data": self.shared.data_key})
        checkpoints = Checkpoints(self.run.folder / "stages" / f"training{iteration}", stage.hash,
                                  self.suite.train.checkpoint_every)
        if not stage.done:
            self.train(iteration, stage, previous, reference, opponent, checkpoints)
        checkpoints.remove()
        self.record(stage, iteration, log_scalar)
        return Weights(stage.directory / "unet", stage.hash)

    def train_settings(self, iteration: int) -> TrainSettings:
        """The suite's settings for one iteration, which goes on in the data where the last one stopped."""
        planned = self.schedule[iteration - 1]
        earlier = sum(settings.steps for settings in self.schedule[:iteration - 1])
        return TrainSettings(steps=planned.steps, lr=planned.lr, first_step=earlier,
                             **self.suite.training(self.run.method).model_dump())

    def opponent(self, iteration: int, reference: Weights) -> Stage:
        """Let the reference make a loser for every pair this iteration will see; kept as latents."""
        settings = self.suite.opponent
        pairs = self.pairs_seen(iteration)
        stage = Stage(self.run.folder / "stages" / f"opponent{iteration}", {
            "weights": reference.key, "dtype": self.suite.model.dtype, "data": self.shared.data_key,
            "pairs": fingerprint(pairs.tolist()), "seed": self.run.seed, "iteration": iteration,
            **settings.model_dump(exclude={"batch_size"})})
        if not stage.done:
            flops = cost.sampling_flops(self.shared.forward_flops(), 0, len(pairs), steps=settings.steps,
                                        guidance=settings.guidance)
            with timed(stage, f"iter{iteration}/opponent", images=len(pairs), flops=flops) as folder:
                np.save(folder / "latents.npy", self.losers(iteration, reference, pairs))
                np.save(folder / "pairs.npy", pairs)
        self.done.append(stage.directory)
        return stage

    def pairs_seen(self, iteration: int) -> np.ndarray:
        """The pairs one iteration trains on, ascending."""
        settings = self.train_settings(iteration)
        size = settings.batch_size
        return np.unique(sample_order(self.run.seed, settings.first_step * size, settings.steps * size,
                                      len(self.shared.pairs)))

    def losers(self, iteration: int, reference: Weights, pairs: np.ndarray) -> np.ndarray:
        """Latents `[len(pairs), C, h, w]` sampled from the reference.

        A sample is a function of (prompt, seed), so pairs that share a prompt are given different seeds.
        """
        settings, unet = self.suite.opponent, self.shared.unet(reference)
        prompts = pd.Series([self.shared.pairs.prompts[pair] for pair in pairs])
        repeats = prompts.groupby(prompts).cumcount()
        latents = np.empty((len(pairs), *latent_shape(unet)), dtype=np.float32)
        for repeat, group in prompts.groupby(repeats):
            seed = derive("opponent", self.run.seed, iteration, int(repeat))
            latents[group.index] = sample(
                self.shared.pipe, group.tolist(), guidance=settings.guidance, steps=settings.steps,
                seeds=[seed], scheduler=settings.scheduler, batch_size=settings.batch_size, output="latents",
                unet=unet, description=f"{self.run.method} {iteration}: opponent")
        return latents

    def train(self, iteration: int, stage: Stage, previous: Weights, reference: Weights | None,
              opponent: Stage | None, checkpoints: Checkpoints) -> None:
        method, settings = self.methods[iteration - 1], self.train_settings(iteration)
        data = TrainData(self.shared.latents("winners"), self.loser_latents(method, opponent),
                         self.shared.embeddings())
        pairs = settings.steps * settings.batch_size
        flops = cost.training_flops(self.shared.forward_flops(), pairs, paired=data.losers is not None,
                                    reference=reference is not None)
        with timed(stage, f"iter{iteration}/train", checkpoints.seconds(), pairs=pairs, flops=flops) as folder:
            policy, frozen = self.models(settings, previous, reference)
            history = train(policy, frozen, method, data, settings, self.shared.pipe.scheduler, self.run.seed,
                            self.shared.accelerator, f"{self.run.method} {iteration}: training", checkpoints,
                            flops_per_sample=flops / pairs)
            if settings.lora_rank:
                adapters.save(policy, folder / "lora")
                adapters.merge(policy)
            models.save_unet(policy, folder / "unet")
            rows = pd.DataFrame(history)
            rows.insert(0, "method", self.run.method)
            rows.insert(1, "iteration", iteration)
            rows.to_parquet(folder / "history.parquet", index=False)

    def models(self, settings: TrainSettings, previous: Weights, reference: Weights | None,
               ) -> tuple[UNet2DConditionModel, UNet2DConditionModel | None]:
        """Policy and reference. A policy that trains an adapter on the reference's weights is the reference itself,
        with the adapter off; every iteration starts a new adapter, on weights the last one was merged into."""
        policy = models.load_unet(previous.folder)
        if settings.lora_rank:
            adapters.attach(policy, settings.lora_rank, self.run.seed, settings.first_step)
        if reference is None:
            return policy, None
        shared = settings.lora_rank is not None and reference.key == previous.key
        return policy, policy if shared else models.load_unet(reference.folder)

    def loser_latents(self, method: Method, opponent: Stage | None) -> np.ndarray | None:
        """Losers `[N, C, h, w]` as the pairing asks; in self-play only of the pairs that will be seen."""
        if method.pairing is Pairing.WINNER:
            return None
        if opponent is None:
            return self.shared.latents("losers")
        latents = np.load(opponent.directory / "latents.npy")
        losers = np.full((len(self.shared.pairs), *latents.shape[1:]), np.nan, dtype=np.float32)
        losers[np.load(opponent.directory / "pairs.npy")] = latents
        return losers

    def record(self, stage: Stage, iteration: int, log_scalar: tracking.LogScalar) -> None:
        """Add a trained iteration to history.parquet, cost.json and sacred's metrics."""
        rows = pd.read_parquet(stage.directory / "history.parquet")
        for row in rows.drop(columns=["method", "iteration"]).to_dict("records"):
            for name in row.keys() - {"step"}:
                if not math.isnan(row[name]):
                    log_scalar(name, float(row[name]), int(row["step"]))
        self.history.append(rows)
        write_table(self.run.folder / "history.parquet", self.history)
        self.done.append(stage.directory)
        write_cost(self.run, self.done, self.shared)

    def evaluate(self, model: Model) -> None:
        """Add a model's scores on every prompt set and guidance to scores.parquet, its images to the run."""
        for name, prompts in self.shared.prompt_sets.items():
            texts = dict(zip(prompts.ids, prompts.prompts, strict=True))
            folder = self.run.folder / "images" / name
            atomic_write(folder / "prompts.json", json.dumps(texts, ensure_ascii=False, indent=1))
            for guidance in self.suite.evaluation.guidance:
                images = evaluate.image_folder(self.run.folder, name, guidance, model.iteration)
                if model.iteration == 0:
                    rows, source = self.shared.score(model, name, guidance)
                    files = evaluate.image_paths(source, prompts.ids, self.suite.evaluation.seeds)
                    link_tree(source, images, [path.name for path in files])
                else:
                    stage = self.run.folder / "stages" / f"scores{model.iteration}-{name}-g{guidance:g}"
                    rows, _ = self.shared.score(model, name, guidance, images, stage)
                    self.done += [images, stage]
                self.scores.append(rows.assign(run=self.run.id))
        write_table(self.run.folder / "scores.parquet", self.scores)
        write_cost(self.run, self.done, self.shared)


def write_table(path: Path, parts: Sequence[pd.DataFrame]) -> None:
    """Write tables one below the other as one parquet file that appears whole."""
    buffer = io.BytesIO()
    pd.concat(parts, ignore_index=True).to_parquet(buffer, index=False)
    atomic_write(path, buffer.getvalue())
