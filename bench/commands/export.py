"""Models and images for use elsewhere: whole diffusers pipelines with a model card, folders of samples."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import yaml

from bench import models
from bench.data import PromptSet
from bench.errors import BenchError, UsageError
from bench.sampling.sample import sample
from bench.scoring import evaluate
from bench.storage import runs, verify
from bench.storage.runs import Result, Run
from bench.storage.stages import atomic_write, temporary


def export_run(name: str, iteration: int | None, output: Path, step: int | None = None) -> Path:
    """Write a result of a run as a pipeline folder with a model card.

    By default that is the end of an iteration, and of the last one trained; `step` names a checkpoint inside it.
    """
    run = runs.load(name)
    if run.method in run.suite.models:
        raise UsageError(f"{run.id} trained nothing: {run.method} is {run.suite.models[run.method]}, as it was found")
    chosen = run.trained(iteration, step)
    verify.expect_whole(run.folder, verify.result_damage(run.folder, chosen))
    with new_folder(output) as folder:
        pipe = models.load_pipeline(run.suite.model.weights)
        pipe.unet = models.load_unet(run.folder / chosen.name / "unet")
        pipe.save_pretrained(folder)
        atomic_write(folder / "README.md", model_card(run, chosen))
    return output


def sample_folder(
    model: str, prompts: PromptSet, output: Path, *, guidance: float, steps: int, seeds: Sequence[int], batch_size: int
) -> None:
    """Sample every prompt with every seed into `<prompt_id>-<seed>.png`, listed in prompts.csv."""
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seed: a seed given twice makes the same image twice: {', '.join(map(str, seeds))}")
    pipe = models.load_pipeline(model)
    with new_folder(output) as folder:
        pixels = sample(
            pipe, prompts.prompts, guidance=guidance, steps=steps, seeds=seeds, batch_size=batch_size, name=model
        )
        paths = evaluate.image_paths(folder, prompts.ids, seeds)
        evaluate.write_images(paths, pixels)
        shown = evaluate.blank(pixels)
        if shown.any():
            texts = [prompt for prompt in prompts.prompts for _ in seeds]
            click.echo(
                "warning: " + evaluate.blank_warning(model, [texts[row] for row in np.flatnonzero(shown)], len(texts)),
                err=True,
            )
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["file_name", "prompt"])
        names = [path.name for path in paths]
        writer.writerows(zip(names, [prompt for prompt in prompts.prompts for _ in seeds], strict=True))
        atomic_write(folder / "prompts.csv", table.getvalue())


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that appears whole at `output`; an existing one with anything in it is left alone."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not empty; name a new folder")
    unfinished = temporary(output)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(unfinished, output)
    except OSError as error:
        raise BenchError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def model_card(run: Run, result: Result) -> str:
    """A model card: what was trained on what and how, what it scores against the base, and how to use it."""
    iteration = result.iteration
    inside = "" if result.end else f", after {result.within} steps of it"
    title = f"{run.title}, iteration {iteration}{inside}, suite {run.suite.name}"
    suite = run.suite
    evaluation, opponent, train = suite.evaluation, suite.opponents(run.method), suite.training(run.method)
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": suite.model.weights,
        "tags": ["diffusion-align-bench", run.method],
    }
    options, settings = suite.resolved(run.method, iteration), suite.schedule(run.method, iteration)
    columns = ["iteration", "steps", "learning rate", *options[0]]
    schedule = [
        [k, each.steps, f"{each.lr:g}", *own.values()]
        for k, (each, own) in enumerate(zip(settings, options, strict=True), 1)
    ]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).strip(),
            "---",
            "",
            f"# {title}",
            "",
            f"The UNet of run `{run.id}`, iteration {iteration} of {run.iterations}{inside}, in the pipeline it was "
            "tuned from.",
            "",
            "```python",
            "from diffusers import StableDiffusionPipeline",
            "",
            'pipe = StableDiffusionPipeline.from_pretrained("path/to/this/folder")',
            f'image = pipe("a prompt", guidance_scale={evaluation.guidance[-1]:g}, '
            f"num_inference_steps={evaluation.steps}).images[0]",
            "```",
            "",
            "## Training",
            "",
            f"- base model: `{suite.model.weights}`",
            f"- data: {suite.data.size or 'all'} pairs of `{suite.data.pairs}` (seed {suite.data.seed})",
            f"- training seed {run.seed}",
            f"- batch of {train.batch_size}, AdamW, weight decay {train.weight_decay:g}, "
            f"{train.warmup_steps} warm-up steps, gradients clipped at {train.max_grad_norm:g}",
            f"- opponent (self-play only): {opponent.steps} {opponent.scheduler} steps, guidance {opponent.guidance:g}",
            "",
            *(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *schedule)),
            "",
            "## Protocol",
            "",
            f"- prompts: {', '.join(f'{name} (`{p.prompts}`)' for name, p in evaluation.prompt_sets.items())}",
            f"- sampling: {evaluation.steps} {evaluation.scheduler} steps, guidance "
            f"{', '.join(f'{scale:g}' for scale in evaluation.guidance)}, seeds "
            f"{', '.join(map(str, evaluation.seeds))}, protocol `{evaluation.protocol}`",
            "",
            "## Scores",
            "",
            scores(run, result),
            "",
        ]
    )


def scores(run: Run, result: Result) -> str:
    """One result beside the base model: what is clear, and the scores with 95 % intervals, in Markdown."""
    from bench.reports import layouts, load, tables, verdict

    if not (run.folder / "scores.parquet").exists():
        return "Not evaluated."
    loaded = load.load_runs([run.folder])
    kept = {label: model for label, model in loaded.models.items() if model in (runs.BASE, result)}
    beside = replace(loaded, models=kept, scores=loaded.scores[loaded.scores["model"].isin(kept)])
    clear = [
        f"- {one.group[0]} at guidance {one.group[1]:g}: {one.statement} ({one.title})"
        for one in verdict.verdicts(beside)
    ]
    return "\n".join([*map(layouts.markdown_text, clear), "", tables.render(tables.table(beside), "md").strip()])
