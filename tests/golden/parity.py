"""Writes results/measured/scorer_parity.csv: the largest difference between our scores and the official ones.

    python tests/golden/parity.py WORK [--full]

Run in the project's environment, after make_scorers.py in the official one. WORK is a folder for
checkpoints; with --full they have the published sizes (4 GB each, one at a time). Rows of the other size are kept.
"""

from __future__ import annotations

import csv
import io
import json
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import inputs
from checkpoints import grid, save_heads, save_imagereward, save_open_clip, save_pickscore

from bench.metrics.aesthetic import Aesthetic, AestheticV1
from bench.metrics.base import Metric
from bench.metrics.clip import CLIPScore, CLIPScoreL14
from bench.metrics.hpsv2 import HPSv2
from bench.metrics.imagereward import ImageReward
from bench.metrics.open_clip_format import VIT_H_14, VIT_L_14
from bench.metrics.pickscore import PickScore
from bench.storage.stages import atomic_write

TARGET = Path(__file__).parents[2] / "results" / "measured" / "scorer_parity.csv"
OFFICIAL = {
    "hpsv2": "hpsv2",
    "hpsv2_no_antialias": "hpsv2",
    "clip": "open-clip-torch",
    "clip_l14": "open-clip-torch",
    "pickscore": "transformers",
    "imagereward": "image-reward",
}
HEADS = "LAION's layers on open-clip-torch"


def scores(work: Path, full: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Our scores by golden name; a checkpoint is removed before the next one is made."""
    h14, l14 = (VIT_H_14, VIT_L_14) if full else (inputs.SMALL_CLIP, inputs.SMALL_CLIP_L)
    path = save_open_clip(work / "h14", "HPS_v2_compressed.pt", h14)
    for name, antialias in (("hpsv2", True), ("hpsv2_no_antialias", False)):
        yield name, grid(HPSv2.load(str(path), antialias=antialias))
    yield "clip", grid(CLIPScore.load(str(path)))
    shutil.rmtree(work / "h14")
    save_pickscore(work / "pickscore", h14)
    yield "pickscore", grid(PickScore.load(str(work / "pickscore")))
    shutil.rmtree(work / "pickscore")
    save_imagereward(
        work / "imagereward",
        inputs.LARGE_VIT if full else inputs.SMALL_VIT,
        inputs.MED_CONFIG if full else inputs.SMALL_MED,
    )
    yield "imagereward", grid(ImageReward.load(str(work / "imagereward")))
    shutil.rmtree(work / "imagereward")
    path = save_open_clip(work / "l14", "open_clip_pytorch_model.bin", l14)
    yield "clip_l14", grid(CLIPScoreL14.load(str(path)))
    save_heads(work, l14["embed_dim"])
    pictures = inputs.pictures()
    for name, kind, weights in (
        ("aesthetic", Aesthetic, work / "aesthetic.pth"),
        ("aesthetic_v1", AestheticV1, work / "aesthetic_v1.pth"),
        ("aesthetic_released", Aesthetic, "official"),
    ):
        if name != "aesthetic_released" or full:
            metric: Metric = kind.load(str(weights), backbone=str(path))
            yield name, metric.score(pictures, [""] * len(pictures))
    shutil.rmtree(work / "l14")


def main() -> None:
    work, full = Path(sys.argv[1]), "--full" in sys.argv
    golden = json.loads(Path(__file__).with_name("scorers_full.json" if full else "scorers.json").read_text())
    versions, size = golden["versions"], "published" if full else "reduced"
    rows = []
    for name, found in scores(work, full):
        wanted = np.array(golden["scores"][name])
        gap = abs(found - wanted)
        package = OFFICIAL.get(name, "open-clip-torch")
        rows.append(
            {
                "scorer": name,
                "size": size,
                "scores": wanted.size,
                "official": (HEADS if name not in OFFICIAL else package) + f" {versions[package]}",
                "official_torch": versions["torch"],
                "official_torchvision": versions["torchvision"],
                "largest_absolute": f"{gap.max():.3g}",
                "largest_relative": f"{(gap / abs(wanted)).max():.3g}",
                "largest_relative_to_mean": f"{gap.max() / abs(wanted).mean():.3g}",
                "spread_between_images": f"{wanted.std(0).mean():.3g}",
                "smallest_score": f"{abs(wanted).min():.3g}",
                "peak_memory_gib": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f}",
            }
        )
        print(rows[-1], flush=True)
    kept = []
    if TARGET.exists():
        with TARGET.open() as handle:
            kept = [row for row in csv.DictReader(handle) if row["size"] != size]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, *kept] if full else [*kept, *rows])
    atomic_write(TARGET, text.getvalue())
    print(TARGET)


if __name__ == "__main__":
    main()
