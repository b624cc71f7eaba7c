"""Where trials happen: folders with the tiny suite, commands in forks of a process that has everything loaded."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import tiny_bench
import tqdm
import yaml

from bench import registry
from bench.commands import cli, run
from bench.storage.integrity import DAMAGED
from faults.damage import copy_tree
from faults.operations import Act, watch

ITERATIONS = {"spin": 2, "diffusion_dpo": 1}
PATIENCE = 600.0  # seconds after which a command counts as hanging


class Ended(NamedTuple):
    """How a command ended: its exit status (minus the signal that killed it), what it printed, its file operations."""

    code: int
    out: str
    err: str
    operations: int
    folder: Path

    @property
    def last(self) -> str:
        return (self.err.replace("\r", "\n").strip().splitlines() or [""])[-1]

    @property
    def clean(self) -> bool:
        """Whether a failure was told in one line, and not by an exception's trace or bare name."""
        return self.last.startswith("bench: ") and "Traceback" not in self.err and "BENCH_DEBUG" not in self.last


class Child:
    """A command at work in a process of its own."""

    def __init__(self, folder: Path, line: str, act: Act | None = None, seconds: float = PATIENCE):
        self.folder, self.seconds, self.count = folder, seconds, os.pipe()
        self.output, self.errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115, closed with this
        self.deadline = time.monotonic() + seconds
        self.process = os.fork()
        if not self.process:
            self._work(line, act)

    def _work(self, line: str, act: Act | None) -> None:
        code = 70
        try:
            os.chdir(self.folder)
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.errors.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            run.compare = lambda finished, layout: None  # the page takes longest, and has trials of its own
            counted = watch(self.folder, act or (lambda number, changes, path: None))
            try:
                cli.main(line.split())
            except SystemExit as done:
                code = done.code or 0
            os.write(self.count[1], str(counted()).encode())
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def wait(self) -> Ended:
        """Let the command end, or kill it after its seconds."""
        killed = False
        while not (status := os.waitpid(self.process, os.WNOHANG))[0]:
            if time.monotonic() > self.deadline and not killed:
                os.kill(self.process, signal.SIGKILL)
                killed = True
            time.sleep(0.005)
        os.close(self.count[1])
        with os.fdopen(self.count[0]) as counted:
            operations = int(counted.read() or 0)
        self.output.seek(0)
        self.errors.seek(0)
        err = self.errors.read() + ("\nhangs" if killed and self.seconds == PATIENCE else "")
        return Ended(os.waitstatus_to_exitcode(status[1]), self.output.read(), err, operations, self.folder)


