"""The commands about cost and about this machine: plan, perf, doctor. As in cli.py, heavy imports are inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bench.commands.options import as_json
from bench.errors import BenchError, UsageError

measured = click.option(
    "--format", "layout", type=click.Choice(["text", "json", "csv"]), default="text", show_default=True
)
to_file = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a .csv or .json file too, with the device and everything else that was measured.",
)
repeated = click.option(
    "--repeats",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Measurements of each, in turn with those of the baseline.",
)
precise = click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
model = click.option(
    "--model", default="mini", show_default=True, help="mini, random:sd15, a diffusers pipeline folder or a hub id."
)


@click.command()
@click.option("--suite", default="mini", show_default=True, help="A suite of `bench list suites`, or a YAML file.")
@click.option("--method", default="all", show_default=True, help="As for bench run.")
@click.option("--iters", type=click.IntRange(min=1), help="As for bench run.  [default: as the suite lists]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for bench run.")
@click.option("--card", help="What would be used: h100, a100, ...  [default: the one here if it is known, else h100]")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.35,
    show_default=True,
    help="Which part of the card's peak is expected to be used.",
)
@as_json
def plan(
    suite: str,
    method: str,
    iters: int | None,
    settings: tuple[str, ...],
    card: str | None,
    gpus: int,
    mfu: float,
    layout: str,
) -> None:
    """Say what a run would cost: FLOPs, GPU-hours, memory, disk.

    Nothing is trained, sampled or downloaded but small configuration files.
    """
    from bench.costs import cards
    from bench.suites import load_suite

    chosen, named = load_suite(suite, settings), cards.find(card) if card else None
    methods = chosen.entries(method)
    from bench.costs import plan_text
    from bench.costs.plan import plan as planned

    record = plan_text.as_record(planned(chosen, methods, iters), named or _card_here(), mfu, gpus)
    click.echo(json.dumps(record, indent=1) if layout == "json" else plan_text.as_text(record))


def _card_here() -> Any:
    import torch

    from bench.costs import cards

    name = cards.recognise(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return cards.CARDS[name or "h100"]


@click.group()
def perf() -> None:
    """Measure this machine's rates beside a baseline.

    Both are measured in turn in one run, so that their ratio holds on a busy machine too.
    """


@perf.command("train")
@model
@click.option("--method", "methods", multiple=True, default=["spin", "sft"], show_default=True, help="May be repeated.")
@precise
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Pairs (SFT: images) per optimizer step, for both.",
)
@click.option("--micro-batch", type=click.IntRange(min=1), help="Of ours.  [default: what fits the memory]")
@click.option("--baseline-micro-batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Optimizer steps in one measurement."
)
@repeated
@measured
@to_file
def perf_train(
    model: str,
    methods: tuple[str, ...],
    precision: str,
    batch_size: int,
    micro_batch: int | None,
    baseline_micro_batch: int,
    steps: int,
    repeats: int,
    layout: str,
    output: Path | None,
) -> None:
    """Training: beside the published recipe and the FLOP floor.

    The recipe runs VAE and text encoder in every step, one pair at a time, without compilation.
    """
    from bench import registry

    for name in methods:
        registry.check("methods", name)
    _check_output(output)
    from bench.perf import train

    _show(
        train.measure(
            train.Setting(model, methods, precision, batch_size, micro_batch, baseline_micro_batch, steps, repeats)
        ),
        layout,
        output,
    )


@perf.command("sample")
@model
@click.option("--prompts", default="world:test", show_default=True, help="A prompt set or file.")
@click.option("--images", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--guidance", type=float, multiple=True, default=[1.0, 3.0], show_default=True, help="May be repeated.")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--scheduler", default="ddim", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@precise
@repeated
@measured
@to_file
def perf_sample(
    model: str,
    prompts: str,
    images: int,
    guidance: tuple[float, ...],
    steps: int,
    scheduler: str,
    batch_size: int,
    precision: str,
    repeats: int,
    layout: str,
    output: Path | None,
) -> None:
    """Sampling in batches: beside diffusers, one prompt at a time."""
    _check_output(output)
    from bench.perf import sample

    _show(
        sample.measure(
            sample.Setting(model, prompts, images, guidance, steps, scheduler, batch_size, precision, repeats)
        ),
        layout,
        output,
    )


@perf.command("score")
@click.option(
    "--metrics",
    help="Metrics of `bench list metrics`, e.g. pickscore,hpsv2.  [default: the mini suite's but the judge]",
)
@click.option("--weights", default="mini", show_default=True, help="mini or official, for all of them.")
@click.option("--set", "settings", multiple=True, metavar="METRIC.KEY=VALUE", help="As for bench score.")
@click.option("--images", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@repeated
@measured
@to_file
def perf_score(
    metrics: str | None,
    weights: str,
    settings: tuple[str, ...],
    images: int,
    device: str,
    repeats: int,
    layout: str,
    output: Path | None,
) -> None:
    """Scoring in batches: beside one image at a time.

    One row a scorer, and one for all of them together.
    """
    from bench import registry
    from bench.scoring.score import DEFAULT, metric_options

    names = metrics.split(",") if metrics else DEFAULT
    for name in names:
        registry.check("metrics", name)
    _check_output(output)
    from bench.perf import score

    _show(
        score.measure(score.Setting(tuple(names), metric_options(names, weights, settings), images, repeats, device)),
        layout,
        output,
    )


def _check_output(path: Path | None) -> None:
    """Refuse a file name before the measurement rather than after."""
    if path and path.suffix not in (".csv", ".json"):
        raise UsageError(f"-o {path}: measurements are written as .csv or .json")


def _show(record: Mapping[str, Any], layout: str, output: Path | None) -> None:
    from bench import perf

    if output:
        perf.write(record, output)
    click.echo(perf.render(record, layout))


@click.command()
@click.option("--suite", default="mini", show_default=True, help="A suite of `bench list suites`, or a YAML file.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for bench run.")
@click.option(
    "--verify",
    is_flag=True,
    help="Instead, score the examples that the scorers' authors published with the real weights, where those are.",
)
@click.option(
    "--examples",
    type=click.Path(file_okay=False, path_type=Path),
    help="With --verify: a folder of the examples' pictures.",
)
@click.option("--device", help="With --verify.  [default: cpu]")
@as_json
def doctor(
    suite: str, settings: tuple[str, ...], verify: bool, examples: Path | None, device: str | None, layout: str
) -> None:
    """Say what is installed, and what a suite needs and lacks.

    Exit status 1 when a file, disk space or memory is missing, or when an example was not verified. Nothing is
    downloaded.
    """
    if verify:
        _verify(examples, device or "cpu", layout)
        return
    if examples or device:
        raise UsageError(f"--{'examples' if examples else 'device'} goes with --verify")
    from bench.suites import load_suite

    chosen = load_suite(suite, settings)
    from bench.commands import doctor as practice

    found = practice.examine(chosen)
    click.echo(json.dumps(found.record(), indent=1) if layout == "json" else practice.as_text(found))
    if found.problems:
        raise BenchError(f"suite {found.suite}: {'; '.join(found.problems)}")


def _verify(folder: Path | None, device: str, layout: str) -> None:
    from bench.scoring import verify_scorers

    if folder and not folder.is_dir():
        raise UsageError(f"--examples {folder}: no such folder")
    verdicts = list(verify_scorers.verify(folder, device))
    if layout == "json":
        click.echo(json.dumps([one.record() for one in verdicts], indent=1))
    else:
        click.echo(verify_scorers.as_text(verdicts))
    said = {"differs": "differs", "missing": "not verified"}
    failed = [f"{one.metric} {said[one.state]}" for one in verdicts if one.state in said]
    if failed:
        raise BenchError(f"doctor --verify: {', '.join(failed)}")
