"""`python -m bench.mini.warrant RUN...`: how far the judge can be trusted on generated images.

Nobody knows what a generated image is worth. What can be known is whether readers that have nothing in common agree:
the judge, a second judge of other architecture and drawings that nothing was ever trained on, and measures of pixels
that need no network. This reads the images of finished runs by all three and writes one tidy table: what each reads of
every model, how far they agree image by image, and whether they put the models in the same order. Drawings with known
worth, as they are and as the autoencoder shows them, stand first: there all three are compared with the truth.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import click
import numpy as np
import pandas as pd
from diffusers import AutoencoderKL
from scipy.stats import rankdata

from bench.data import world
from bench.data.drawings import Drawing
from bench.errors import BenchError, UsageError
from bench.mini import MINI_WEIGHTS, pixels, vae
from bench.mini.judge import SCORES, Judge, SecondJudge, parse, rated, scenes
from bench.mini.pools import rendered, rough_pair
from bench.reports import stats
from bench.reports.agreement import correlation, spearman
from bench.reports.uncertainty import LEVEL
from bench.runtime.progress import track
from bench.scoring.evaluate import read_images

READERS = ("judge", "judge2", "pixels")
TRUTH = "truth"  # the reader of drawings, which knows
QUANTITIES = (*SCORES, "background", "colours")
HELD_OUT = ("held-out", 1000, 200)  # name, seed and number of the pairs of drawings
ALL, ORDER = "all", "order"  # in place of a model: the images of all models, and the models' means
RESAMPLES, FEWEST, WORK = 500, 100, 8_000_000  # of more rows fewer resamples, about WORK rows in all
SEEN = 0.25  # share of its images that two readers can read, below which a model has no place in their order
COLUMNS = (
    "prompt_set",
    "guidance",
    "model",
    "quantity",
    "statistic",
    "first",
    "second",
    "value",
    "low",
    "high",
    "n",
    "n_prompts",
)
IMAGE = ["prompt_set", "guidance", "model", "train_seed", "prompt", "seed"]


# --- reading ---


def read(images: np.ndarray, prompts: Sequence[str], judges: dict[str, Judge]) -> dict[str, np.ndarray]:
    """What every reader says of images uint8 [N, 64, 64, 3]: float32 [N] by "reader/quantity"."""
    asked = [parse(prompt) for prompt in prompts]
    found = {f"pixels/{name}": values for name, values in pixels.measure(images, prompts).items()}
    for reader, judge in judges.items():
        reading = judge.read(images)
        values = rated(reading, asked) | shown(asked, scenes(reading))
        found |= {f"{reader}/{name}": value for name, value in values.items()}
    return found


def shown(asked: Sequence[world.Scene], drawn: Sequence[world.Scene]) -> dict[str, np.ndarray]:
    """Whether the asked background is drawn, and the share of the asked colours that are, place by place: [N] each."""
    colours = [
        np.mean(
            [
                place < len(seen.things) and seen.things[place].colour == thing.colour
                for place, thing in enumerate(wanted.things)
            ]
        )
        for wanted, seen in zip(asked, drawn, strict=True)
    ]
    right = [wanted.background == seen.background for wanted, seen in zip(asked, drawn, strict=True)]
    return {"background": np.array(right, np.float32), "colours": np.array(colours, np.float32)}


def read_drawings(judges: dict[str, Judge]) -> pd.DataFrame:
    """Readings and the truth of drawings as bad as any generator's, and of their autoencoder round trips."""
    name, seed, count = HELD_OUT
    pairs = [rough_pair(seed, index, "validation") for index in range(count)]
    items = [drawing for pair in pairs for drawing in (pair.winner, pair.loser)]
    images, prompts = rendered(items), [item.caption for item in items]
    seen = vae.roundtrip(AutoencoderKL.from_pretrained(MINI_WEIGHTS / "pipeline" / "vae").eval(), images)
    known = {f"{TRUTH}/{quantity}": value for quantity, value in truth(items).items()}
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "prompt_set": name,
                    "guidance": np.nan,
                    "model": model,
                    "train_seed": 0,
                    "prompt": [f"{index:04d}" for index in range(count) for _ in range(2)],
                    "seed": np.tile([0, 1], count),
                    **read(pictures, prompts, judges),
                    **known,
                }
            )
            for model, pictures in (("drawings", images), ("round trips", seen))
        ],
        ignore_index=True,
    )


def truth(items: Sequence[Drawing]) -> dict[str, np.ndarray]:
    """The quantities of drawings: float64 [N] by QUANTITIES."""
    return {
        "utility": np.array([item.utility for item in items]),
        "alignment": np.array([item.alignment for item in items]),
        "aesthetics": np.array([item.aesthetics for item in items]),
        **dict(zip(world.DEFECTS, np.array([item.defects for item in items]).T, strict=True)),
        **shown([item.asked for item in items], [item.drawn for item in items]),
    }


