"""Whether what lies on disk is what was written: runs and cache, file by file, and what was made from what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.storage import integrity
from bench.storage.integrity import DAMAGED, Damage
from bench.storage.runs import Result
from bench.storage.stages import MARKER, atomic_write
from bench.suites.keys import flat

SEAL = "seal.json"
"""In the folder of a finished run: size and hash of every file that is in no stage (tables, protocol, base images)."""
CONFIG = "config.json"
IN_STAGES = (MARKER, "cost.json", "rows.npy")  # every stage holds its marker, and one of the others
REMEDY = "bench run --resume RUN sets it aside and makes that again, and nothing else"


@dataclass
class Verdict:
    """What a look at every byte below a folder found. `made_from` names, by damaged stage, what was made from it."""

    stages: int = 0
    files: int = 0
    bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    unverified: list[Path] = field(default_factory=list)  # stages without hashes, of an older version
    made_from: dict[Path, list[Path]] = field(default_factory=dict)  # damaged, or set aside as such


@contextmanager
def sealed(folder: Path) -> Iterator[None]:
    """Seal what the block wrote into a run's folder, outside its stages, when it has ended well.

    What is damaged under the seal of before is named and set aside first; the block makes it again. Not the settings:
    BenchError when these are not what the run was started with.
    """
    for found in _seal_damage(folder):
        if found.path == folder / CONFIG:
            raise BenchError(
                f"{found}: what the run was started with is not certain any more; correct it by "
                f"{folder / 'protocol.json'}, which holds the same settings, and remove {folder / SEAL}, "
                "or start a new run"
            )
        integrity.say([found], f"set aside as {integrity.set_aside(found.path)}, and made again")
    (folder / SEAL).unlink(missing_ok=True)
    yield
    atomic_write(folder / SEAL, json.dumps({"files": _loose(folder)}, indent=1))


def record_damage(folder: Path) -> list[Damage]:
    """What is wrong with what reports read of a run: its tables, its protocol and its images."""
    stages = _stages(folder / "images")
    return [*_seal_damage(folder), *(found for stage in stages for found in _stage_damage(stage))]


def expect_whole(folder: Path, damage: Sequence[Damage]) -> None:
    """Refuse damaged results; `folder` is the run's."""
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise BenchError(f"damaged: {damage[0]}{more}; {REMEDY.replace('RUN', folder.name)}")


def result_damage(folder: Path, result: Result) -> list[Damage]:
    """What is wrong with a result of a run: a trained iteration or a checkpoint inside one."""
    return _stage_damage(folder / result.name)


def verify(folder: Path, everywhere: Sequence[Path]) -> Verdict:
    """Look at every byte of the finished stages below a folder, and of its record where it is a run's.

    everywhere: the folders in which to look for what was made from a damaged stage.
    """
    verdict = Verdict(damage=_seal_damage(folder))
    broken = [path.parent for path in sorted(folder.rglob(f"*{DAMAGED}*/{MARKER}"))]
    for stage in _stages(folder):
        found = _stage_damage(stage)
        files = _marker(stage).get("files")
        verdict.stages += 1
        verdict.files += len(files or ())
        verdict.bytes += sum(size for size, _ in (files or {}).values())
        verdict.damage += found
        verdict.unverified += [stage] if files is None and not found else []
        broken += [stage] if found else []
    if broken:
        known = {stage: _marker(stage) for root in everywhere for stage in _stages(root)}
        verdict.made_from = {stage: made_from(_marker(stage), known) for stage in broken}
    return verdict


def made_from(marker: dict[str, Any], known: dict[Path, dict[str, Any]]) -> list[Path]:
    """The stages among those known that stand on the one with this marker, at any remove."""
    found: dict[Path, None] = {}
    begun = [marker]
    while begun:
        below = begun.pop()
        for stage, other in known.items():
            if stage not in found and _stands_on(other.get("inputs"), below):
                found[stage] = None
                begun.append(other)
    return sorted(found)


def _stands_on(inputs: Any, below: dict[str, Any]) -> bool:
    """Whether a stage's inputs name another one: by its hash, or, encoded data, by what it was encoded from."""
    if not isinstance(inputs, dict):
        return False
    encoded, data = below.get("inputs"), inputs.get("data")
    if isinstance(encoded, dict) and encoded.get("kind") in ("latents", "prompts") and isinstance(data, dict):
        return all(encoded.get(name, value) == value for name, value in data.items() if name != "precision")
    return "hash" in below and below["hash"] in flat(inputs).values()


def _stages(root: Path) -> Iterator[Path]:
    """The finished stages below a folder, those that have lost their marker too, but for those set aside and those in
    hidden folders."""
    for folder in sorted({path.parent for name in IN_STAGES for path in root.rglob(name)}):
        inside = folder.relative_to(root).parts
        if not any(part.startswith(".") or DAMAGED in part for part in inside) and not (folder / CONFIG).exists():
            yield folder


def _marker(stage: Path) -> dict[str, Any]:
    try:
        marker = json.loads((stage / MARKER).read_text())
        integrity.listed(marker)
    except (OSError, ValueError):
        return {}
    return marker


def _stage_damage(stage: Path) -> list[Damage]:
    marker = _marker(stage)
    if not marker:
        return [Damage(stage / MARKER, "is missing or no marker that can be read")]
    return integrity.damage(stage, integrity.listed(marker))


def _seal_damage(folder: Path) -> list[Damage]:
    try:
        files = integrity.listed(json.loads((folder / SEAL).read_text()))
    except FileNotFoundError:
        return []  # not finished, or of an older version
    except (OSError, ValueError):
        return [Damage(folder / SEAL, "cannot be read")]
    return integrity.damage(folder, files)


def _loose(folder: Path) -> integrity.Files:
    """Size and hash of the files that are in no stage."""
    inside = [stage.relative_to(folder).as_posix() + "/" for stage in _stages(folder)]
    return integrity.manifest(folder, lambda name: name == SEAL or DAMAGED in name or name.startswith(tuple(inside)))
