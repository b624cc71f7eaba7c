"""Names on the Hugging Face hub, and the files behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError, first_line

FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".parquet")  # what a hub name cannot end in


def is_hub_id(name: str) -> bool:
    """Whether a name is one on the hub: OWNER/NAME, not a path, and nothing of that name is on this machine."""
    path = Path(name).expanduser()
    return name.count("/") == 1 and name[0] not in "./~" and path.suffix not in FILES and not path.exists()


@dataclass(frozen=True)
class Repository:
    """A model repository at one revision: what it holds, and a way to those files that are wanted."""

    name: str
    revision: str | None
    names: tuple[str, ...]

    @classmethod
    def look_up(cls, name: str, revision: str | None = None) -> Repository:
        """List a repository without fetching anything; where the hub cannot be reached, what is cached of it."""
        from huggingface_hub import HfApi, snapshot_download

        try:
            return cls(name, revision, tuple(HfApi().list_repo_files(name, revision=revision)))
        except Exception as error:  # the hub's client raises errors of several libraries
            try:
                folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
            except Exception:
                at = f" at revision {revision}" if revision else ""
                raise BenchError(
                    f"{name}: no such file or folder, and the hub failed{at}: {first_line(error)}; a name on the hub "
                    "needs the network once, a folder never"
                ) from error
            return cls(name, revision, tuple(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")))

    def fetch(self, names: Sequence[str]) -> Path:
        """The folder that holds these files (and, as the hub's client keeps more, others); its name is the commit."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(self.name, revision=self.revision, allow_patterns=list(names)))
        except Exception as error:
            raise BenchError(f"{self.name}: the hub failed: {first_line(error)}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise BenchError(f"{self.name}: {missing[0]} is not cached, and the hub cannot be reached")
        return folder
