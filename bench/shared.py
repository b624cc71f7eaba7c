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

import click
import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from bench import cost, evaluate, models, registry
from bench.cache import Embeddings, cached_latents, cached_prompts
from bench.data import Kept, load_pairs, load_prompts
from bench.errors import UsageError
from bench.meter import metered
from bench.progress import quiet
from bench.recipe import make_accelerator, require_packages
from bench.runs import CACHE
from bench.sample import latent_shape, sample
from bench.shards import Rows, Share
from bench.stages import Stage, atomic_write, fingerprint
from bench.suites import Suite
from methods.base import Pairing

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
    """Everything a suite names, loaded and checked before any run of these methods is started."""

    def __init__(self, suite: Suite, methods: Sequence[str] = ()):
        self.suite = suite
        require_packages(suite.train.optimizer, suite.train.lora_rank)
        self.accelerator = make_accelerator(suite.train.precision)
        self.dtype = DTYPES[suite.model.dtype]
        data = suite.data
        with self.accelerator.main_process_first():
            folder = models.weights_folder(suite.model.weights)
            self.source = load_pairs(data.pairs, size=data.size, seed=data.seed, deduplicate=data.deduplicate,
                                     resolution=models.resolution(folder), cache=CACHE)
        self.expect_data_for(methods)
        self.base = Weights(folder / "unet", models.weights_fingerprint(folder))
        self.prompt_sets = {name: load_prompts(prompts.prompts, prompts.limit)
                            for name, prompts in suite.evaluation.prompt_sets.items()}
        self.pipe = models.load_pipeline(folder, self.device, self.dtype)
        self.scorers = evaluate.Scorers.load(suite.metrics, suite.judge, suite.metric_options,
                                             str(self.device))
        self._forward: int | None = None
        self._scoring: int | None = None
        self.common: dict[str, Path] = {}  # what all runs share, by name: folders that hold what it cost
        # every method trains on the winners; encoding them shows which rows are broken, and so which pairs there are
        self.pairs = Kept(self.source, self._encoded("winners").broken)
        self.announce_data()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def data_key(self) -> dict[str, str]:
        """What latents and embeddings of the training pairs are made from."""
        data = self.suite.data
        return {"weights": self.base.key, "dtype": self.suite.model.dtype, "pairs": self.source.fingerprint,
                "flip": data.flip, "precision": data.precision}

    def expect_data_for(self, methods: Sequence[str]) -> None:
        """Refuse methods that the data cannot train."""
        for name in methods:
            pairing = registry.method(name).pairing
            if pairing is Pairing.HUMAN and not self.source.paired:
                raise UsageError(f"{name} is trained on pairs with a human choice, but {self.suite.data.pairs} has one "
                                 "image a prompt; methods for that are sft and spin")
            if pairing is Pairing.SELF_PLAY and self.suite.data.flip:
                raise UsageError(f"{name}: data.flip mirrors winner and loser together, but samples of the opponent "
                                 "are latents, which cannot be mirrored exactly; set data.flip=false")

    def announce_data(self) -> None:
        """Say what was left out of the training data; the same is in the protocol."""
        record = self.pairs.record()
        if record["left_out"] and self.accelerator.is_main_process:
            reasons = ", ".join(f"{count} {reason}" for reason, count in record["left_out"].items())
            click.echo(f"{self.suite.data.pairs}: {record['pairs']} of {record['rows']} rows used; left out: {reasons}",
                       err=True)

    def latents(self, side: str) -> Rows:
        """Latents of all "winners" or "losers", encoded once: `[N, C, h, w]`, with flips `[N, 2, C, h, w]`."""
        return self._encoded(side).select(self.pairs.rows)

    def _encoded(self, side: str) -> Rows:
        """Latents of every row of the source, the broken ones too. All processes must call."""
        images = {"winners": self.source.winners, "losers": self.source.losers}[side]
        data, shape, count = self.suite.data, latent_shape(self.pipe.unet), len(self.source)
        key = {**self.data_key, "side": side}
        done = count * (2 if data.flip else 1)
        return self._charged(f"encode/{side}", key, {
            "images": done, "flops": done * cost.vae_flops(self.pipe.vae, shape)[0]}, lambda: cached_latents(
                CACHE, key, self.pipe.vae, images, count, shape, batch_size=data.batch_size, flip=data.flip,
                precision=data.precision, share=self.share))

    def embeddings(self) -> Embeddings:
        """Embeddings of all training prompts, encoded once. All processes must call."""
        made_from = {name: self.data_key[name] for name in ("weights", "dtype")}
        count = len(set(self.source.prompts))
        encode = cost.text_flops(self.pipe.text_encoder, self.pipe.tokenizer.model_max_length)
        embeddings = self._charged("encode/prompts", {**self.data_key, "side": "prompts"}, {
            "prompts": count, "flops": count * encode}, lambda: cached_prompts(
                CACHE, made_from, self.pipe, self.source.prompts, precision=self.suite.data.precision,
                share=self.share))
        return embeddings.select(self.pairs.rows)

    def _charged(self, name: str, key: dict[str, str], counts: dict[str, int], encode: Callable[[], T]) -> T:
        """Do what goes through the cache, and keep what it cost the first time for every run that uses it.

        Of an encoding that was interrupted, what the last process still had to do.
        """
        ledger = Stage(CACHE / f"cost-{fingerprint(key)}", key)
        self.common[name] = ledger.directory
        if ledger.done or not self.accelerator.is_main_process:
            return encode()
        with timed(ledger, name, **counts):
            return encode()

    @property
    def share(self) -> Share:
        """This process's part in filling the cache."""
        return Share(self.accelerator.process_index, self.accelerator.num_processes,
                     self.accelerator.wait_for_everyone)

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
def timed(stage: Stage, name: str, earlier: float = 0.0, **counts: int) -> Iterator[Path]:
    """Fill a stage and leave in it what it cost: what `metered` tells, and the counts given (pairs, images, flops).

    `earlier` are the seconds of a process that was stopped and whose work is gone on with; its energy is not known.
    """
    with stage.fresh() as folder:
        with metered() as spent:
            yield folder
        spent["seconds"] = round(spent["seconds"] + earlier, 3)
        if earlier:
            spent["energy_joules"] = None
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