def read_runs(folders: Sequence[Path], judges: dict[str, Judge]) -> pd.DataFrame:
    """Readings of every image of finished runs; of each setting the prompts that all models have."""
    found = list(image_folders(folders))
    parts = []
    for folder, identity in track(found, "reading models", total=len(found), unit="folder"):
        texts = json.loads((folder.parents[1] / "prompts.json").read_text("utf-8"))
        paths = sorted(path for path in folder.glob("*.png") if path.stem.rpartition("-")[0] in texts)
        if not paths:
            raise BenchError(f"{folder} has no images of the prompts in {folder.parents[1] / 'prompts.json'}")
        names = [path.stem.rpartition("-") for path in paths]
        parts.append(
            pd.DataFrame(
                {
                    **identity,
                    "prompt": [name for name, _, _ in names],
                    "seed": [int(seed) for _, _, seed in names],
                    **read(read_images(paths), [texts[name] for name, _, _ in names], judges),
                }
            )
        )
    return pd.concat(
        [_shared_prompts(rows) for _, rows in pd.concat(parts, ignore_index=True).groupby(["prompt_set", "guidance"])],
        ignore_index=True,
    )


def image_folders(runs: Sequence[Path]) -> Iterator[tuple[Path, dict]]:
    """Every images/<prompt set>/g<guidance>/<checkpoint> of the runs with what it shows; the base's once.

    A model is named by its method and checkpoint. Runs of one method and seed differ in settings: they go by their id.
    """
    protocols = {run: _protocol(run) for run in map(Path, runs)}
    trained = [(protocol["method"], protocol["seed"]) for protocol in protocols.values()]
    seen = set()
    for run, protocol in protocols.items():
        method = protocol["method"] if trained.count((protocol["method"], protocol["seed"])) == 1 else run.name
        found = sorted(run.glob("images/*/g*/iter*"))
        if not found:
            raise UsageError(f"{run} has no images yet; finish it with `bench run --resume {run.name}`")
        for folder in found:
            checkpoint = folder.name.removeprefix("iter")
            identity = {
                "prompt_set": folder.parents[1].name,
                "guidance": float(folder.parent.name[1:]),
                "model": "base" if checkpoint == "0" else f"{method}-{checkpoint}",
                "train_seed": 0 if checkpoint == "0" else protocol["seed"],
            }
            if tuple(identity.values()) not in seen:
                seen.add(tuple(identity.values()))
                yield folder, identity


