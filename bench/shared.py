"""What all runs of a suite have in common, loaded and checked before any of them starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from bench import models
from bench.data import Source, load_pairs
from bench.errors import BenchError, UsageError
from bench.methods.base import Pairing
from bench.models.frozen import Frozen
from bench.models.sources import resolve
from bench.runtime.processes import Processes
from bench.scoring.evaluation import Evaluator
from bench.storage import runs
from bench.suites import Suite
from bench.training.encoded import Encoded
from bench.training.recipe import make_accelerator, require_packages


class Shared:
    """The models, the data and the evaluation of a suite, for runs of `methods`: entries of its methods or models.

    `common` holds the folders of what is made once for all runs, by name: in each is what making it cost.
    """

    def __init__(self, suite: Suite, methods: Sequence[str] = ()):
        self.suite = suite
        trained = [method for method in methods if method not in suite.models]
        for method in trained:
            settings = suite.training(method)
            require_packages(settings.optimizer, settings.lora_rank)
        self.accelerator = make_accelerator(suite.train.precision)
        self.processes = Processes(self.accelerator)
        self.common: dict[str, Path] = {}
        with self.processes.main_first():
            folder = models.weights_folder(suite.model.weights)
            self.sources = {name: resolve(suite.models[name]) for name in methods if name in suite.models}
            source = self._open_pairs(folder) if trained or not methods else None
        for method in trained:
            expect_data_for(suite, method, source)
        self.frozen = Frozen(folder, self.accelerator.device, suite.model.dtype)
        self.evaluator = Evaluator(suite, self.frozen, self.processes, self.common)
        self._encoded = source and Encoded(suite, source, self.frozen, self.processes, self.common)
        if self.processes.main:
            self._announce()

    @property
    def encoded(self) -> Encoded:
        """The training data; there is none where nothing is trained."""
        if self._encoded is None:
            raise BenchError(
                f"suite {self.suite.name}: its training data were not loaded, for nothing was to be trained"
            )
        return self._encoded

    def _open_pairs(self, folder: Path) -> Source:
        data = self.suite.data
        return load_pairs(
            data.pairs,
            size=data.size,
            seed=data.seed,
            deduplicate=data.deduplicate,
            resolution=models.resolution(folder),
            cache=runs.CACHE,
        )

    def _announce(self) -> None:
        """Say what was left out of the training data and cut off prompts; the same is in the protocol."""
        cut = dict(self.evaluator.truncated)
        if self._encoded:
            record = self._encoded.pairs.record()
            cut = {"training pairs": self._encoded.truncated, **cut}
            if record["left_out"]:
                reasons = ", ".join(f"{count} {reason}" for reason, count in record["left_out"].items())
                used = f"{self.suite.data.pairs}: {record['pairs']} of {record['rows']} rows used"
                click.echo(f"{used}; left out: {reasons}", err=True)
        if any(cut.values()):
            told = ", ".join(f"{count} of {name}" for name, count in cut.items() if count)
            click.echo(
                f"prompts longer than the text encoder's {self.frozen.pipe.tokenizer.model_max_length} tokens lose "
                f"their end: {told}",
                err=True,
            )


def expect_data_for(suite: Suite, method: str, source: Source) -> None:
    """Refuse a method that the data cannot train."""
    pairing = suite.method(method).pairing
    if pairing is Pairing.HUMAN and not source.paired:
        raise UsageError(
            f"{method} is trained on pairs with a human choice, but {suite.data.pairs} has one "
            "image a prompt; methods for that are sft and spin"
        )
    if pairing is Pairing.SELF_PLAY and suite.data.flip:
        raise UsageError(
            f"{method}: data.flip mirrors winner and loser together, but samples of the opponent "
            "are latents, which cannot be mirrored exactly; set data.flip=false"
        )
