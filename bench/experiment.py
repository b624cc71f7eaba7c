"""A run, stage by stage: per iteration an opponent, training, samples, scores; what is done stays done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pandas as pd

from bench import models, registry, walk
from bench.costs import cost
from bench.errors import BenchError
from bench.methods.base import Method, Pairing
from bench.models import rounding
from bench.models.frozen import Weights
from bench.protocol import write_cost, write_protocol, write_warnings
from bench.runtime import processes
from bench.runtime.failures import stopped
from bench.sampling.opponent import LATENTS, PAIRS, Drawn, opponent_batches, opponent_keys
from bench.sampling.sample import Sampler
from bench.scoring import evaluate
from bench.scoring.evaluation import Model, Scored
from bench.shared import Shared
from bench.storage import arrays, pieces, runs, tracking, verify
from bench.storage.meter import timed, write_spent
from bench.storage.runs import BASE, Result, Run
from bench.storage.shards import Rows
from bench.storage.stages import Stage, atomic_write, fingerprint, link_tree, write_table
from bench.suites import Iteration, Suite, options
from bench.training.checkpoint import Checkpoints
from bench.training.ends import load_models, save_result
from bench.training.train import TrainData, TrainSettings, train


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
    if method in suite.models:
        return 1
    listed = len(suite.schedule(method))
    if only_self_play and suite.method(method).pairing is not Pairing.SELF_PLAY:
        return listed
    return asked or listed


class Experiment:
    """The stages of one run; `shared` holds what does not depend on the method or the seed.

    `weights` are the UNets there are so far, by result; `ends[k]` is that of iteration k, `ends[0]` the base.
    """

    def __init__(self, run: Run, shared: Shared):
        self.run, self.shared, self.suite = run, shared, run.suite
        self.processes, self.frozen = shared.processes, shared.frozen
        schedule = [] if run.method in run.suite.models else run.suite.schedule(run.method, run.iterations)
        self.methods = [build_method(run.suite.kind(run.method), settings) for settings in schedule]
        self.ends: list[Weights] = [self.frozen.base]
        self.weights: dict[Result, Weights] = {BASE: self.frozen.base}
        self.opponents: dict[int, Stage] = {}
        self.scores: list[pd.DataFrame] = []
        self.history: list[pd.DataFrame] = []
        self.done: list[Path] = []
        self.inside: list[Path] = []  # checkpoints of iterations; what they cost is part of what those did
        self.warnings = guidance_warnings(run)

    def stages(self, log_scalar: tracking.LogScalar) -> None:
        if self.processes.main:
            write_protocol(self.run, self.shared, self.warnings)
        for stage in walk.walk(self.suite, self.run.method, self.run.iterations):
            self.do(stage, log_scalar)

    def do(self, stage: walk.Stage, log_scalar: tracking.LogScalar) -> None:
        """Do one stage; those before it are done."""
        walk.dispatch(
            stage,
            {
                walk.Opponent: self.opponent,
                walk.Training: lambda training: self.iterate(training, log_scalar),
                walk.Given: self.take,
                walk.Evaluation: lambda evaluation: self.evaluate(evaluation.result),
            },
        )

    def reference(self, iteration: int) -> Weights | None:
        """The frozen UNet in the loss of an iteration; in self-play it makes the losers too."""
        return self.methods[iteration - 1].next_reference(self.frozen.base, self.ends[iteration - 1])

    def opponent(self, span: walk.Opponent) -> Stage:
        """Let the reference make a loser for every pair this iteration will see; kept as latents."""
        settings, reference = self.suite.opponents(self.run.method), self.reference(span.iteration)
        pairs = span.pairs(self.run.seed, len(self.shared.encoded.pairs))
        stage = Stage(
            self.run.folder / "stages" / f"opponent{span.iteration}",
            {
                "weights": reference.key,
                "dtype": self.suite.model.dtype,
                "data": self.shared.encoded.key,
                "pairs": fingerprint(pairs.tolist()),
                "seed": self.run.seed,
                "iteration": span.iteration,
                **settings.identity(),
            },
        )
        rows = opponent_keys([self.shared.encoded.pairs.prompts[pair] for pair in pairs], self.run.seed, span.iteration)
        batches = opponent_batches(rows, settings.batch_size)
        how = {"scheduler": settings.scheduler, "steps": settings.steps, "guidance": settings.guidance}
        title = f"{self.run.method} {span.iteration}: opponent"

        def prepare() -> pieces.Make:
            output = "roundtrip" if settings.roundtrip else "latents"
            unet = self.frozen.unet(reference)
            sampler = Sampler(self.frozen.pipe, **how, unet=unet, output=output, name=title, compile=settings.compile)

            def draw(number: int, folder: Path) -> list[arrays.Written]:
                latents = sampler([rows[row] for row in batches[number]])
                return [arrays.place(folder / LATENTS, batches[number], latents)]

            return draw

        def begin(folder: Path) -> None:
            pieces.begin_array(folder, LATENTS, (len(pairs), *self.frozen.latent_shape))
            pieces.write_array(folder / PAIRS, pairs)

        flops = self.frozen.operations.latents(len(pairs), **how, roundtrip=settings.roundtrip)
        name = f"iter{span.iteration}/opponent"
        counts = {"images": len(pairs), "flops": flops}
        pieces.divided(stage, self.processes, name, batches, prepare, description=title, begin=begin, **counts)
        self.done.append(stage.directory)
        self.opponents[span.iteration] = stage
        return stage

    def iterate(self, span: walk.Training, log_scalar: tracking.LogScalar) -> None:
        """Train one iteration from the weights of the last; its end is iter<k>/unet, a checkpoint iter<k>@<step>/unet.

        A checkpoint decides nothing of the end, so it is not in the end's hash.
        """
        stage = self.training(span)
        settings = self.suite.training(self.run.method)
        checkpoints = Checkpoints(
            self.run.folder / "stages" / f"training{span.iteration}",
            stage.hash,
            settings.checkpoint_every,
            settings.checkpoint_minutes,
        )
        results = [result for result in self.run.results if result.iteration == span.iteration]
        inside = {result.within: self.checkpoint(result, stage.hash) for result in results if not result.end}
        missing = self.processes.once(lambda: [step for step, part in inside.items() if not part.ready()])
        if self.processes.once(lambda: bool(missing) or not stage.ready()):
            if self.processes.main and missing and missing[0] <= checkpoints.reached():
                checkpoints.remove()  # the training has passed a result that somebody has removed since
            self.processes.wait()
            self.processes.once(checkpoints.check)
            self.train(span, stage, checkpoints, {step: inside[step] for step in missing})
        if self.processes.main:
            checkpoints.remove()
        self.inside += [part.directory for part in inside.values()]
        for result in results:
            made = stage if result.end else inside[result.within]
            self.weights[result] = Weights(made.directory / "unet", made.hash)
            self.warn_of_rounding(result, self.ends[span.iteration - 1])
        self.ends.append(Weights(stage.directory / "unet", stage.hash))
        self.record(stage, log_scalar)

    def training(self, span: walk.Training) -> Stage:
        """The stage of an iteration's training."""
        reference, opponent = self.reference(span.iteration), self.opponents.get(span.iteration)
        return Stage(
            self.run.folder / f"iter{span.iteration}",
            {
                "method": self.run.method,
                **self.chosen(span),
                "seed": self.run.seed,
                "settings": self.train_settings(span).identity(),
                "policy": self.ends[span.iteration - 1].key,
                "reference": reference.key if reference else None,
                "losers": opponent.hash if opponent else self.methods[span.iteration - 1].pairing.value,
                "data": self.shared.encoded.key,
            },
        )

    def checkpoint(self, result: Result, training: str) -> Stage:
        """A result inside a training, given by its hash: iter<k>@<step>/unet, beside the iteration's own."""
        return Stage(self.run.folder / result.name, {"training": training, "step": result.within})

    def chosen(self, span: walk.Training) -> dict[str, Any]:
        """The method's options as the stage's hash has them: beta apart, as it was when there were no others."""
        own = options.identity(type(self.methods[span.iteration - 1]), span.settings.options)
        beta = {"beta": own.pop("beta", None)}
        return {**beta, "options": own} if own else beta

    def train_settings(self, span: walk.Training) -> TrainSettings:
        """The suite's settings for one iteration, which goes on in the data where the last one stopped."""
        settings = self.suite.training(self.run.method)
        return TrainSettings(
            steps=span.settings.steps,
            lr=span.settings.lr,
            first_step=span.first // settings.batch_size,
            **settings.model_dump(),
        )

    def train(self, span: walk.Training, stage: Stage, checkpoints: Checkpoints, inside: Mapping[int, Stage]) -> None:
        """Train and leave the end in `stage`, and in `inside` the policy after so many steps."""
        method, settings = self.methods[span.iteration - 1], self.train_settings(span)
        reference = self.reference(span.iteration)
        losers = self.losers(method, self.opponents.get(span.iteration))
        data = TrainData(self.shared.encoded.latents("winners"), losers, self.shared.encoded.embeddings())

        def amount(steps: int) -> dict[str, int]:
            pairs = steps * settings.batch_size
            return {
                "pairs": pairs,
                "flops": cost.training_flops(
                    self.frozen.operations.forward,
                    pairs,
                    paired=losers is not None,
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

        whole, name = amount(settings.steps), f"iter{span.iteration}/train"
        with timed(stage, self.processes, name, checkpoints.seconds(), **whole) as folder:
            policy, frozen = load_models(settings, self.ends[span.iteration - 1], reference, self.run.seed)
            history = train(
                policy,
                frozen,
                method,
                data,
                settings,
                self.frozen.pipe.scheduler,
                self.run.seed,
                self.shared.accelerator,
                f"{self.run.method} {span.iteration}: training",
                checkpoints,
                flops_per_sample=whole["flops"] / whole["pairs"],
                results=inside,
                keep=keep,
            )
            if folder is not None:
                save_result(policy, folder)
                rows = pd.DataFrame(history)
                rows.insert(0, "method", self.run.method)
                rows.insert(1, "iteration", span.iteration)
                rows.to_parquet(folder / "history.parquet", index=False)

    def losers(self, method: Method, opponent: Stage | None) -> Rows | Drawn | None:
        """Losers `[N, C, h, w]` as the pairing asks; in self-play only of the pairs that will be seen."""
        if method.pairing is Pairing.WINNER:
            return None
        if opponent is None:
            return self.shared.encoded.latents("losers")
        return Drawn(opponent.directory, len(self.shared.encoded.pairs))

    def record(self, stage: Stage, log_scalar: tracking.LogScalar) -> None:
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

    def take(self, given: walk.Given) -> None:
        """Put the UNet of a given model where that of an iteration would be, with the record of where it is from."""
        source = self.shared.sources[self.run.method]
        record = source.record()
        made_from = {name: record[name] for name in ("kind", "files", "weight")}
        stage = Stage(self.run.folder / given.result.name, {"model": made_from, "base": self.frozen.base.key})
        if self.processes.once(lambda: not stage.ready()):
            with timed(stage, self.processes, f"{given.result.name}/load") as folder:
                if folder is not None:
                    models.save_unet(source.load(self.frozen.base.folder.parent), folder / "unet")
                    atomic_write(folder / "source.json", json.dumps(record, indent=1))
        self.weights[given.result] = Weights(stage.directory / "unet", stage.hash)
        self.done.append(stage.directory)

    def evaluate(self, result: Result) -> None:
        """Add a result's scores on every prompt set and guidance to scores.parquet, its images to the run."""
        for name, prompts in self.shared.evaluator.prompt_sets.items():
            if self.processes.main:
                texts = dict(zip(prompts.ids, prompts.prompts, strict=True))
                place = self.run.folder / "images" / name / "prompts.json"
                atomic_write(place, json.dumps(texts, ensure_ascii=False, indent=1))
            for guidance in self.suite.evaluation.guidance:
                scored = self.score(result, name, guidance)
                self.scores.append(scored.rows.assign(run=self.run.id))
                if scored.blank:
                    seed = "" if result == BASE else f", seed {self.run.seed}"
                    total = len(prompts) * len(self.suite.evaluation.seeds)
                    label = f"{result.title}{seed}, {name}, guidance {guidance:g}"
                    self.warn(evaluate.blank_warning(label, scored.blank, total))
        if self.processes.main:
            write_table(self.run.folder / "scores.parquet", pd.concat(self.scores, ignore_index=True))
            write_cost(self.run, self.done, self.shared, self.inside)

    def score(self, result: Result, name: str, guidance: float) -> Scored:
        """The base's images and scores from the cache, which all runs share; those of a result in stages of the run."""
        evaluator, model = self.shared.evaluator, Model(result, self.weights[result])
        images = evaluate.image_folder(self.run.folder, name, guidance, result)
        if result == BASE:
            scored = evaluator.score(model, name, guidance)
            ids = evaluator.prompt_sets[name].ids
            files = evaluate.image_paths(scored.images, ids, self.suite.evaluation.seeds)
            if self.processes.main:
                link_tree(scored.images, images, [path.name for path in files])
            return scored
        stage = self.run.folder / "stages" / f"scores{result.name.removeprefix('iter')}-{name}-g{guidance:g}"
        self.done += [images, stage]
        return evaluator.score(model, name, guidance, images, stage)

    def warn_of_rounding(self, result: Result, start: Weights) -> None:
        """Where the precision of sampling does not show what the training that began at `start` did."""
        if self.processes.main:
            end = self.weights[result]
            text = rounding.warning(result.title, start.folder, end.folder, self.suite.model.dtype)
            if text:
                self.warn(text)

    def warn(self, text: str) -> None:
        """Say it in the terminal and in the protocol, from which tables and the page take it."""
        self.warnings.append(text)
        if self.processes.main:
            click.echo(f"warning: {text}", err=True)
            write_warnings(self.run, self.warnings)


def guidance_warnings(run: Run) -> list[str]:
    """What a reader who knows guidance from diffusers must be told of scales below 1."""
    used = {"evaluation.guidance": run.suite.evaluation.guidance}
    if run.method not in run.suite.models and run.suite.method(run.method).pairing is Pairing.SELF_PLAY:
        used["opponent.guidance"] = [run.suite.opponents(run.method).guidance]
    return [
        f"{key} {scale:g} is below 1: the prediction leans towards the empty prompt, where diffusers' pipelines "
        "switch guidance off"
        for key, scales in used.items()
        for scale in scales
        if scale < 1
    ]
