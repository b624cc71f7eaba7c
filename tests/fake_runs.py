"""Synthetic runs on disk, laid out exactly as real ones, with effects that the tests know."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from bench import registry

HOSTILE = (
    "<script>fetch('https://evil.example/x')</script>",
    "a \"quoted\" & 'single' <img src=x onerror=alert(1)>",
    "a red circle 🎨🔴 above a 👩‍🚀",
    "דג כחול מעל ריבוע אדום",
    "long " * 400,
)
TITLES = {"sft": "SFT", "diffusion_dpo": "Diffusion-DPO", "spin": "SPIN-Diffusion"}
EFFECTS = {"base": (0.0,), "sft": (0.04,), "diffusion_dpo": (0.03,), "spin": (0.04, 0.06, 0.065)}
# metric -> (mean, spread between prompts, spread of an image, weight of the effect)
METRICS = {
    "pickscore": (21.0, 1.2, 0.4, 8.0),
    "clip": (0.33, 0.03, 0.01, -0.05),
    "aesthetic": (5.4, 0.4, 0.2, 3.0),
    "judge/utility": (0.80, 0.10, 0.05, 1.0),
    "judge/alignment": (0.85, 0.10, 0.05, 0.6),
    "judge/aesthetics": (0.75, 0.08, 0.04, 1.4),
    "judge/fade": (0.12, 0.05, 0.03, -0.8),
}


def prompt_id(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def prompts(count: int) -> list[str]:
    """`count` prompts, the first five of them hostile."""
    plain = [
        f"a {size} {colour} {shape} number {i}"
        for i, (size, colour, shape) in enumerate(
            (s, c, o)
            for s in ("small", "large")
            for c in ("red", "blue", "green", "amber")
            for o in ("circle", "square", "star")
        )
    ]
    texts = [*HOSTILE, *plain, *(f"scene number {i}" for i in range(count))]
    return texts[:count]


def scores(
    method: str,
    seed: int,
    texts: list[str],
    prompt_sets: tuple[str, ...],
    guidance: tuple[float, ...],
    image_seeds: tuple[int, ...],
    metrics: dict[str, tuple],
) -> pd.DataFrame:
    """The long table of one run, its base rows included; base rows are equal in every run."""
    frames = []
    ids = [prompt_id(text) for text in texts]
    for name in ("base", method):
        for step, effect in enumerate(EFFECTS[name]):
            iteration = 0 if name == "base" else step + 1
            train_seed = 0 if name == "base" else seed
            own = np.random.default_rng([len(name), iteration, train_seed])
            shift = 0.0 if name == "base" else 0.004 * own.standard_normal()
            for group, (prompt_set, scale) in enumerate((p, g) for p in prompt_sets for g in guidance):
                common = np.random.default_rng(group).standard_normal((len(ids), 1))
                for metric, (mean, spread, noise, weight) in metrics.items():
                    each = own.standard_normal((len(ids), len(image_seeds)))
                    value = mean + spread * common + noise * each + weight * (effect + shift)
                    frames.append(
                        pd.DataFrame(
                            {
                                "method": name,
                                "iteration": iteration,
                                "prompt_set": prompt_set,
                                "prompt_id": np.repeat(ids, len(image_seeds)),
                                "seed": np.tile(image_seeds, len(ids)),
                                "guidance": scale,
                                "metric": metric,
                                "value": value.ravel().astype(np.float32),
                            }
                        )
                    )
    return pd.concat(frames, ignore_index=True)


def history(method: str, iterations: int, steps: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(len(method))
    rows = []
    for iteration in range(1, iterations + 1):
        for step in range(10, steps + 1, 10):
            done = step / steps
            row = {
                "method": method,
                "iteration": iteration,
                "step": step,
                "loss": 0.69 - 0.2 * done,
                "grad_norm": 0.5,
                "lr": 1e-5,
                "pairs_per_s": 100.0,
            }
            if method != "sft":
                row |= {
                    "implicit_accuracy": 0.5 + 0.3 * done + 0.03 * rng.standard_normal(),
                    "winner_drift": -0.002 * done,
                    "loser_drift": 0.004 * done,
                }
            rows.append(row)
    return pd.DataFrame(rows)


def suite(prompt_sets: tuple[str, ...], guidance: tuple[float, ...], image_seeds: tuple[int, ...]) -> dict:
    return {
        "name": "mini",
        "description": "the drawn world",
        "model": {"weights": "mini", "dtype": "fp32"},
        "data": {"pairs": "world", "size": 2000, "seed": 0},
        "train": {"batch_size": 32, "micro_batch": 16, "weight_decay": 0.01, "log_every": 10},
        "opponent": {"guidance": 1.0, "steps": 20, "scheduler": "ddim", "batch_size": 32},
        "evaluation": {
            "prompt_sets": {name: {"prompts": f"world:{name}", "limit": None} for name in prompt_sets},
            "guidance": list(guidance),
            "steps": 20,
            "scheduler": "ddim",
            "seeds": list(image_seeds),
            "protocol": "mean",
            "batch_size": 32,
        },
        "metrics": ["pickscore", "clip", "aesthetic", "judge"],
        "metric_options": {},
        "methods": {
            "sft": {"iterations": [{"steps": 200, "lr": 1e-5}]},
            "diffusion_dpo": {"iterations": [{"steps": 200, "lr": 1e-5, "beta": 2000}]},
            "spin": {"iterations": [{"steps": 200, "lr": 1e-5, "beta": 2000}] * 3},
        },
    }


def cost(iterations: int, self_play: bool) -> dict:
    stages = [{"name": "cache", "seconds": 9.0, "images": 2000, "flops": 1e12}]
    for k in range(1, iterations + 1):
        if self_play:
            stages.append({"name": f"iter{k}/opponent", "seconds": 60.0, "images": 2000, "flops": 4e13})
        stages.append({"name": f"iter{k}/train", "seconds": 100.0, "pairs": 6400, "flops": 2e13})
        stages.append({"name": f"iter{k}/evaluate", "seconds": 30.0, "images": 500, "flops": 1e13})
    return {
        "stages": stages,
        "total_seconds": sum(s["seconds"] for s in stages),
        "train_flops": 2e13 * iterations,
        "sample_flops": 4e13 * iterations,
        "pairs_seen": 6400 * iterations,
        "device": "2 CPU cores",
    }


def draw(folder: Path, text: str, seed: int, strength: float) -> None:
    """A small picture that depends on prompt, seed and model."""
    rng = np.random.default_rng(int(prompt_id(text), 16) % 2**32 + seed)
    image = np.full((64, 64, 3), rng.integers(180, 250, 3), np.float64)
    rows, columns = np.mgrid[:64, :64]
    for _ in range(2):
        centre, radius = rng.integers(16, 48, 2), rng.integers(8, 16)
        disc = np.hypot(rows - centre[0], columns - centre[1]) < radius
        image[disc] = rng.integers(0, 255, 3)
    image += (1 - strength) * 25 * rng.standard_normal(image.shape)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{prompt_id(text)}-{seed}.png")


def write_run(
    root: Path,
    method: str = "spin",
    seed: int = 0,
    *,
    count: int = 24,
    prompt_sets: tuple[str, ...] = ("test",),
    guidance: tuple[float, ...] = (1.0, 3.0),
    image_seeds: tuple[int, ...] = (5775709,),
    images: int = 0,
    created: str = "2026-11-23T10:00:00",
    change: dict | None = None,
    metrics: dict[str, tuple] | None = None,
    name: str | None = None,
) -> Path:
    """Write one finished run; `images` prompts get pictures; `change` overrides suite sections."""
    metrics = METRICS if metrics is None else metrics
    folder = root / (name or f"20261123-100000-{method}-s{seed}")
    folder.mkdir(parents=True)
    texts = prompts(count)
    protocol = {
        "run": folder.name,
        "suite": {**suite(prompt_sets, guidance, image_seeds), **(change or {})},
        "method": method,
        "method_title": TITLES[method],
        "seed": seed,
        "model": {"weights": "mini", "fingerprint": "abc"},
        "versions": {"torch": "2.13.0"},
        "git_commit": "0" * 40,
        "created": created,
        "metrics": {
            m: {**registry.metric(m).description(), "version": "mini", "scale": "cosine"}
            for m in dict.fromkeys(column.partition("/")[0] for column in metrics)
        },
        "prompt_sets": {p: {"source": f"world:{p}", "count": count} for p in prompt_sets},
    }
    (folder / "protocol.json").write_text(json.dumps(protocol))
    iterations = len(EFFECTS[method])
    (folder / "cost.json").write_text(json.dumps(cost(iterations, method == "spin")))
    table = scores(method, seed, texts, prompt_sets, guidance, image_seeds, metrics)
    table.insert(0, "run", folder.name)
    table.to_parquet(folder / "scores.parquet")
    history(method, iterations).to_parquet(folder / "history.parquet")
    for prompt_set in prompt_sets:
        (folder / "images" / prompt_set).mkdir(parents=True)
        listing = json.dumps({prompt_id(text): text for text in texts}, ensure_ascii=False)
        (folder / "images" / prompt_set / "prompts.json").write_text(listing, encoding="utf-8")
        for scale in guidance:
            for k in range(iterations + 1 if images else 0):
                place = folder / "images" / prompt_set / f"g{scale:g}" / f"iter{k}"
                place.mkdir(parents=True)
                for text, seed in itertools.product(texts[:images], image_seeds):
                    draw(place, text, seed, 0.2 + 0.25 * k)
    return folder


def write_all(root: Path, seeds: tuple[int, ...] = (0,), **options) -> Path:
    """SFT, Diffusion-DPO and SPIN for each training seed."""
    for method in TITLES:
        for seed in seeds:
            write_run(root, method, seed, **options)
    return root
