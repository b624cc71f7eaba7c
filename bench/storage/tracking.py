"""sacred's record of a run: config.json, run.json, metrics.json and cout.txt in the run's own folder."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.errors import BenchError, first_line
from bench.storage.stages import atomic_write

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sacred imports pkg_resources, which warns about itself
    from sacred import SETTINGS, Experiment
    from sacred.observers import FileStorageObserver, MongoObserver, RunObserver, SqlObserver
    from sacred.serializer import flatten

LogScalar = Callable[[str, float, int], None]

SETTINGS.CAPTURE_MODE = "sys"  # keeps stderr a terminal, so that progress bars still move
SETTINGS.DISCOVER_SOURCES = "none"  # the protocol names the commit instead
SETTINGS.DISCOVER_DEPENDENCIES = "none"  # the protocol lists the versions
SETTINGS.HOST_INFO.INCLUDE_CPU_INFO = False  # takes seconds
CONNECT_TIMEOUT_MS = 5000
LONGEST_REASON = 160  # characters; database drivers append pages


class RunFolder(FileStorageObserver):
    """Writes into a run's folder, which may exist: a resumed run goes on in it. Files are replaced whole."""

    def __init__(self, folder: Path):
        super().__init__(folder.parent, copy_sources=False)
        self.folder = folder
        self.printed_before = ""
        self.failure: Exception | None = None

    def __repr__(self) -> str:
        return str(self.folder)

    def _make_run_dir(self, _id: Any) -> None:
        self.dir = str(self.folder)
        # Scalars are logged again for the iterations that are already there.
        (self.folder / "metrics.json").unlink(missing_ok=True)
        cout = self.folder / "cout.txt"
        self.printed_before = cout.read_text(encoding="utf-8", errors="replace") if cout.exists() else ""

    def save_json(self, obj: Any, filename: str) -> None:
        self._write(filename, json.dumps(flatten(obj), indent=2))

    def save_cout(self) -> None:
        self._write("cout.txt", self.printed_before + self.cout)

    def _write(self, filename: str, content: str) -> None:
        """Keep the first error: sacred goes on without an observer that fails, and `record` must not."""
        try:
            atomic_write(self.folder / filename, content)
        except OSError as error:
            self.failure = self.failure or error
            raise


def record(
    folder: Path,
    config: dict[str, Any],
    body: Callable[[LogScalar], None],
    mongo: str | None = None,
    sql: str | None = None,
) -> None:
    """Run `body` under sacred, observed in `folder` and, on request, in a database; a record that could not be written
    in `folder` raises the OSError."""
    databases = _databases(mongo, sql)
    experiment = Experiment("bench", interactive=True, save_git_info=False)
    experiment.logger = _quiet_logger()
    experiment.captured_out_filter = final_lines
    experiment.add_config(config)
    own = RunFolder(folder)
    experiment.observers = [own, *databases]
    started = False

    def main(_run: Any) -> None:
        nonlocal started
        started = True
        body(_run.log_scalar)

    experiment.main(main)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="sacred")
        try:
            experiment.run()
        except Exception as error:
            if databases and not started:
                reason = first_line(error)[:LONGEST_REASON]
                raise BenchError(f"the run's record cannot be written to the database: {reason}") from error
            raise
    if own.failure:
        raise own.failure


def final_lines(text: str) -> str:
    """What a terminal shows at the end: the last state of every line drawn over, as progress bars are."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def require_drivers(mongo: str | None, sql: str | None) -> None:
    """Say before anything is started when the package for a database is not installed."""
    for option, url, package in (("mongo", mongo, "pymongo"), ("sql", sql, "sqlalchemy")):
        if url and find_spec(package) is None:
            raise BenchError(
                f"--{option} needs {package}, which is not installed: pip install 'diffusion-align-bench[{option}]'"
            )


def _databases(mongo: str | None, sql: str | None) -> list[RunObserver]:
    observers: list[RunObserver] = []
    try:
        if mongo:
            name = urlsplit(mongo).path.strip("/") or "sacred"
            observers.append(MongoObserver(mongo, name, serverSelectionTimeoutMS=CONNECT_TIMEOUT_MS))
        if sql:
            observers.append(SqlObserver(sql))
    except Exception as error:
        raise BenchError(f"the database's address is not usable: {first_line(error)}") from error
    return observers


def _quiet_logger() -> logging.Logger:
    """Sacred's warnings on stderr, less those that repeat what is said anyway, and of a stack trace the last line."""
    logger = logging.getLogger("bench.sacred")

    def terse(record: logging.LogRecord) -> bool:
        record.msg = record.msg.rstrip().rsplit("\n", 1)[-1]
        return not record.msg.startswith(("Failed after", "Aborted after", "The observer"))

    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(terse)
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    return logger
