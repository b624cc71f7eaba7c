"""Training data as the loop reads it: latents and prompt embeddings, made once for all runs that share them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from bench.data import Kept, Source
from bench.models.frozen import Frozen
from bench.runtime.processes import Processes
from bench.storage import runs
from bench.storage.cache import Embeddings, cached_latents, cached_prompts
from bench.storage.meter import timed
from bench.storage.shards import Rows, Share
from bench.storage.stages import Stage, fingerprint
from bench.suites import Suite

T = TypeVar("T")


class Encoded:
    """The pairs of a suite, encoded; rows that cannot be read show in the encoding, and are left out of `pairs`.

    `common` is given the folder of everything that was made here, by name: it holds what that cost.
    """

    def __init__(self, suite: Suite, source: Source, frozen: Frozen, processes: Processes, common: dict[str, Path]):
        self.settings, self.source, self.frozen = suite.data, source, frozen
        self.processes, self.common = processes, common
        self.key = {
            "weights": frozen.base.key,
            "dtype": suite.model.dtype,
            "pairs": source.fingerprint,
            "flip": suite.data.flip,
            "precision": suite.data.precision,
        }
        # every method trains on the winners; encoding them shows which rows are broken, and so which pairs there are
        self.pairs = Kept(source, self._encode("winners").broken)

    @cached_property
    def truncated(self) -> int:
        """Pairs whose prompt the text encoder does not read to its end."""
        return self.frozen.truncated(self.pairs.prompts)

    def latents(self, side: str) -> Rows:
        """Latents of all "winners" or "losers": `[N, C, h, w]`, with flips `[N, 2, C, h, w]`."""
        return self._encode(side).select(self.pairs.rows)

    def embeddings(self) -> Embeddings:
        """Embeddings of the prompts of all pairs. All processes must call."""
        made_from = {name: self.key[name] for name in ("weights", "dtype")}
        count = len(set(self.source.prompts))
        embeddings = self._charged(
            "prompts",
            {"prompts": count, "flops": count * self.frozen.operations.text},
            lambda: cached_prompts(
                runs.CACHE,
                made_from,
                self.frozen.pipe,
                self.source.prompts,
                precision=self.settings.precision,
                share=self._share,
            ),
        )
        return embeddings.select(self.pairs.rows)

    def _encode(self, side: str) -> Rows:
        """Latents of every row of the source, the broken ones too. All processes must call."""
        images = {"winners": self.source.winners, "losers": self.source.losers}[side]
        settings, count = self.settings, len(self.source)
        done = count * (2 if settings.flip else 1)
        return self._charged(
            side,
            {"images": done, "flops": done * self.frozen.operations.coding[0]},
            lambda: cached_latents(
                runs.CACHE,
                {**self.key, "side": side},
                self.frozen.pipe.vae,
                images,
                count,
                self.frozen.latent_shape,
                batch_size=settings.batch_size,
                flip=settings.flip,
                precision=settings.precision,
                share=self._share,
            ),
        )

    def _charged(self, side: str, counts: dict[str, int], encode: Callable[[], T]) -> T:
        """Do what goes through the cache, and keep what it cost the first time for every run that uses it.

        Of an encoding that was interrupted, what the last process still had to do.
        """
        key, name = {**self.key, "side": side}, f"encode/{side}"
        ledger = Stage(runs.CACHE / f"cost-{fingerprint(key)}", key)
        self.common[name] = ledger.directory
        if self.processes.once(ledger.ready):
            return encode()
        with timed(ledger, self.processes, name, **counts):
            return encode()

    @property
    def _share(self) -> Share:
        """This process's part in filling the cache."""
        return Share(self.processes.index, self.processes.count, self.processes.wait)