def _protocol(run: Path) -> dict:
    try:
        return json.loads((run / "protocol.json").read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{run} is no run: it has no protocol.json; give folders below results/runs") from error


def _shared_prompts(rows: pd.DataFrame) -> pd.DataFrame:
    models = rows.groupby("prompt")["model"].nunique()
    kept = rows[rows["prompt"].isin(models.index[models == rows["model"].nunique()])]
    if kept.empty:
        raise BenchError(f"the models have no prompt of {rows['prompt_set'].iloc[0]} in common; give runs of one suite")
    return kept


# --- comparing ---


def warrant(images: pd.DataFrame) -> pd.DataFrame:
    """Readings of images (columns IMAGE and "reader/quantity") as tidy rows, columns COLUMNS.

    statistic: "mean" of `first`; "spearman" of `first` and `second` over images, "difference" the mean of second -
    first; of the model "order": "spearman" and "kendall" of the models' means. [low, high]: 95 % interval, percentiles
    of the bootstrap over prompts. n: images, or models; where a reader cannot read an image, pairs leave it out.
    """
    rows = [
        (*setting, *row)
        for setting, group in images.groupby(["prompt_set", "guidance"], sort=False, dropna=False)
        for quantity in QUANTITIES
        for row in _compared(group, quantity)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _compared(group: pd.DataFrame, quantity: str) -> Iterator[tuple]:
    """The rows of one quantity in one setting."""
    readers = [
        reader
        for reader in (TRUTH, *READERS)
        if f"{reader}/{quantity}" in group and group[f"{reader}/{quantity}"].notna().any()
    ]
    models = list(dict.fromkeys(group["model"]))
    for model in (ALL, *models) if len(models) > 1 else models:
        rows = group if model == ALL else group[group["model"] == model]
        for reader in readers:
            yield model, quantity, "mean", reader, "", *_mean(rows, rows[f"{reader}/{quantity}"])
        for first, second in combinations(readers, 2):
            one, other = (rows[f"{reader}/{quantity}"] for reader in (first, second))
            yield model, quantity, "spearman", first, second, *_spearman(rows, one, other)
            yield model, quantity, "difference", first, second, *_mean(rows, other - one)
    for first, second in combinations(readers, 2) if len(models) > 2 else ():
        both = group.dropna(subset=[f"{first}/{quantity}", f"{second}/{quantity}"])
        share = both["model"].value_counts() / group["model"].value_counts()
        both = both[both["model"].isin(share.index[share >= SEEN])]
        if both["model"].nunique() < 3:
            continue
        one, other = (_means_of_models(both, f"{reader}/{quantity}") for reader in (first, second))
        for name, drawn in (
            ("spearman", _pearson(rankdata(one, axis=1), rankdata(other, axis=1))),
            ("kendall", _kendall(one, other)),
        ):
            yield ORDER, quantity, name, first, second, *_interval(drawn), one.shape[1], both["prompt"].nunique()


def _pearson(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation [B] of the rows of [B, M]; NaN without spread. Of ranks it is Spearman's."""
    return correlation(np.stack([one, other], axis=1), np.ones((len(one), 1, one.shape[1])))[:, 0, 1]


def _kendall(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kendall's tau-b [B] of the rows of [B, M], of all resamples at once as scipy's is not; NaN without spread."""
    first, second = np.triu_indices(one.shape[1], 1)
    signs, others = (np.sign(means[:, first] - means[:, second]) for means in (one, other))
    scale = np.sqrt(np.abs(signs).sum(axis=1) * np.abs(others).sum(axis=1))
    return np.divide((signs * others).sum(axis=1), scale, out=np.full(len(one), np.nan), where=scale > 0)


def _mean(rows: pd.DataFrame, values: pd.Series) -> tuple:
    """(mean, low, high, n, prompts) of what is known."""
    known = values.notna().to_numpy()
    weights, prompts = _weights(rows["prompt"][known])
    with np.errstate(invalid="ignore"):
        means = values.to_numpy(np.float64)[known] @ weights / weights.sum(axis=0)
    return *_interval(means), int(known.sum()), prompts


def _spearman(rows: pd.DataFrame, first: pd.Series, second: pd.Series) -> tuple:
    """(Spearman, low, high, n, prompts) of what both know."""
    known = (first.notna() & second.notna()).to_numpy()
    weights, prompts = _weights(rows["prompt"][known])
    pair = np.stack([first.to_numpy(np.float64)[known], second.to_numpy(np.float64)[known]], axis=1)
    return *_interval(spearman(pair, weights)[:, 0, 1] if len(pair) > 2 else np.full(2, np.nan)), len(pair), prompts


def _means_of_models(images: pd.DataFrame, column: str) -> np.ndarray:
    """Mean of every model, [1 + resamples, models]: of the sample, then of its resamples, the same for all models."""
    weights, _ = _weights(images["prompt"])
    models, which = np.unique(images["model"], return_inverse=True)
    of_model = which[:, None] == np.arange(len(models))
    total = (weights * images[column].to_numpy(np.float64)[:, None]).T @ of_model
    rows = weights.T @ of_model
    return np.divide(total, rows, out=np.full_like(total, np.nan), where=rows > 0)


def _weights(prompts: pd.Series) -> tuple[np.ndarray, int]:
    """How often each row counts, [N, 1 + resamples]: once, then as often as its prompt was drawn; number of prompts."""
    names, rows = np.unique(prompts, return_inverse=True)
    resamples = int(np.clip(WORK // max(1, len(rows)), FEWEST, RESAMPLES))
    counts = stats.resample_counts(len(names), resamples) if len(names) else np.ones((0, resamples))
    return np.concatenate([np.ones((len(names), 1)), counts], axis=1)[rows], len(names)


def _interval(drawn: np.ndarray) -> tuple[float, float, float]:
    """The first is of the sample itself, the others of its resamples."""
    finite = drawn[1:][np.isfinite(drawn[1:])]
    if not np.isfinite(drawn[0]) or not len(finite):
        return np.nan, np.nan, np.nan
    tail = (1 - LEVEL) / 2
    return float(drawn[0]), *map(float, np.quantile(finite, [tail, 1 - tail]))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("results/measured/judge.csv"), show_default=True
)
@click.option("--device", default="cpu", show_default=True)
def main(runs: tuple[Path, ...], output: Path, device: str) -> None:
    """Compare both judges and the pixel measures on the images of finished RUNS (folders below results/runs)."""
    try:
        judges = {kind.name: kind.load("mini", device) for kind in (Judge, SecondJudge)}
        images = pd.concat([read_drawings(judges), read_runs(runs, judges)], ignore_index=True)
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    warrant(images).to_csv(output, index=False, float_format="%.5g")
    click.echo(f"{len(images)} images read, {output} written")


if __name__ == "__main__":
    main()
