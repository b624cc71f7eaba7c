"""What all runs of a suite have in common: models, data, prompts, scorers, and what is made of them once.

Whatever is expensive lives in the cache under a name that says what made it, so methods and seeds share it.
"""

from __future__ import annotations

import filecmp
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from bench import models
from bench.costs import cost
from bench.costs.meter import metered, write_spent
from bench.data import Kept, load_pairs, load_prompts
from bench.errors import UsageError
from bench.methods.base import Pairing
from bench.runtime.processes import Processes
from bench.runtime.progress import quiet
from bench.sampling.sample import Sampler, keys, latent_shape
from bench.scoring import evaluate
from bench.storage import pieces
from bench.storage.cache import Embeddings, cached_latents, cached_prompts, count_truncated
from bench.storage.runs import CACHE, Result
from bench.storage.shards import Rows, Share
from bench.storage.stages import Stage, atomic_write, fingerprint, link
from bench.suites import Suite
from bench.training.recipe import make_accelerator, require_packages

T = TypeVar("T")
BLANK = "blank.json"  # of scores: the prompts whose images show nothing


class Weights(NamedTuple):
    """A UNet on disk, and the hash of all that made it."""

    folder: Path
    key: str


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


class Shared:
    """Everything a suite names, loaded and checked before any run of these methods is started."""

    def __init__(self, suite: Suite, methods: Sequence[str] = ()):
        self.suite = suite
        for method in methods:
            settings = suite.training(method)
            require_packages(settings.optimizer, settings.lora_rank)
        self.accelerator = make_accelerator(suite.train.precision)
        self.processes = Processes(self.accelerator)
        self.dtype = models.DTYPES[suite.model.dtype]
        data = suite.data
        with self.processes.main_first():
            folder = models.weights_folder(suite.model.weights)
            self.source = load_pairs(
                data.pairs,
                size=data.size,
                seed=data.seed,
                deduplicate=data.deduplicate,
                resolution=models.resolution(folder),
                cache=CACHE,
            )
        self.expect_data_for(methods)
        self.base = Weights(folder / "unet", models.weights_fingerprint(folder))
        self.prompt_sets = {
            name: load_prompts(prompts.prompts, prompts.limit) for name, prompts in suite.evaluation.prompt_sets.items()
        }
        self.pipe = models.load_pipeline(folder, self.device, self.dtype)
        self.pipe.unet.to("meta")  # its shape is all that is asked of it here: `unet` loads what is sampled from
        self.scorers = evaluate.Scorers.load(suite.metrics, suite.metric_options, str(self.device))
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
        return {
            "weights": self.base.key,
            "dtype": self.suite.model.dtype,
            "pairs": self.source.fingerprint,
            "flip": data.flip,
            "precision": data.precision,
        }

    def expect_data_for(self, methods: Sequence[str]) -> None:
        """Refuse methods that the data cannot train."""
        for name in methods:
            pairing = self.suite.method(name).pairing
            if pairing is Pairing.HUMAN and not self.source.paired:
                raise UsageError(
                    f"{name} is trained on pairs with a human choice, but {self.suite.data.pairs} has one "
                    "image a prompt; methods for that are sft and spin"
                )
            if pairing is Pairing.SELF_PLAY and self.suite.data.flip:
                raise UsageError(
                    f"{name}: data.flip mirrors winner and loser together, but samples of the opponent "
                    "are latents, which cannot be mirrored exactly; set data.flip=false"
                )

    @cached_property
    def truncated_pairs(self) -> int:
        """Training pairs whose prompt the text encoder does not read to its end."""
        return count_truncated(self.pipe.tokenizer, self.pairs.prompts)

    @cached_property
    def truncated(self) -> dict[str, int]:
        """Prompts that the text encoder does not read to their end, by prompt set."""
        return {
            name: count_truncated(self.pipe.tokenizer, prompts.prompts) for name, prompts in self.prompt_sets.items()
        }

    def announce_data(self) -> None:
        """Say what was left out of the training data and cut off prompts; the same is in the protocol."""
        if not self.accelerator.is_main_process:
            return
        record = self.pairs.record()
        if record["left_out"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in record["left_out"].items())
            click.echo(
                f"{self.suite.data.pairs}: {record['pairs']} of {record['rows']} rows used; left out: {reasons}",
                err=True,
            )
        cut = {"training pairs": self.truncated_pairs, **self.truncated}
        if any(cut.values()):
            told = ", ".join(f"{count} of {name}" for name, count in cut.items() if count)
            click.echo(
                f"prompts longer than the text encoder's {self.pipe.tokenizer.model_max_length} tokens lose "
                f"their end: {told}",
                err=True,
            )

    def latents(self, side: str) -> Rows:
        """Latents of all "winners" or "losers", encoded once: `[N, C, h, w]`, with flips `[N, 2, C, h, w]`."""
        return self._encoded(side).select(self.pairs.rows)

    def _encoded(self, side: str) -> Rows:
        """Latents of every row of the source, the broken ones too. All processes must call."""
        images = {"winners": self.source.winners, "losers": self.source.losers}[side]
        data, shape, count = self.suite.data, latent_shape(self.pipe.unet), len(self.source)
        key = {**self.data_key, "side": side}
        done = count * (2 if data.flip else 1)
        return self._charged(
            f"encode/{side}",
            key,
            {"images": done, "flops": done * self.vae_flops[0]},
            lambda: cached_latents(
                CACHE,
                key,
                self.pipe.vae,
                images,
                count,
                shape,
                batch_size=data.batch_size,
                flip=data.flip,
                precision=data.precision,
                share=self.share,
            ),
        )

    def embeddings(self) -> Embeddings:
        """Embeddings of all training prompts, encoded once. All processes must call."""
        made_from = {name: self.data_key[name] for name in ("weights", "dtype")}
        count = len(set(self.source.prompts))
        encode = cost.text_flops(self.pipe.text_encoder, self.pipe.tokenizer.model_max_length)
        embeddings = self._charged(
            "encode/prompts",
            {**self.data_key, "side": "prompts"},
            {"prompts": count, "flops": count * encode},
            lambda: cached_prompts(
                CACHE, made_from, self.pipe, self.source.prompts, precision=self.suite.data.precision, share=self.share
            ),
        )
        return embeddings.select(self.pairs.rows)

    def _charged(self, name: str, key: dict[str, str], counts: dict[str, int], encode: Callable[[], T]) -> T:
        """Do what goes through the cache, and keep what it cost the first time for every run that uses it.

        Of an encoding that was interrupted, what the last process still had to do.
        """
        ledger = Stage(CACHE / f"cost-{fingerprint(key)}", key)
        self.common[name] = ledger.directory
        if self.processes.once(ledger.ready):
            return encode()
        with timed(ledger, self.processes, name, **counts):
            return encode()

    @property
    def share(self) -> Share:
        """This process's part in filling the cache."""
        return Share(self.processes.index, self.processes.count, self.processes.wait)

    def unet(self, weights: Weights) -> UNet2DConditionModel:
        """A UNet to sample from, in the precision of the frozen models."""
        return models.load_unet(weights.folder, self.dtype).to(self.device)

    def forward_flops(self) -> int:
        """Operations of one UNet pass for one latent."""
        if self._forward is None:
            self._forward = cost.unet_flops(
                self.pipe.unet, latent_shape(self.pipe.unet), self.pipe.tokenizer.model_max_length
            )
        return self._forward

    @cached_property
    def vae_flops(self) -> tuple[int, int]:
        """Operations of encoding and of decoding one image."""
        return cost.vae_flops(self.pipe.vae, latent_shape(self.pipe.unet))

    def scoring_flops(self, prompt: str) -> int:
        """Operations of all scorers for one image, counted on a black one."""
        if self._scoring is None:
            with quiet():
                self._scoring = cost.flops(lambda: self.scorers.score(np.zeros((1, 64, 64, 3), np.uint8), [prompt]))
        return self._scoring

    def score(
        self, model: Model, prompt_set: str, guidance: float, images: Path | None = None, scores: Path | None = None
    ) -> Scored:
        """Sample and score a model on one prompt set.

        Both steps are stages of their own, in the folders given or else in the cache: changing a metric does
        not sample again. Scores are read off the stored images, so a resumed run sees what the first one saw.
        """
        settings, prompts = self.suite.evaluation, self.prompt_sets[prompt_set]
        label = f"{model.result.title}, {prompt_set}, guidance {guidance:g}"
        made_from = {
            "weights": model.weights.key,
            "dtype": self.suite.model.dtype,
            "prompts": fingerprint(prompts.prompts),
            "guidance": guidance,
            "steps": settings.steps,
            "scheduler": settings.scheduler,
            "seeds": settings.seeds,
        }
        drawn = Stage(images or CACHE / f"images-{fingerprint(made_from)}", made_from)
        rows = keys(prompts.prompts, settings.seeds)
        batches = pieces.batches(len(rows), settings.batch_size)

        def prepare() -> pieces.Make:
            sampler = Sampler(
                self.pipe,
                guidance=guidance,
                steps=settings.steps,
                scheduler=settings.scheduler,
                unet=self.unet(model.weights),
                name=model.result.title,
            )

            def draw(number: int, folder: Path) -> None:
                batch = slice(batches[number].start, batches[number].stop)
                paths = evaluate.image_paths(folder, prompts.ids, settings.seeds)
                evaluate.write_images(paths[batch], sampler(rows[batch]))

            return draw

        flops = cost.sampling_flops(
            self.forward_flops(), self.vae_flops[1], len(rows), steps=settings.steps, guidance=guidance
        )
        name = f"{model.result.name}/images/{prompt_set}-g{guidance:g}"
        if images is None:
            self.common[name] = drawn.directory
        pieces.divided(
            drawn,
            self.processes,
            name,
            batches,
            prepare,
            description=f"sampling {label}",
            images=len(rows),
            flops=flops,
        )
        return self._scored(model, prompt_set, guidance, drawn, scores, f"scoring {label}")

    def _scored(
        self, model: Model, prompt_set: str, guidance: float, drawn: Stage, scores: Path | None, description: str
    ) -> Scored:
        prompts, seeds = self.prompt_sets[prompt_set], self.suite.evaluation.seeds
        made_from = {"images": drawn.hash, "metrics": self.scorers.info(), "prompt_set": prompt_set}
        stage = Stage(scores or CACHE / f"scores-{fingerprint(made_from)}", made_from)
        rows = keys(prompts.prompts, seeds)
        blocks = pieces.batches(len(rows), evaluate.BLOCK * len(seeds))

        name = f"{model.result.name}/scores/{prompt_set}-g{guidance:g}"
        if scores is None:
            self.common[name] = stage.directory
        flops = 0 if stage.done else len(rows) * self.scoring_flops(prompts.prompts[0])

        def score(number: int, folder: Path) -> None:
            block = slice(blocks[number].start, blocks[number].stop)
            paths = evaluate.image_paths(drawn.directory, prompts.ids, seeds)[block]
            images, asked = evaluate.read_images(paths), [prompt for _, prompt in rows[block]]
            values = self.scorers.score(images, asked)
            blank = [asked[row] for row in np.flatnonzero(evaluate.blank(images))]
            atomic_write(pieces.path(folder, number, f".{BLANK}"), json.dumps(blank))
            write_table(pieces.path(folder, number, ".parquet"), pd.DataFrame(values))

        def join(folder: Path) -> None:
            parts = [pd.read_parquet(pieces.path(folder, number, ".parquet")) for number in range(len(blocks))]
            values = {str(name): column.to_numpy() for name, column in pd.concat(parts).items()}
            identity = {
                "run": "",
                "method": model.result.method,
                "iteration": model.result.iteration,
                "step": model.result.step,
                "prompt_set": prompt_set,
                "guidance": float(guidance),
            }
            write_table(folder / "scores.parquet", evaluate.table_rows(values, prompts.ids, seeds, identity))
            blank = [json.loads(pieces.path(folder, number, f".{BLANK}").read_text()) for number in range(len(blocks))]
            atomic_write(folder / BLANK, json.dumps(sum(blank, [])))

        pieces.divided(
            stage, self.processes, name, blocks, lambda: score, join, description, images=len(rows), flops=flops
        )
        # scores of before there were checkpoints have no step, and nobody looked for images that show nothing
        table = pd.read_parquet(stage.directory / "scores.parquet").assign(step=model.result.step)
        found = stage.directory / BLANK
        return Scored(
            table[list(evaluate.COLUMNS)], drawn.directory, json.loads(found.read_text()) if found.exists() else []
        )


@contextmanager
def timed(stage: Stage, processes: Processes, name: str, earlier: float = 0.0, **counts: int) -> Iterator[Path | None]:
    """Fill a stage and leave in it what it cost: what `metered` tells, and the counts given (pairs, images, flops).

    `earlier` are the seconds of a process that was stopped and whose work is gone on with. The main process is given
    the folder to fill, the others None; all leave when the stage is done.
    """
    if processes.main:
        with stage.fresh() as folder:
            with metered() as spent:
                yield folder
            write_spent(folder, name, spent, earlier, **counts)
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
            if filecmp.cmp(source / name, target / name, shallow=False):
                continue
            (target / name).unlink()  # the source was made again since
        link(source / name, target / name)
