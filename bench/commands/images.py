"""The commands about images and models outside a run: score, sample, export. As in cli.py, heavy imports are inside."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bench.commands.options import as_json
from bench.errors import BenchError, UsageError


@click.command()
@click.argument("images", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--prompts",
    type=click.Path(dir_okay=False, path_type=Path),
    help="csv, jsonl or parquet with file_name and prompt, or txt with one prompt a line for the images in "
    "order of their names.  [default: metadata.jsonl or the like in the folder]",
)
@click.option(
    "--metrics",
    help="Metrics of `bench list metrics`, e.g. pickscore,hpsv2.  [default: the mini suite's but the judge]",
)
@click.option("--weights", help="mini or official, for all of them.  [default: mini, with --backend official official]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="METRIC.KEY=VALUE",
    help="A setting of one metric, e.g. --set hpsv2.antialias=false. May be repeated.",
)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--backend",
    type=click.Choice(["ours", "official"]),
    default="ours",
    show_default=True,
    help="official: the hpsv2 and image-reward packages themselves beside ours, and the largest difference.",
)
@click.option("--official-python", metavar="PATH", help="The Python of the environment that has these packages.")
@click.option("--strict", is_flag=True, help="Fail when an image or a prompt has a problem.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A .parquet or .csv file.")
@as_json
def score(
    images: Path,
    prompts: Path | None,
    metrics: str | None,
    weights: str | None,
    settings: tuple[str, ...],
    device: str,
    backend: str,
    official_python: str | None,
    strict: bool,
    output: Path | None,
    layout: str,
) -> None:
    """Score a folder of images against their prompts.

    What is broken is named and left without scores. Scores of before are not computed again.
    """
    from bench import registry
    from bench.scoring import official
    from bench.scoring import score as scoring
    from bench.scoring.named import beyond_their_world
    from bench.scoring.pairing import collect
    from bench.storage import runs

    beside = backend == "official"
    default = official.DEFAULT if beside else scoring.DEFAULT
    names = metrics.split(",") if metrics else list(default)
    for name in names:
        registry.check("metrics", name)
    if output and output.suffix not in (".parquet", ".csv"):
        raise UsageError(f"-o {output}: scores are written as .parquet or .csv")
    if official_python and not beside:
        raise UsageError("--official-python goes with --backend official")
    options = scoring.metric_options(names, weights or ("official" if beside else "mini"), settings)
    if beside:
        official.require(names, official_python)
    table, protocol = scoring.score_folder(
        collect(images, prompts), names, options, device, runs.CACHE / "scores.sqlite"
    )
    if beside:
        protocol["official"] = official.compare(images, table, names, options, device, official_python)
    click.echo(scoring.truncation(protocol), err=True)
    if warning := beyond_their_world(table.loc[table["problem"] == "", "prompt"], protocol["metrics"]):
        click.echo(warning, err=True)
    if output:
        scoring.write(table, protocol, output)
    if layout == "json":
        click.echo(json.dumps({"protocol": protocol, "scores": json.loads(table.to_json(orient="records"))}))
    else:
        click.echo(scoring.summary(table, names, protocol))
        if beside:
            click.echo(official.summary(protocol["official"]))
    troubled = int((table["problem"] != "").sum())
    if strict and troubled:
        raise BenchError(f"{troubled} of {len(table)} images were not scored (--strict)")


@click.command()
@click.argument("name", metavar="RUN")
@click.option("--iter", "iteration", type=int, help="Which iteration.  [default: the last]")
@click.option("--step", type=int, help="Which of its checkpoints, by steps within it.  [default: its end]")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder that does not exist yet.",
)
def export(name: str, iteration: int | None, step: int | None, output: Path) -> None:
    """Write a trained model as a diffusers pipeline folder.

    The folder loads whole with StableDiffusionPipeline.from_pretrained and has a model card.
    """
    from bench.commands.export import export_run

    click.echo(str(export_run(name, iteration, output, step)))


@click.command()
@click.option("--model", default="mini", show_default=True, help="mini, a diffusers pipeline folder or a hub id.")
@click.option("--prompts", required=True, help="A txt, csv, jsonl or parquet file, or a set of `bench list prompts`.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first prompts.")
@click.option(
    "--guidance",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="1 samples the model itself; below 1 leans towards the empty prompt, where diffusers' pipelines "
    "switch guidance off.",
)
@click.option("--steps", type=click.IntRange(min=1, max=1000), default=20, show_default=True)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=[5775709],
    show_default=True,
    help="May be repeated: one image a prompt for each.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=Path))
def sample(
    model: str,
    prompts: str,
    limit: int | None,
    guidance: float,
    steps: int,
    seeds: tuple[int, ...],
    batch_size: int,
    output: Path,
) -> None:
    """Sample images for prompts into a folder.

    Its prompts.csv says which file belongs to which prompt.
    """
    from bench.data import load_prompts

    chosen = load_prompts(prompts, limit)
    from bench.commands.export import sample_folder

    sample_folder(model, chosen, output, guidance=guidance, steps=steps, seeds=seeds, batch_size=batch_size)
    click.echo(str(output))
