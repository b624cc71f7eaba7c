"""`python -m bench.mini` trains every network of the embedded default from nothing and puts it into the package.

Stages in order: vae, denoiser, judge, judge2, samples, clip, pickscore, aesthetic, hpsv2, imagereward. Each is skipped
when its result is there for the same settings, and goes on from its checkpoint when it was killed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.data import drawings, load_prompts
from bench.mini import MINI_WEIGHTS, denoiser, rankers, scorers, vae
from bench.mini.judge import Judge
from bench.mini.judge_training import train_judge
from bench.mini.pools import Pool, rendered
from bench.mini.text import build_tokenizer
from bench.models import load_pipeline
from bench.sampling.sample import sample
from bench.storage.cache import encode_images
from bench.storage.stages import Stage

SEED = 0
PLAN: dict[str, dict[str, Any]] = {
    "vae": {"steps": 5500, "images": 24_000},
    "denoiser": {"cycles": [(5000, 1e-3), (3000, 7e-4)], "images": 40_000},
    "judge": {"steps": 4000, "pool": 30_000},
    "judge2": {"steps": 3500, "pool": 30_000, "seed": 100, "trunk": "convnext", "half": True},
    "samples": {"prompts": 400},
    "clip": {"steps": 2500, "pool": 24_000},
    "pickscore": {"steps": 3000, "pairs": 20_000},
    "aesthetic": {"steps": 3000, "pool": 12_000},
    "hpsv2": {"steps": 4000, "rankings": 9000},
    "imagereward": {"steps": 4000, "pairs": 20_000},
}
NEEDS = {
    "vae": (),
    "denoiser": ("vae",),
    "judge": ("vae",),
    "judge2": ("vae",),
    "samples": ("denoiser", "judge"),
    "clip": ("vae",),
    "pickscore": ("clip", "samples"),
    "aesthetic": ("clip", "samples"),
    "hpsv2": ("clip", "samples"),
    "imagereward": ("clip", "samples"),
}
SCORERS: dict[str, Callable[..., None]] = {
    "pickscore": scorers.train_pickscore,
    "aesthetic": scorers.train_aesthetic,
    "hpsv2": rankers.train_hpsv2,
    "imagereward": rankers.train_imagereward,
}


@dataclass
class Builder:
    """Where things are built (`work`), where the finished weights go (`out`), and on what device."""

    work: Path
    out: Path
    device: str

    def stage(self, name: str) -> Stage:
        """The folder of one result; its hash covers its own plan and those of all it was made from."""
        inputs = {"seed": SEED, "plan": PLAN[name], "needs": {need: self.stage(need).hash for need in NEEDS[name]}}
        return Stage(self.work / name, inputs)

    def build(self, name: str) -> None:
        stage = self.stage(name)
        if stage.done:
            click.echo(f"{name}: done")
            return
        missing = [need for need in NEEDS[name] if not self.stage(need).done]
        if missing:
            raise click.ClickException(f"{name} needs {', '.join(missing)} first")
        make: Callable[[Path], None] = partial(self.scorer, name) if name in SCORERS else getattr(self, name)
        with stage.fresh() as folder:
            make(folder)

    def checkpoint(self, name: str) -> Path:
        return self.work / "checkpoints" / f"{name}.pt"

    def vae(self, folder: Path) -> None:
        third = PLAN["vae"]["images"] // 3
        items = [make(SEED + 7, index) for make in (drawings.labelled, drawings.corpus) for index in range(third)]
        items += [drawings.pair(SEED + 7, index).winner for index in range(third)]
        vae.train(
            rendered(items), folder, self.checkpoint("vae"), seed=SEED, steps=PLAN["vae"]["steps"], device=self.device
        )

    def load_vae(self):
        return vae.AutoencoderKL.from_pretrained(self.stage("vae").directory).to(self.device).eval()

    def roundtrip(self, images: np.ndarray) -> np.ndarray:
        return vae.roundtrip(self.load_vae(), images)

    def denoiser(self, folder: Path) -> None:
        items = [drawings.corpus(SEED, index) for index in range(PLAN["denoiser"]["images"])]
        encoder = self.load_vae().to(memory_format=torch.channels_last)
        with torch.autocast(self.device, torch.bfloat16):
            latents = encode_images(
                encoder, lambda rows: drawings.render(items[row] for row in rows), len(items), batch_size=128
            )
        tokenizer = build_tokenizer()
        model = denoiser.train(
            latents,
            [item.caption for item in items],
            tokenizer,
            self.work / "checkpoints",
            seed=SEED,
            cycles=PLAN["denoiser"]["cycles"],
            device=self.device,
        )
        denoiser.assemble(model.cpu(), self.load_vae().cpu(), tokenizer, folder)

    def judge(self, folder: Path) -> None:
        train_judge(
            folder, self.checkpoint("judge"), seed=SEED, roundtrip=self.roundtrip, device=self.device, **PLAN["judge"]
        )

    def judge2(self, folder: Path) -> None:
        """The second judge, of other drawings and another architecture; nothing is ever trained on what it says."""
        train_judge(
            folder,
            self.checkpoint("judge2"),
            measured_on=SEED + 1,
            roundtrip=self.roundtrip,
            device=self.device,
            **PLAN["judge2"],
        )

    def samples(self, folder: Path) -> None:
        """Generated pairs for the scorers (rows 2k and 2k + 1 share a prompt), rated by the judge."""
        pipe = load_pipeline(self.stage("denoiser").directory, self.device)
        judge = Judge.load(self.stage("judge").directory, self.device)
        prompts = load_prompts("world:train", PLAN["samples"]["prompts"]).prompts
        images = np.concatenate(
            [
                sample(pipe, prompts, guidance=guidance, steps=10, seeds=[SEED, SEED + 1], batch_size=100)
                for guidance in (1.0, 3.0)
            ]
        )
        captions = [prompt for _ in range(2) for prompt in prompts for _ in range(2)]
        scores = judge.score(images, captions)
        np.savez(
            folder / "samples.npz",
            images=images,
            captions=np.array(captions),
            utility=scores["utility"],
            aesthetics=scores["aesthetics"],
        )

    def load_samples(self) -> Pool:
        stored = np.load(self.stage("samples").directory / "samples.npz")
        captions = stored["captions"].tolist()
        return Pool(stored["images"], captions, stored["utility"], stored["aesthetics"], judged=len(captions))

    def clip(self, folder: Path) -> None:
        scorers.train_clip(
            folder,
            self.checkpoint("clip"),
            build_tokenizer(),
            seed=SEED,
            roundtrip=self.roundtrip,
            device=self.device,
            **PLAN["clip"],
        )

    def scorer(self, name: str, folder: Path) -> None:
        """What is taught from the miniature CLIP, drawings and rated samples."""
        SCORERS[name](
            folder,
            self.checkpoint(name),
            self.stage("clip").directory,
            seed=SEED,
            roundtrip=self.roundtrip,
            samples=self.load_samples(),
            device=self.device,
            **PLAN[name],
        )

    def install(self) -> None:
        """Copy what is finished to where the package looks for it."""
        for name in ("denoiser", "judge", "judge2", "clip", "pickscore", "aesthetic", "hpsv2", "imagereward"):
            stage = self.stage(name)
            if stage.done:
                target = self.out / {"denoiser": "pipeline"}.get(name, name)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(stage.directory, target, ignore=shutil.ignore_patterns("stage.json"))
                click.echo(f"installed {target}")


@click.command()
@click.argument("stages", nargs=-1)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("results/build"),
    show_default=True,
    help="Where checkpoints and finished stages are kept.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=MINI_WEIGHTS,
    show_default=True,
    help="Where finished weights are installed.",
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--install/--no-install", default=True, help="Copy finished weights to --out at the end.")
def main(stages: tuple[str, ...], work: Path, out: Path, device: str, install: bool) -> None:
    """Build STAGES (all by default) of the embedded default: about three hours on two CPU cores."""
    unknown = [name for name in stages if name not in PLAN]
    if unknown:
        raise click.UsageError(f"unknown stage {unknown[0]}; stages are {', '.join(PLAN)}")
    builder = Builder(work, out, device)
    for name in stages or PLAN:
        builder.build(name)
    if install:
        builder.install()


if __name__ == "__main__":
    main()
