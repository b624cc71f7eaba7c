"""The command that compares models as they are. As in cli.py, heavy imports are inside."""

from __future__ import annotations

import re

import click

from bench.commands.options import as_json
from bench.commands.run import compare, execute_all
from bench.errors import UsageError


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL...")
@click.option("--suite", default="mini", show_default=True, help="A suite of `bench list suites`, or a YAML file.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the suite, e.g. --set evaluation.steps=10. May be repeated.",
)
@as_json
def evaluate(models: tuple[str, ...], suite: str, settings: tuple[str, ...], layout: str) -> None:
    """Sample and score models on a suite's prompts, without training.

    MODEL is a pipeline folder or hub name (OWNER/NAME), a UNet alone, a .safetensors file, lora:FILE or lora:FILE@0.8
    for a LoRA, or RUN:ITERATION for a result of a run. NAME is what tables call it. Each becomes a run of its own;
    what was cut short goes on with bench run --resume.
    """
    from bench.suites import load_suite

    given = dict(_named(model) for model in models)
    if len(given) < len(models):
        raise UsageError(f"two models of one name: {', '.join(given)} are {len(models)} models; write NAME=MODEL")
    chosen = load_suite(suite, settings)
    if taken := [name for name in given if name in chosen.models]:
        raise UsageError(f"{taken[0]}: the suite has a model of this name; write another NAME=MODEL")
    chosen = chosen.checked(models={**chosen.models, **given})
    plans = [{"method": name, "suite": chosen, "seed": 0, "iterations": 1} for name in given]
    compare(execute_all(chosen, plans), layout)


def _named(model: str) -> tuple[str, str]:
    """NAME and MODEL of one argument; without a NAME what its last part says, as far as a folder can be called so."""
    name, equals, spec = model.partition("=")
    if equals and name and spec:
        return name, spec
    last = re.split(r"[/:]", model.rstrip("/"))
    words = last[-1] if not last[-1].isdigit() or len(last) == 1 else "-".join(last[-2:])
    words = re.sub(r"\.(safetensors|bin|pt|ckpt)$", "", words)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", words).strip("-_")[:64] or "model", model
