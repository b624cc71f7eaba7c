"""A result's images on the suite's prompts, and their scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from bench.costs import cost
from bench.data import PromptSet, load_prompts
from bench.models.frozen import Frozen, Weights
from bench.runtime.processes import Processes
from bench.runtime.progress import quiet
from bench.sampling.sample import Sampler, keys
from bench.scoring import evaluate
from bench.storage import pieces, runs
from bench.storage.runs import Result
from bench.storage.stages import Stage, atomic_write, fingerprint, write_table
from bench.suites import Suite

BLANK = "blank.json"  # of scores: the prompts whose images show nothing


class Model(NamedTuple):
    """A row of the comparison, and its UNet."""

    result: Result
    weights: Weights


class Scored(NamedTuple):
    """The scores of a model on one prompt set (rows of evaluate.COLUMNS), the folder of its images, and the prompts of
    those that show nothing (evaluate.blank)."""

    rows: pd.DataFrame
    images: Path
    blank: list[str]


class Evaluator:
    """The prompt sets and scorers of a suite, loaded; samples and scores models, each once.

    `common` is given the folders of what is kept in the cache, by name: they hold what that cost.
    """

    def __init__(self, suite: Suite, frozen: Frozen, processes: Processes, common: dict[str, Path]):
        self.settings, self.dtype = suite.evaluation, suite.model.dtype
        self.frozen, self.processes, self.common = frozen, processes, common
        self.prompt_sets: Mapping[str, PromptSet] = {
            name: load_prompts(prompts.prompts, prompts.limit) for name, prompts in self.settings.prompt_sets.items()
        }
        self.scorers = evaluate.Scorers.load(suite.metrics, suite.metric_options, str(frozen.device))

    @cached_property
    def truncated(self) -> dict[str, int]:
        """Prompts that the text encoder does not read to their end, by prompt set."""
        return {name: self.frozen.truncated(prompts.prompts) for name, prompts in self.prompt_sets.items()}

    def score(
        self, model: Model, prompt_set: str, guidance: float, images: Path | None = None, scores: Path | None = None
    ) -> Scored:
        """Sample and score a model on one prompt set.

        Both steps are stages of their own, in the folders given or else in the cache: changing a metric does
        not sample again. Scores are read off the stored images, so a resumed run sees what the first one saw.
        """
        drawn = self._sampled(model, prompt_set, guidance, images)
        return self._scored(model, prompt_set, guidance, drawn, scores)

    def _sampled(self, model: Model, prompt_set: str, guidance: float, images: Path | None) -> Stage:
        settings, prompts = self.settings, self.prompt_sets[prompt_set]
        made_from = {
            "weights": model.weights.key,
            "dtype": self.dtype,
            "prompts": fingerprint(prompts.prompts),
            "guidance": guidance,
            "steps": settings.steps,
            "scheduler": settings.scheduler,
            "seeds": settings.seeds,
        }
        drawn = Stage(images or runs.CACHE / f"images-{fingerprint(made_from)}", made_from)
        rows = keys(prompts.prompts, settings.seeds)
        batches = pieces.batches(len(rows), settings.batch_size)
        how = {"scheduler": settings.scheduler, "steps": settings.steps, "guidance": guidance}

        def prepare() -> pieces.Make:
            network = self.frozen.unet(model.weights)
            sampler = Sampler(self.frozen.pipe, **how, unet=network, name=model.result.title)

            def draw(number: int, folder: Path) -> list[Path]:
                batch = slice(batches[number].start, batches[number].stop)
                paths = evaluate.image_paths(folder, prompts.ids, settings.seeds)[batch]
                evaluate.write_images(paths, sampler(rows[batch]))
                return paths

            return draw

        name = f"{model.result.name}/images/{prompt_set}-g{guidance:g}"
        if images is None:
            self.common[name] = drawn.directory
        pieces.divided(
            drawn,
            self.processes,
            name,
            batches,
            prepare,
            description=f"sampling {_label(model, prompt_set, guidance)}",
            images=len(rows),
            flops=self.frozen.operations.images(len(rows), **how),
        )
        return drawn

    def _scored(self, model: Model, prompt_set: str, guidance: float, drawn: Stage, scores: Path | None) -> Scored:
        prompts, seeds = self.prompt_sets[prompt_set], self.settings.seeds
        made_from = {"images": drawn.hash, "metrics": self.scorers.info(), "prompt_set": prompt_set}
        stage = Stage(scores or runs.CACHE / f"scores-{fingerprint(made_from)}", made_from)
        rows = keys(prompts.prompts, seeds)
        blocks = pieces.batches(len(rows), evaluate.BLOCK * len(seeds))

        def score(number: int, folder: Path) -> list[Path]:
            block = slice(blocks[number].start, blocks[number].stop)
            paths = evaluate.image_paths(drawn.directory, prompts.ids, seeds)[block]
            images, asked = evaluate.read_images(paths), [prompt for _, prompt in rows[block]]
            values = self.scorers.score(images, asked)
            blank = [asked[row] for row in np.flatnonzero(evaluate.blank(images))]
            files = [pieces.path(folder, number, suffix) for suffix in (f".{BLANK}", ".parquet")]
            atomic_write(files[0], json.dumps(blank))
            write_table(files[1], pd.DataFrame(values))
            return files

        def join(folder: Path) -> None:
            parts = [pd.read_parquet(pieces.path(folder, number, ".parquet")) for number in range(len(blocks))]
            values = {str(name): column.to_numpy() for name, column in pd.concat(parts).items()}
            identity = {**_identity(model.result), "prompt_set": prompt_set, "guidance": float(guidance)}
            write_table(folder / "scores.parquet", evaluate.table_rows(values, prompts.ids, seeds, identity))
            blank = [json.loads(pieces.path(folder, number, f".{BLANK}").read_text()) for number in range(len(blocks))]
            atomic_write(folder / BLANK, json.dumps(sum(blank, [])))

        name = f"{model.result.name}/scores/{prompt_set}-g{guidance:g}"
        if scores is None:
            self.common[name] = stage.directory
        pieces.divided(
            stage,
            self.processes,
            name,
            blocks,
            lambda: score,
            join,
            f"scoring {_label(model, prompt_set, guidance)}",
            images=len(rows),
            flops=0 if stage.done else len(rows) * self._scoring,
        )
        # scores of before there were checkpoints have no step, and nobody looked for images that show nothing
        table = pd.read_parquet(stage.directory / "scores.parquet").assign(step=model.result.step)
        blank = stage.directory / BLANK
        shown = json.loads(blank.read_text()) if blank.exists() else []
        return Scored(table[list(evaluate.COLUMNS)], drawn.directory, shown)

    @cached_property
    def _scoring(self) -> int:
        """Operations of all scorers for one image, counted on a black one with the first prompt of all."""
        prompt = next(iter(self.prompt_sets.values())).prompts[0]
        with quiet():
            return cost.flops(lambda: self.scorers.score(np.zeros((1, 64, 64, 3), np.uint8), [prompt]))


def _label(model: Model, prompt_set: str, guidance: float) -> str:
    return f"{model.result.title}, {prompt_set}, guidance {guidance:g}"


def _identity(result: Result) -> dict[str, str | int]:
    """The columns of a score that say whose it is; scores in the cache belong to every run."""
    return {"run": "", "method": result.method, "iteration": result.iteration, "step": result.step}
