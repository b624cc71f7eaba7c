"""Commands about what lies on disk."""

from __future__ import annotations

import json

import click

from bench.errors import BenchError


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN|cache]...")
@click.option("--format", "layout", type=click.Choice(["text", "json"]), default="text", show_default=True)
def verify(names: tuple[str, ...], layout: str) -> None:
    """Look at every byte of runs and of the cache (default: of all).

    Damaged files are named, with what was made from them. Nothing is changed.
    """
    from bench.storage import runs
    from bench.storage.shards import readable
    from bench.storage.verify import REMEDY, verify

    wanted = names or (*runs.ids(), *(["cache"] if runs.CACHE.is_dir() else []))
    folders = {name: runs.CACHE if name == "cache" else runs.find(name) for name in wanted}
    verdicts = {name: verify(folder, [runs.CACHE, runs.RUNS]) for name, folder in folders.items()}
    damaged = sum(len(verdict.damage) for verdict in verdicts.values())
    if layout == "json":
        click.echo(
            json.dumps(
                {
                    name: {
                        "stages": verdict.stages,
                        "files": verdict.files,
                        "bytes": verdict.bytes,
                        "damage": [{"path": str(path), "reason": reason} for path, reason in verdict.damage],
                        "unverified": list(map(str, verdict.unverified)),
                        "made_from": {
                            str(stage): list(map(str, others)) for stage, others in verdict.made_from.items()
                        },
                    }
                    for name, verdict in verdicts.items()
                },
                indent=1,
            )
        )
    else:
        for name, verdict in verdicts.items():
            old = f", {len(verdict.unverified)} unverified (made by a version that kept no hashes)"
            click.echo(
                f"{name}: {verdict.stages} stages, {verdict.files} files, {readable(verdict.bytes)}: "
                f"{len(verdict.damage)} damaged{old if verdict.unverified else ''}"
            )
            for found in verdict.damage:
                click.echo(f"  {found}")
            for stage, others in verdict.made_from.items():
                click.echo(f"  made from {stage}: {', '.join(map(str, others)) or 'nothing else'}")
    if damaged:
        raise BenchError(f"{damaged} damaged file(s); {REMEDY}")