class Workplace:
    """The folders of a campaign below one root, and the undisturbed result of every method."""

    def __init__(self, root: Path, methods: tuple[str, ...] = tuple(ITERATIONS)):
        from tiny import make_pipeline

        registry.BUILT_IN["metrics"]["darkness"] = tiny_bench.DARKNESS
        tqdm.tqdm.monitor_interval = 0  # its thread would not survive a fork
        self.root, self.number = root, 0
        make_pipeline().save_pretrained(root / "pipeline")
        self.finished: dict[str, Path] = {}
        self.shown: dict[tuple[Path, str], tuple[Ended, bytes]] = {}  # what reports make of a folder
        self.operations: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        for method in methods:
            warm = self._warm_up(method) if not self.finished else None
            self.finished[method] = self.fresh("finished-")
            began = time.monotonic()
            ended = self.perform(self.finished[method], self.line(method))
            assert ended.code == 0, ended.err
            self.seconds[method], self.operations[method] = time.monotonic() - began, ended.operations
            assert warm is None or result(warm) == result(self.finished[method])
        self.results = {method: result(folder) for method, folder in self.finished.items()}
        gc.collect()
        gc.freeze()  # forks leave what is loaded where it is, a quarter of their time

    def _warm_up(self, method: str) -> Path:
        """Run once in this process, so that no fork has to load a module or look anything up again."""
        folder, before = self.fresh("warm-"), os.getcwd()
        os.chdir(folder)
        try:
            tiny_bench.bench(self.line(method))
        finally:
            os.chdir(before)
        return folder

    def fresh(self, name: str = "trial-") -> Path:
        """A folder with nothing in it but the suite."""
        folder = Path(tempfile.mkdtemp(prefix=name, dir=self.root))
        self.furnish(folder)
        return folder

    def furnish(self, folder: Path) -> None:
        suite: dict[str, Any] = {**tiny_bench.SUITE, "model": {"weights": str(self.root / "pipeline")}}
        suite["data"] = {**suite["data"], "size": 8}
        suite["train"] = {**suite["train"], "checkpoint_every": 1}
        suite["evaluation"] = {
            **suite["evaluation"],
            "prompt_sets": {"test": {"prompts": "world:test", "limit": 3}},
            "guidance": [1.0],
            "seeds": [1],
            "batch_size": 2,
        }
        (folder / "tiny.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))

    def copy(self, method: str) -> Path:
        """A folder with a finished run in it."""
        folder = Path(tempfile.mkdtemp(prefix="trial-", dir=self.root))
        copy_tree(self.finished[method], folder)
        return folder

    def line(self, method: str) -> str:
        return f"run --suite tiny.yaml --method {method} --iters {ITERATIONS[method]}"

    def perform(self, folder: Path, line: str, act: Act | None = None) -> Ended:
        """Run a command to its end in a process of its own."""
        return Child(folder, line, act).wait()

    def going_on(self, folder: Path, method: str) -> str:
        """What a person types after a fault: the run again, if it had been begun."""
        begun = ids(folder)
        return f"run --resume {begun[-1]}" if begun else self.line(method)

    def equal(self, folder: Path, method: str) -> list[str]:
        """What of a finished run differs from the undisturbed result, and what lies about half done."""
        found = result(folder)
        differing = sorted(
            name for name in {*found, *self.results[method]} if found.get(name) != self.results[method].get(name)
        )
        return differing + [str(path) for path in leftovers(folder)]


def ids(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "results" / "runs").glob("*/config.json"))


def leftovers(folder: Path) -> list[Path]:
    """What killed processes leave behind, and nobody has cleared away."""
    found = (path for path in folder.rglob("*") if path.name.endswith((".tmp", ".part")) or path.name == "pieces")
    return sorted(path.relative_to(folder) for path in found if DAMAGED not in path.as_posix())


def result(folder: Path, name: str | None = None) -> dict[str, str]:
    """All of a run (by default the only one) that a fault must not change; files by the hash of their bytes."""
    if name is None:
        (name,) = ids(folder)
    run = folder / "results" / "runs" / name
    kinds = ("iter*/unet/*.safetensors", "images/**/*.png", "images/**/prompts.json", "stages/opponent*/*.npy")
    paths = (path for kind in kinds for path in run.glob(kind) if DAMAGED not in path.as_posix())
    found = {path.relative_to(run).as_posix(): _hash(path.read_bytes()) for path in paths}
    found["scores"] = _table(run / "scores.parquet", ["run"])
    found["history"] = _table(run / "history.parquet", ["pairs_per_s", "images_per_s"])
    metrics = json.loads((run / "metrics.json").read_text())
    found["metrics.json"] = _hash(json.dumps([metrics["loss"]["steps"], metrics["loss"]["values"]]).encode())
    config, protocol, cost = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "protocol", "cost"))
    found["config"] = json.dumps({**config, "run": ""})
    apart = {"run", "created", "processes", "git_commit", "versions"}
    found["protocol"] = json.dumps({key: value for key, value in protocol.items() if key not in apart})
    counts = ("name", "images", "pairs", "flops")
    found["cost"] = json.dumps(
        [{key: stage[key] for key in counts if key in stage} for stage in cost["stages"] + cost["checkpoints"]]
        + [cost[key] for key in ("train_flops", "sample_flops", "pairs_seen")]
    )
    found["status"] = json.loads((run / "run.json").read_text())["status"]
    return found


def _table(path: Path, without: list[str]) -> str:
    return _hash(pd.read_parquet(path).drop(columns=without).to_csv(index=False).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
