"""What all runs of a suite have in common: models, data, prompts, scorers, and what is made of them once.

Whatever is expensive lives in the cache under a name that says what made it, so methods and seeds share it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from bench import cost, evaluate, models, pieces, processes
from bench.cache import Embeddings, cached_latents, cached_prompts
from bench.data import load_pairs, load_prompts
from bench.processes import Processes
from bench.runs import CACHE
from bench.sample import Sampler, keys, latent_shape
from bench.stages import Stage, atomic_write, fingerprint
from bench.suites import Suite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Weights(NamedTuple):
    """A UNet on disk, and the hash of all that made it."""

    folder: Path
    key: str


class Model(NamedTuple):
    """A row of the comparison: which method and iteration a UNet belongs to."""

    method: str
    iteration: int
    weights: Weights


class Shared:
    """Everything a suite names, loaded and checked before any run is started."""

    def __init__(self, suite: Suite):
        self.suite = suite
        precision = suite.model.dtype
        self.accelerator = processes.accelerator("no" if precision == "fp32" else precision)
        self.processes = Processes(self.accelerator)
        self.dtype = DTYPES[precision]
        folder = models.weights_folder(suite.model.weights)
        self.base = Weights(folder / "unet", models.weights_fingerprint(folder))
        self.prompt_sets = {name: load_prompts(prompts.prompts, prompts.limit)
                            for name, prompts in suite.evaluation.prompt_sets.items()}
        with self.processes.main_first():
            self.pairs = load_pairs(suite.data.pairs, suite.data.size, suite.data.seed)
        self.pipe = models.load_pipeline(folder, self.device, self.dtype)
        self.scorers = evaluate.Scorers.load(suite.metrics, suite.judge, suite.metric_options,
                                             str(self.device))
        self._forward: int | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def data_key(self) -> dict[str, str]:
        """What latents and embeddings of the training pairs are made from."""
        return {"weights": self.base.key, "dtype": self.suite.model.dtype, "pairs": self.pairs.fingerprint}

    def latents(self, side: str) -> np.ndarray:
        """Latents of all "winners" or "losers" `[N, C, h, w]`, encoded once."""
        images = {"winners": self.pairs.winners, "losers": self.pairs.losers}[side]
        with self.processes.main_first():
            return cached_latents(CACHE, {**self.data_key, "side": side}, self.pipe.vae, images, len(self.pairs))

    def embeddings(self) -> Embeddings:
        """Embeddings of all training prompts, encoded once."""
        with self.processes.main_first():
            return cached_prompts(CACHE, self.data_key, self.pipe, self.pairs.prompts)

    def unet(self, weights: Weights) -> UNet2DConditionModel:
        """A UNet to sample from, in the precision of the frozen models."""
        return models.load_unet(weights.folder, self.dtype).to(self.device)

    def forward_flops(self) -> int:
        """Operations of one UNet pass for one latent."""
        if self._forward is None:
            self._forward = cost.unet_flops(self.pipe.unet, latent_shape(self.pipe.unet),
                                            self.pipe.tokenizer.model_max_length)
        return self._forward

    @cached_property
    def vae_flops(self) -> tuple[int, int]:
        """Operations of encoding and of decoding one image."""
        return cost.vae_flops(self.pipe.vae, latent_shape(self.pipe.unet))

    def score(self, model: Model, prompt_set: str, guidance: float, images: Path | None = None,
              scores: Path | None = None) -> tuple[pd.DataFrame, Path]:
        """Sample and score a model on one prompt set, and return its rows and the folder of its images.

        Both steps are stages of their own, in the folders given or else in the cache: changing a metric does
        not sample again. Scores are read off the stored images, so a resumed run sees what the first one saw.
        """
        settings, prompts = self.suite.evaluation, self.prompt_sets[prompt_set]
        label = f"{model.method} {model.iteration}" if model.iteration else model.method
        label = f"{label}, {prompt_set}, guidance {guidance:g}"
        made_from = {"weights": model.weights.key, "dtype": self.suite.model.dtype,
                     "prompts": fingerprint(prompts.prompts), "guidance": guidance, "steps": settings.steps,
                     "scheduler": settings.scheduler, "seeds": settings.seeds}
        drawn = Stage(images or CACHE / f"images-{fingerprint(made_from)}", made_from)
        rows = keys(prompts.prompts, settings.seeds)
        batches = pieces.batches(len(rows), settings.batch_size)

        def prepare() -> pieces.Make:
            sampler = Sampler(self.pipe, guidance=guidance, steps=settings.steps, scheduler=settings.scheduler,
                              unet=self.unet(model.weights))

            def draw(number: int, folder: Path) -> None:
                batch = slice(batches[number].start, batches[number].stop)
                paths = evaluate.image_paths(folder, prompts.ids, settings.seeds)
                evaluate.write_images(paths[batch], sampler(rows[batch]))

            return draw

        flops = cost.sampling_flops(self.forward_flops(), self.vae_flops[1], len(rows), steps=settings.steps,
                                    guidance=guidance)
        pieces.divided(drawn, self.processes, f"iter{model.iteration}/images/{prompt_set}-g{guidance:g}", batches,
                       prepare, description=f"sampling {label}", images=len(rows), flops=flops)
        return self._scored(model, prompt_set, guidance, drawn, scores, f"scoring {label}"), drawn.directory

    def _scored(self, model: Model, prompt_set: str, guidance: float, drawn: Stage, scores: Path | None,
                description: str) -> pd.DataFrame:
        prompts, seeds = self.prompt_sets[prompt_set], self.suite.evaluation.seeds
        made_from = {"images": drawn.hash, "metrics": self.scorers.info(), "judge": self.judge_info(),
                     "prompt_set": prompt_set}
        stage = Stage(scores or CACHE / f"scores-{fingerprint(made_from)}", made_from)
        rows = keys(prompts.prompts, seeds)
        blocks = pieces.batches(len(rows), evaluate.BLOCK * len(seeds))

        def score(number: int, folder: Path) -> None:
            block = slice(blocks[number].start, blocks[number].stop)
            paths = evaluate.image_paths(drawn.directory, prompts.ids, seeds)[block]
            values = self.scorers.score(evaluate.read_images(paths), [prompt for _, prompt in rows[block]])
            write_table(pieces.path(folder, number, ".parquet"), pd.DataFrame(values))

        def join(folder: Path) -> None:
            parts = [pd.read_parquet(pieces.path(folder, number, ".parquet")) for number in range(len(blocks))]
            values = {str(name): column.to_numpy() for name, column in pd.concat(parts).items()}
            identity = {"run": "", "method": model.method, "iteration": model.iteration, "prompt_set": prompt_set,
                        "guidance": float(guidance)}
            write_table(folder / "scores.parquet", evaluate.table_rows(values, prompts.ids, seeds, identity))

        pieces.divided(stage, self.processes, f"iter{model.iteration}/scores/{prompt_set}-g{guidance:g}", blocks,
                       lambda: score, join, description, images=len(rows))
        return pd.read_parquet(stage.directory / "scores.parquet")

    def judge_info(self) -> dict[str, Any] | None:
        return self.scorers.judge.info() if self.scorers.judge else None


@contextmanager
def timed(stage: Stage, processes: Processes, name: str, **counts: int) -> Iterator[Path | None]:
    """Fill a stage and leave in it what it cost: seconds, and the counts given (pairs, images, flops).

    The main process is given the folder to fill, the others None; all leave when the stage is done.
    """
    if processes.main:
        with stage.fresh() as folder:
            started = time.perf_counter()
            yield folder
            spent = {"name": name, "seconds": round(time.perf_counter() - started, 3), **counts}
            atomic_write(folder / "cost.json", json.dumps(spent))
    else:
        yield None
    processes.wait()
    processes.expect(lambda: stage.done, stage.directory)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a parquet file that appears whole."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    atomic_write(path, buffer.getvalue())


def link_tree(source: Path, target: Path, names: Sequence[str]) -> None:
    """Put files of one folder into another without copying them where the file system allows it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (target / name).exists():
            continue
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
