"""What all runs of a suite have in common: models, data, prompts, scorers, and what is made of them once.

Whatever is expensive lives in the cache under a name that says what made it, so methods and seeds share it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from bench import cost, evaluate, models
from bench.cache import Embeddings, cached_latents, cached_prompts
from bench.data import load_pairs, load_prompts
from bench.meter import metered
from bench.progress import quiet
from bench.runs import CACHE
from bench.sample import latent_shape, sample
from bench.stages import Stage, atomic_write, fingerprint
from bench.suites import Suite

T = TypeVar("T")
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
        self.accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
        self.dtype = DTYPES[precision]
        folder = models.weights_folder(suite.model.weights)
        self.base = Weights(folder / "unet", models.weights_fingerprint(folder))
        self.prompt_sets = {name: load_prompts(prompts.prompts, prompts.limit)
                            for name, prompts in suite.evaluation.prompt_sets.items()}
        self.pairs = load_pairs(suite.data.pairs, suite.data.size, suite.data.seed)
        self.pipe = models.load_pipeline(folder, self.device, self.dtype)
        self.scorers = evaluate.Scorers.load(suite.metrics, suite.judge, suite.metric_options,
                                             str(self.device))
        self._forward: int | None = None
        self._scoring: int | None = None
        self.common: dict[str, Path] = {}  # what all runs share, by name: folders that hold what it cost

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
        key, count = {**self.data_key, "side": side}, len(self.pairs)
        encode = cost.vae_flops(self.pipe.vae, latent_shape(self.pipe.unet))[0]
        return self._charged(f"encode/{side}", key, {"images": count, "flops": count * encode},
                             lambda: cached_latents(CACHE, key, self.pipe.vae, images, count))

    def embeddings(self) -> Embeddings:
        """Embeddings of all training prompts, encoded once."""
        key, count = {**self.data_key, "side": "prompts"}, len(set(self.pairs.prompts))
        encode = cost.text_flops(self.pipe.text_encoder, self.pipe.tokenizer.model_max_length)
        return self._charged("encode/prompts", key, {"prompts": count, "flops": count * encode},
                             lambda: cached_prompts(CACHE, self.data_key, self.pipe, self.pairs.prompts))

    def _charged(self, name: str, key: dict[str, str], counts: dict[str, int], encode: Callable[[], T]) -> T:
        """Do what goes through the cache, and keep what it cost the first time for every run that uses it."""
        ledger = Stage(CACHE / f"cost-{fingerprint(key)}", key)
        self.common[name] = ledger.directory
        if ledger.done:
            return encode()
        with timed(ledger, name, **counts):
            return encode()

    def unet(self, weights: Weights) -> UNet2DConditionModel:
        """A UNet to sample from, in the precision of the frozen models."""
        return models.load_unet(weights.folder, self.dtype).to(self.device)

    def forward_flops(self) -> int:
        """Operations of one UNet pass for one latent."""
        if self._forward is None:
            self._forward = cost.unet_flops(self.pipe.unet, latent_shape(self.pipe.unet),
                                            self.pipe.tokenizer.model_max_length)
        return self._forward

    def scoring_flops(self, prompt: str) -> int:
        """Operations of all scorers for one image, counted on a black one."""
        if self._scoring is None:
            with quiet():
                self._scoring = cost.flops(lambda: self.scorers.score(np.zeros((1, 64, 64, 3), np.uint8), [prompt]))
        return self._scoring

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
        name = f"iter{model.iteration}/images/{prompt_set}-g{guidance:g}"
        if not drawn.done:
            count = len(prompts) * len(settings.seeds)
            decode = cost.vae_flops(self.pipe.vae, latent_shape(self.pipe.unet))[1]
            flops = cost.sampling_flops(self.forward_flops(), decode, count, steps=settings.steps,
                                        guidance=guidance)
            with timed(drawn, name, images=count, flops=flops) as folder:
                pixels = sample(self.pipe, prompts.prompts, guidance=guidance, steps=settings.steps,
                                seeds=settings.seeds, scheduler=settings.scheduler,
                                batch_size=settings.batch_size, unet=self.unet(model.weights),
                                description=f"sampling {label}")
                evaluate.write_images(folder, pixels, prompts.ids, settings.seeds)
        if images is None:
            self.common[name] = drawn.directory
        return self._scored(model, prompt_set, guidance, drawn, scores), drawn.directory

    def _scored(self, model: Model, prompt_set: str, guidance: float, drawn: Stage,
                scores: Path | None) -> pd.DataFrame:
        prompts, seeds = self.prompt_sets[prompt_set], self.suite.evaluation.seeds
        made_from = {"images": drawn.hash, "metrics": self.scorers.info(), "judge": self.judge_info(),
                     "prompt_set": prompt_set}
        stage = Stage(scores or CACHE / f"scores-{fingerprint(made_from)}", made_from)
        name, count = f"iter{model.iteration}/scores/{prompt_set}-g{guidance:g}", len(prompts) * len(seeds)
        if scores is None:
            self.common[name] = stage.directory
        if not stage.done:
            flops = count * self.scoring_flops(prompts.prompts[0])
            with timed(stage, name, images=count, flops=flops) as folder:
                pixels = evaluate.read_images(drawn.directory, prompts.ids, seeds)
                rows = evaluate.evaluate(pixels, prompts, seeds, self.scorers, run="", method=model.method,
                                         iteration=model.iteration, prompt_set=prompt_set, guidance=guidance)
                rows.to_parquet(folder / "scores.parquet", index=False)
        return pd.read_parquet(stage.directory / "scores.parquet")

    def judge_info(self) -> dict[str, Any] | None:
        return self.scorers.judge.info() if self.scorers.judge else None


@contextmanager
def timed(stage: Stage, name: str, **counts: int) -> Iterator[Path]:
    """Fill a stage and leave in it what it cost: what `metered` tells, and the counts given (pairs, images, flops)."""
    with stage.fresh() as folder:
        with metered() as spent:
            yield folder
        atomic_write(folder / "cost.json", json.dumps({"name": name, **spent, **counts}))


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
