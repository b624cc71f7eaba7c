"""A run, stage by stage: per iteration an opponent, training, samples, scores; what is done stays done."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from diffusers import UNet2DConditionModel

from bench import models, registry
from bench.costs import cost
from bench.costs.meter import write_spent
from bench.errors import BenchError
from bench.methods.base import Method, Pairing
from bench.models import adapters
from bench.runtime import processes
from bench.runtime.failures import stopped
from bench.runtime.seeding import derive
from bench.sampling.sample import Key, Sampler, latent_shape
from bench.scoring import evaluate
from bench.shared import Model, Shared, Weights, link_tree, timed, write_table
from bench.storage import pieces, runs, tracking, verify
from bench.storage.integrity import read_array
from bench.storage.protocol import write_cost, write_protocol, write_warnings
from bench.storage.runs import BASE, Result, Run
from bench.storage.shards import Rows
from bench.storage.stages import Stage, atomic_write, fingerprint
from bench.suites import Iteration, Suite, options
from bench.training.batches import sample_order
from bench.training.checkpoint import Checkpoints
from bench.training.train import TrainData, TrainSettings, train

SMALLEST_BATCH = 16  # below it a GPU is mostly idle


class Interrupted(BenchError):
    """The person stopped a run; the message says how to go on."""

    exit_code = 130


def execute(run: Run, shared: Shared, mongo: str | None = None, sql: str | None = None, wait: bool = False) -> None:
    """Run all stages of a run that are not done yet, recorded by sacred.

    One launch at a time works on a run; while another does, `wait` for it or leave with BenchError.
    """
    stages = Experiment(run, shared).stages
    try:
        if shared.processes.main:
            with runs.held(run, wait), verify.sealed(run.folder):
                runs.sweep(run.folder)
                runs.sweep(runs.CACHE)
                runs.store(run)  # a finished run may have been given other scorers
                tracking.record(run.folder, run.config(), stages, mongo, sql)
        else:
            stages(lambda name, value, step: None)
    except KeyboardInterrupt as error:
        raise Interrupted(f"{stopped(error)}; to go on: bench run --resume {run.id}") from None
    except RuntimeError as error:
        if not processes.lost(error):
            raise
        raise BenchError(
            f"another process of this run has died or cannot be reached; to go on: bench run --resume {run.id}"
        ) from error


def build_method(name: str, settings: Iteration) -> Method:
    """A method with the hyperparameters of one iteration."""
    return options.build(registry.method(name), settings.options, ("methods", name))


def planned_iterations(method: str, suite: Suite, asked: int | None, only_self_play: bool = False) -> int:
    """How many iterations to run: as asked, else as the suite lists.

    With `only_self_play` a method that does not play against itself keeps what the suite lists.
    """
    listed = len(suite.schedule(method))
    if only_self_play and suite.method(method).pairing is not Pairing.SELF_PLAY:
        return listed
    return asked or listed


class Experiment:
    """The stages of one run; `shared` holds what does not depend on the method or the seed."""

    def __init__(self, run: Run, shared: Shared):
        self.run, self.shared, self.suite = run, shared, run.suite
        self.processes = shared.processes
        self.schedule = run.suite.schedule(run.method, run.iterations)
        self.methods = [build_method(run.suite.kind(run.method), settings) for settings in self.schedule]
        self.scores: list[pd.DataFrame] = []
        self.history: list[pd.DataFrame] = []
        self.done: list[Path] = []
        self.inside: list[Path] = []  # checkpoints of iterations; what they cost is part of what those did
        self.warnings = guidance_warnings(run)

    def stages(self, log_scalar: tracking.LogScalar) -> None:
        if self.processes.main:
            write_protocol(self.run, self.shared, self.warnings)
        self.evaluate(Model(BASE, self.shared.base))
        previous = self.shared.base
        for iteration in range(1, self.run.iterations + 1):
            previous = self.iterate(iteration, previous, log_scalar)
            for result in self.results(iteration):
                self.evaluate(Model(result, self.weights(result, previous)))

    def results(self, iteration: int) -> list[Result]:
        """The checkpoints of an iteration and its end."""
        return [result for result in self.run.results if result.iteration == iteration]

    def weights(self, result: Result, end: Weights) -> Weights:
        """The UNet of a result of the iteration that ended in `end`."""
        if result.end:
            return end
        stage = self.checkpoint(result, end.key)
        return Weights(stage.directory / "unet", stage.hash)

    def checkpoint(self, result: Result, training: str) -> Stage:
        """A result inside a training, given by its hash: iter<k>@<step>/unet, beside the iteration's own."""
        return Stage(self.run.folder / result.name, {"training": training, "step": result.within})

    def iterate(self, iteration: int, previous: Weights, log_scalar: tracking.LogScalar) -> Weights:
        """Train one iteration from the weights of the last; its end is iter<k>/unet, a checkpoint iter<k>@<step>/unet.

        A checkpoint decides nothing of the end, so it is not in the end's hash.
        """
        method = self.methods[iteration - 1]
        reference = method.next_reference(self.shared.base, previous)
        opponent = self.opponent(iteration, reference) if method.pairing is Pairing.SELF_PLAY else None
        stage = Stage(
            self.run.folder / f"iter{iteration}",
            {
                "method": self.run.method,
                **self.chosen(iteration),
                "seed": self.run.seed,
                "settings": self.train_settings(iteration).identity(),
                "policy": previous.key,
                "reference": reference.key if reference else None,
                "losers": opponent.hash if opponent else method.pairing.value,
                "data": self.shared.data_key,
            },
        )
        checkpoints = Checkpoints(
            self.run.folder / "stages" / f"training{iteration}",
            stage.hash,
            self.suite.training(self.run.method).checkpoint_every,
        )
        inside = {
            result.within: self.checkpoint(result, stage.hash) for result in self.results(iteration) if not result.end
        }
        missing = self.processes.once(lambda: [step for step, part in inside.items() if not part.ready()])
        if self.processes.once(lambda: bool(missing) or not stage.ready()):
            if self.processes.main and missing and missing[0] <= checkpoints.reached():
                checkpoints.remove()  # the training has passed a result that somebody has removed since
            self.processes.wait()
            self.processes.once(checkpoints.check)
            self.train(
                iteration, stage, previous, reference, opponent, checkpoints, {step: inside[step] for step in missing}
            )
        if self.processes.main:
            checkpoints.remove()
        self.inside += [part.directory for part in inside.values()]
        self.record(stage, iteration, log_scalar)
        return Weights(stage.directory / "unet", stage.hash)

    def chosen(self, iteration: int) -> dict[str, Any]:
        """The method's options as the stage's hash has them: beta apart, as it was when there were no others."""
        own = options.identity(type(self.methods[iteration - 1]), self.schedule[iteration - 1].options)
        beta = {"beta": own.pop("beta", None)}
        return {**beta, "options": own} if own else beta

    def train_settings(self, iteration: int) -> TrainSettings:
        """The suite's settings for one iteration, which goes on in the data where the last one stopped."""
        planned = self.schedule[iteration - 1]
        earlier = sum(settings.steps for settings in self.schedule[: iteration - 1])
        return TrainSettings(
            steps=planned.steps, lr=planned.lr, first_step=earlier, **self.suite.training(self.run.method).model_dump()
        )

    def opponent(self, iteration: int, reference: Weights) -> Stage:
        """Let the reference make a loser for every pair this iteration will see; kept as latents."""
        settings = self.suite.opponents(self.run.method)
        pairs = self.pairs_seen(iteration)
        stage = Stage(
            self.run.folder / "stages" / f"opponent{iteration}",
            {
                "weights": reference.key,
                "dtype": self.suite.model.dtype,
                "data": self.shared.data_key,
                "pairs": fingerprint(pairs.tolist()),
                "seed": self.run.seed,
                "iteration": iteration,
                **settings.model_dump(exclude={"batch_size"}),
            },
        )
        rows = self.opponent_keys(iteration, pairs)
        batches = opponent_batches(rows, settings.batch_size)

        def prepare() -> pieces.Make:
            sampler = Sampler(
                self.shared.pipe,
                guidance=settings.guidance,
                steps=settings.steps,
                scheduler=settings.scheduler,
                unet=self.shared.unet(reference),
                output="roundtrip" if settings.roundtrip else "latents",
                name=f"{self.run.method} {iteration}: opponent",
            )

            def draw(number: int, folder: Path) -> None:
                latents = sampler([rows[row] for row in batches[number]])
                pieces.write_array(pieces.path(folder, number, ".npy"), latents)

            return draw

        def join(folder: Path) -> None:
            shape = (len(pairs), *latent_shape(self.shared.pipe.unet))
            pieces.join_arrays(folder, "latents.npy", shape, batches)
            pieces.write_array(folder / "pairs.npy", pairs)

        recode = sum(self.shared.vae_flops) if settings.roundtrip else 0
        flops = cost.sampling_flops(
            self.shared.forward_flops(), recode, len(pairs), steps=settings.steps, guidance=settings.guidance
        )
        pieces.divided(
            stage,
            self.processes,
            f"iter{iteration}/opponent",
            batches,
            prepare,
            join,
            f"{self.run.method} {iteration}: opponent",
            images=len(pairs),
            flops=flops,
        )
        self.done.append(stage.directory)
        return stage

    def pairs_seen(self, iteration: int) -> np.ndarray:
        """The pairs one iteration trains on, ascending."""
        settings = self.train_settings(iteration)
        size = settings.batch_size
        return np.unique(
            sample_order(self.run.seed, settings.first_step * size, settings.steps * size, len(self.shared.pairs))
        )

    def opponent_keys(self, iteration: int, pairs: np.ndarray) -> list[Key]:
        """Seed and prompt of every pair's loser.

        A sample is a function of (prompt, seed), so pairs that share a prompt are given different seeds: the
        pairs that are the first of their prompt one seed, those that are the second another, and so on.
        """
        prompts = pd.Series([self.shared.pairs.prompts[pair] for pair in pairs])
        repeats = prompts.groupby(prompts).cumcount()
        seeds = {int(repeat): derive("opponent", self.run.seed, iteration, int(repeat)) for repeat in repeats.unique()}
        return [(seeds[repeat], prompt) for repeat, prompt in zip(repeats.tolist(), prompts.tolist(), strict=True)]

    def train(
        self,
        iteration: int,
        stage: Stage,
        previous: Weights,
        reference: Weights | None,
        opponent: Stage | None,
        checkpoints: Checkpoints,
        inside: Mapping[int, Stage],
    ) -> None:
        """Train and leave the end in `stage`, and in `inside` the policy after so many steps."""
        method, settings = self.methods[iteration - 1], self.train_settings(iteration)
        data = TrainData(self.shared.latents("winners"), self.loser_latents(method, opponent), self.shared.embeddings())

        def amount(steps: int) -> dict[str, int]:
            pairs = steps * settings.batch_size
            return {
                "pairs": pairs,
                "flops": cost.training_flops(
                    self.shared.forward_flops(),
                    pairs,
                    paired=data.losers is not None,
                    reference=reference is not None,
                    adapter=settings.lora_rank is not None,
                    statistic=method.has_statistic(),
                ),
            }

        def keep(step: int, seconds: float) -> None:
            with inside[step].fresh() as folder:
                save_result(policy, folder)
                spent = {"seconds": round(seconds, 3), "devices": self.processes.count}
                write_spent(folder, f"{inside[step].directory.name}/train", spent, 0.0, **amount(step))

        whole = amount(settings.steps)
        with timed(stage, self.processes, f"iter{iteration}/train", checkpoints.seconds(), **whole) as folder:
            policy, frozen = self.models(settings, previous, reference)
            history = train(
                policy,
                frozen,
                method,
                data,
                settings,
                self.shared.pipe.scheduler,
                self.run.seed,
                self.shared.accelerator,
                f"{self.run.method} {iteration}: training",
                checkpoints,
                flops_per_sample=whole["flops"] / whole["pairs"],
                results=inside,
                keep=keep,
            )
            if folder is not None:
                save_result(policy, folder)
                rows = pd.DataFrame(history)
                rows.insert(0, "method", self.run.method)
                rows.insert(1, "iteration", iteration)
                rows.to_parquet(folder / "history.parquet", index=False)

    def models(
        self, settings: TrainSettings, previous: Weights, reference: Weights | None
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

    def loser_latents(self, method: Method, opponent: Stage | None) -> Rows | Drawn | None:
        """Losers `[N, C, h, w]` as the pairing asks; in self-play only of the pairs that will be seen."""
        if method.pairing is Pairing.WINNER:
            return None
        if opponent is None:
            return self.shared.latents("losers")
        return Drawn(opponent.directory, len(self.shared.pairs))

    def record(self, stage: Stage, iteration: int, log_scalar: tracking.LogScalar) -> None:
        """Add a trained iteration to history.parquet, cost.json and sacred's metrics."""
        rows = pd.read_parquet(stage.directory / "history.parquet")
        for row in rows.drop(columns=["method", "iteration"]).to_dict("records"):
            for name in row.keys() - {"step"}:
                if not math.isnan(row[name]):
                    log_scalar(name, float(row[name]), int(row["step"]))
        self.history.append(rows)
        self.done.append(stage.directory)
        if self.processes.main:
            write_table(self.run.folder / "history.parquet", pd.concat(self.history, ignore_index=True))
            write_cost(self.run, self.done, self.shared, self.inside)

    def evaluate(self, model: Model) -> None:
        """Add a model's scores on every prompt set and guidance to scores.parquet, its images to the run."""
        for name, prompts in self.shared.prompt_sets.items():
            texts = dict(zip(prompts.ids, prompts.prompts, strict=True))
            folder = self.run.folder / "images" / name
            if self.processes.main:
                atomic_write(folder / "prompts.json", json.dumps(texts, ensure_ascii=False, indent=1))
            for guidance in self.suite.evaluation.guidance:
                images = evaluate.image_folder(self.run.folder, name, guidance, model.result)
                if model.result == BASE:
                    scored = self.shared.score(model, name, guidance)
                    files = evaluate.image_paths(scored.images, prompts.ids, self.suite.evaluation.seeds)
                    if self.processes.main:
                        link_tree(scored.images, images, [path.name for path in files])
                else:
                    number = model.result.name.removeprefix("iter")
                    stage = self.run.folder / "stages" / f"scores{number}-{name}-g{guidance:g}"
                    scored = self.shared.score(model, name, guidance, images, stage)
                    self.done += [images, stage]
                self.scores.append(scored.rows.assign(run=self.run.id))
                if scored.blank:
                    seed = "" if model.result == BASE else f", seed {self.run.seed}"
                    total = len(prompts) * len(self.suite.evaluation.seeds)
                    self.warn(
                        evaluate.blank_warning(
                            f"{model.result.title}{seed}, {name}, guidance {guidance:g}", scored.blank, total
                        )
                    )
        if self.processes.main:
            write_table(self.run.folder / "scores.parquet", pd.concat(self.scores, ignore_index=True))
            write_cost(self.run, self.done, self.shared, self.inside)

    def warn(self, text: str) -> None:
        """Say it in the terminal and in the protocol, from which tables and the page take it."""
        self.warnings.append(text)
        if self.processes.main:
            click.echo(f"warning: {text}", err=True)
            write_warnings(self.run, self.warnings)


def save_result(policy: UNet2DConditionModel, folder: Path) -> None:
    """`unet/` with any adapter merged, and the adapter alone; the policy itself is left as it is."""
    if adapters.attached(policy):
        adapters.save(policy, folder / "lora")
        policy = copy.deepcopy(policy)
        adapters.merge(policy)
    models.save_unet(policy, folder / "unet")


def guidance_warnings(run: Run) -> list[str]:
    """What a reader who knows guidance from diffusers must be told of scales below 1."""
    used = {"evaluation.guidance": run.suite.evaluation.guidance}
    if run.suite.method(run.method).pairing is Pairing.SELF_PLAY:
        used["opponent.guidance"] = [run.suite.opponents(run.method).guidance]
    return [
        f"{key} {scale:g} is below 1: the prediction leans towards the empty prompt, where diffusers' pipelines "
        "switch guidance off"
        for key, scales in used.items()
        for scale in scales
        if scale < 1
    ]


class Drawn:
    """An opponent's latents `[N, C, h, w]` by the number of the pair, read from disk when asked for.

    Only the pairs that an iteration trains on have any.
    """

    def __init__(self, folder: Path, size: int):
        self.latents = read_array(folder / "latents.npy", mmap_mode="r")
        pairs = read_array(folder / "pairs.npy")
        self.shape = (size, *self.latents.shape[1:])
        self.row = np.full(size, len(pairs))  # for a pair without latents a row that is not there
        self.row[pairs] = np.arange(len(pairs))

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        return self.latents[self.row[chosen]]


def opponent_batches(rows: Sequence[Key], size: int) -> list[list[int]]:
    """Rows in whole batches, each of one seed.

    At the end of every seed is a smaller batch. Those of fewer than 16 are put together where that fills a batch
    at least: of many rows per prompt, as in Pick-a-Pic, most seeds have a few rows only.
    """
    by_seed: dict[int, list[int]] = {}
    for row, (seed, _) in enumerate(rows):
        by_seed.setdefault(seed, []).append(row)
    cut = [[group[row] for row in batch] for group in by_seed.values() for batch in pieces.batches(len(group), size)]
    enough = min(SMALLEST_BATCH, size)
    small = [row for batch in cut if len(batch) < enough for row in batch]
    if len(small) < size:
        return cut
    large = [batch for batch in cut if len(batch) >= enough]
    return large + [[small[row] for row in batch] for batch in pieces.batches(len(small), size)]
