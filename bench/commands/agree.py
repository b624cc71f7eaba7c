"""The command that compares scorers with people. As in cli.py, heavy imports are inside."""

from __future__ import annotations

from pathlib import Path

import click

from bench.errors import UsageError


@click.command()
@click.argument("dataset")
@click.option("--metrics", help="Metrics of `bench list metrics`.  [default: as for bench score]")
@click.option("--weights", default="mini", show_default=True, help="mini or official, for all of them.")
@click.option(
    "--set", "settings", multiple=True, metavar="METRIC.KEY=VALUE", help="A setting of one metric, as for bench score."
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder or archive of the pictures of hpdv2 and imagereward.  [default: found beside the file]",
)
@click.option(
    "--tune",
    metavar="DATASET",
    help="Pairs on which each scorer's tie threshold is tuned.  [default: Pick-a-Pic's validation split, where DATASET "
    "is its test split]",
)
@click.option("--limit", type=click.IntRange(min=2), help="Only the first judgements.  [default: all; of world 500]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--format", "layout", type=click.Choice(["text", "csv", "json"]), default="text", show_default=True)
def agree(
    dataset: str,
    metrics: str | None,
    weights: str,
    settings: tuple[str, ...],
    images: Path | None,
    tune: str | None,
    limit: int | None,
    device: str,
    layout: str,
) -> None:
    """How often each scorer prefers what people prefer, with intervals, beside the published accuracies.

    DATASET is world[:SPLIT] (the drawn world's noisy people), pickapic:SOURCE[#SPLIT] (shards in a folder or on the
    hub), hpdv2:SOURCE or imagereward:FILE (their json files, with the pictures beside).
    """
    from bench import registry
    from bench.data.preferences import load_preferences
    from bench.scoring import agree as agreeing
    from bench.scoring import score as scoring
    from bench.scoring.evaluate import Scorers
    from bench.storage import runs

    names = metrics.split(",") if metrics else list(scoring.DEFAULT)
    for name in names:
        registry.check("metrics", name)
    if len(set(names)) < len(names):
        raise UsageError(f"--metrics {metrics}: a metric is named twice")
    options = scoring.metric_options(names, weights, settings)
    preferences = load_preferences(dataset, limit=limit, images=images, cache=runs.CACHE)
    tune = tune or agreeing.tuning_split(preferences)
    tuning = load_preferences(tune, limit=limit, cache=runs.CACHE) if tune else None
    found = agreeing.agreement(preferences, Scorers.load(names, options, device), tuning)
    if found.warning:
        click.echo(found.warning, err=True)
    click.echo(agreeing.render(found, layout))
