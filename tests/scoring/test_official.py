"""`bench score --backend official` with packages that look like the published ones, in "their" Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bench import registry
from bench.commands import cli
from bench.metrics.base import Metric, Published
from bench.scoring import official

PACKAGES = {
    "hpsv2/__init__.py": "",
    "hpsv2/src/__init__.py": "",
    "hpsv2/src/open_clip/__init__.py": "",
    # As in the wheel: the file is not there, and missed at import.
    "hpsv2/img_score.py": """
import gzip
from pathlib import Path
import torch
from PIL import Image
words = gzip.open(Path(__file__).parent / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").read()
device, loads = None, []
def create_model_and_transforms(name, pretrained, **options):
    assert pretrained is None, "would download"
    return name
def score(path, prompt, cp):
    print("chatter")
    create_model_and_transforms("ViT-H-14", "laion2B-s32B-b79K", device=device)
    weights = torch.load(cp, map_location=device)
    assert weights["read"] == 1 and words == b"merges" and device == "cpu"
    image = Image.open(path)
    if image.mode == "RGBA":
        raise RuntimeError("expected input to have 3 channels, but got 4 channels instead")
    return [image.getpixel((0, 0))[0] / 255 + len(prompt) + 0.001]
""",
    "torch.py": """
reads = 0
def load(path, map_location):
    global reads
    reads += 1
    return {"read": reads}
class no_grad:
    def __enter__(self): pass
    def __exit__(self, *_): pass
""",
    "clip/__init__.py": "",
    "ImageReward/__init__.py": """
from pathlib import Path
from PIL import Image
class Model:
    def score(self, prompt, path):
        return -2 * (Image.open(path).getpixel((0, 0))[0] / 255 + len(prompt))
def load(checkpoint, device, med_config):
    assert Path(med_config).name == "med_config.json" and Path("bert-base-uncased/vocab.txt").read_text() == "words"
    return Model()
""",
}


class Red(Metric):
    """What a pixel and the length of the prompt say; HPS v2's stand-in."""

    name, title = "hpsv2", "HPS v2"
    published = Published("owner/name", "HPS.pt", "1 kB")
    factor = 1.0

    @classmethod
    def load(cls, weights: str = "mini", device: str = "cpu", batch_size: int = 32):
        return cls()

    def score(self, images, prompts):
        return np.array(
            [
                self.factor * (np.asarray(image)[0, 0, 0] / 255 + len(prompt))
                for image, prompt in zip(images, prompts, strict=True)
            ],
            np.float32,
        )

    def info(self):
        return {"version": "1"}


class Reward(Red):
    name, title = "imagereward", "ImageReward"
    published = Published("owner/name", "ImageReward.pt", "1 kB")
    factor = -2.0


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that finds the fake packages, and nothing of the project."""
    root = tmp_path / "packages"
    for name, text in PACKAGES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    import gzip

    with gzip.open(root / "clip" / "bpe_simple_vocab_16e6.txt.gz", "wb") as handle:
        handle.write(b"merges")
    site = Path(Image.__file__).parents[1]
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ntest -z "$PYTHONPATH" || exit 9\nPYTHONPATH="{root}:{site}" exec "{sys.executable}" -S "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    return tmp_path / "python"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder, weights = tmp_path / "images", tmp_path / "weights"
    folder.mkdir()
    weights.mkdir()
    for index, mode in enumerate(("RGB", "RGB", "RGBA")):
        Image.new(mode, (8, 6), (40 * index, 0, 0)).save(folder / f"{index}.png")
    (folder / "prompts.txt").write_text("one\nthree\na longer one\n")
    for name, text in {"HPS.pt": "", "ImageReward.pt": "", "med_config.json": "", "vocab.txt": "words"}.items():
        (weights / name).write_text(text)
    monkeypatch.setenv("BENCH_WEIGHTS", str(weights))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(registry, "metric", {"hpsv2": Red, "imagereward": Reward}.__getitem__)
    monkeypatch.chdir(tmp_path)
    return folder


def run(capfd: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["score", *arguments, "--backend", "official"])
    return exit_.value.code, *capfd.readouterr()


def test_side_by_side(folder, python, capfd):
    code, out, err = run(capfd, str(folder), "--official-python", str(python), "-o", "s.csv", "--format", "json")
    assert code == 0, err
    found = json.loads(out)["protocol"]["official"]
    hps, reward = (found["differences"][name] for name in ("hpsv2", "imagereward"))
    assert hps["images"] == 2 and hps["largest_absolute"] == pytest.approx(0.001, rel=1e-3)
    assert hps["largest_relative"] == pytest.approx(0.001 / 3.001, rel=1e-3)
    assert list(hps["refused"]) == ["2.png"] and "got 4 channels" in hps["refused"]["2.png"]
    assert reward["images"] == 3 and reward["largest_absolute"] < 1e-5 and not reward["refused"]
    assert found["versions"]["python"]
    table = pd.read_csv("s.csv", comment="#")
    np.testing.assert_allclose(table["hpsv2_official"][:2] - table["hpsv2"][:2], 0.001, atol=1e-6)
    assert table["hpsv2_official"].isna().tolist() == [False, False, True]


def test_told_in_words(folder, python, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    code, out, _ = run(capfd, str(folder), "--official-python", str(python), "--metrics", "hpsv2")
    assert code == 0 and "largest difference 0.001 absolute" in out and "2 images" in out
    assert "2.png: refused by the official hpsv2: RuntimeError: expected input" in out


def test_what_is_missing_is_told_before_anything_is_scored(folder, python, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(Red, "score", lambda *_: pytest.fail("scored"))
    (tmp_path / "packages" / "clip").rename(tmp_path / "packages" / "klip")
    code, _, err = run(capfd, str(folder), "--official-python", str(python))
    (message,) = err.strip().splitlines()
    assert code == 1 and "imagereward: no module named clip" in message
    assert f"pip install -r {official.REQUIREMENTS}" in message and official.REQUIREMENTS.is_file()


def test_packages_that_break_at_import_are_told_too(folder, python, tmp_path, capfd):
    (tmp_path / "packages" / "ImageReward" / "__init__.py").write_text("from transformers import gone")
    code, _, err = run(capfd, str(folder), "--official-python", str(python), "--metrics", "imagereward")
    assert code == 1 and "ImportError" in err.splitlines()[-1] and "environment of its own" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metrics", "pickscore"), "no package scores 'pickscore'"),
        (("--weights", "mini", "--official-python", "{python}"), "not the miniatures"),
        (("--official-python", "nowhere/python"), "nowhere/python"),
    ],
)
def test_mistakes(folder, python, capfd, arguments, message):
    code, _, err = run(capfd, str(folder), *(part.format(python=python) for part in arguments))
    assert code == 2 and message in err.strip().splitlines()[-1]
    assert "Traceback" not in err


def test_the_interpreter_needs_the_backend(folder, capfd):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["score", str(folder), "--official-python", "x", "--metrics", "hpsv2"])
    assert exit_.value.code == 2 and "goes with --backend official" in capfd.readouterr().err


def test_a_process_that_dies_is_told(folder, tmp_path, capfd):
    (tmp_path / "dead").write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    (tmp_path / "dead").chmod(0o755)
    code, _, err = run(capfd, str(folder), "--official-python", "dead")
    assert code == 1 and "status 3: out of memory" in err
