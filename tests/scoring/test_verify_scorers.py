"""`bench doctor --verify`: equal, differs, or what is missing; weights are small stand-ins in the published format."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.commands import cli
from bench.metrics import official
from bench.metrics.imagereward import ImageReward
from bench.scoring import verify_scorers

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import inputs
from checkpoints import save_imagereward

PROMPT = "a painting of an ocean"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "imagereward"
    save_imagereward(folder, inputs.SMALL_VIT, inputs.SMALL_MED)
    return folder


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.delenv("BENCH_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def example(monkeypatch, tmp_path) -> dict:
    """One published example of two pictures, whose scores a test fills in."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng, images = np.random.default_rng(0), []
    for name in ("1.png", "2.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(pictures / name)
        images.append(
            {"file": name, "score": 0.5, "sha256": hashlib.sha256((pictures / name).read_bytes()).hexdigest()}
        )
    one = {
        "metric": "imagereward",
        "prompt": PROMPT,
        "images": images,
        "tolerance": 0.01,
        "because": "said so",
        "source": "a README",
        "pictures": "assets of a repository",
    }
    monkeypatch.setattr(verify_scorers, "examples", lambda: (one,))
    return one


def doctor(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--verify", *arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err.strip().splitlines()[-1] if err else ""


def score(weights: Path, pictures: Path) -> np.ndarray:
    metric = ImageReward.load(str(weights / "ImageReward.pt"))
    return metric.score([Image.open(pictures / name) for name in ("1.png", "2.png")], [PROMPT] * 2)


def test_without_weights_one_line_says_which_files_are_missing(example, capsys):
    status, out, err = doctor(capsys, "--examples", "pictures")
    (line,) = [line for line in out.splitlines() if line.startswith("imagereward")]
    assert status == 1 and err == "bench: doctor --verify: imagereward not verified"
    assert "ImageReward.pt (1.8 GB, of THUDM/ImageReward), med_config.json" in line and "pictures missing" not in line
    _, out, _ = doctor(capsys)
    assert "weights missing" in out and "name a folder of assets of a repository with --examples" in out


def test_a_stand_in_differs_by_what_it_differs(example, weights, monkeypatch, capsys):
    monkeypatch.setenv("BENCH_WEIGHTS", str(weights))
    real = score(weights, Path("pictures"))
    for image, value in zip(example["images"], real, strict=True):
        image["score"] = float(value)
    example["images"][1]["score"] += 0.25
    status, out, err = doctor(capsys, "--examples", "pictures", "--format", "json")
    (found,) = json.loads(out)
    assert status == 1 and err == "bench: doctor --verify: imagereward differs" and found["state"] == "differs"
    assert found["difference"] == pytest.approx(0.25, abs=1e-4) and found["tolerance"] == 0.01
    said = f"2.png has {real[1]:.4f} where {real[1] + 0.25:.4f} was published"
    assert found["said"] == f"ImageReward (ImageReward.pt) differs by 0.25 (tolerance 0.01: said so): {said}"


def test_equal_is_within_the_tolerance(example, weights, monkeypatch, capsys):
    monkeypatch.setenv("BENCH_WEIGHTS", str(weights))
    for image, value in zip(example["images"], score(weights, Path("pictures")), strict=True):
        image["score"] = float(value) + 0.009
    status, out, err = doctor(capsys, "--examples", "pictures")
    assert status == 0 and "bench:" not in err
    assert (
        "ImageReward (ImageReward.pt) equal: 2 pictures, at most 0.009 apart (tolerance 0.01); published: a README"
        in out
    )


def test_a_score_that_is_no_number_is_not_equal(example, weights, monkeypatch):
    monkeypatch.setenv("BENCH_WEIGHTS", str(weights))
    monkeypatch.setattr(ImageReward, "score", lambda *_: np.full(2, np.nan, np.float32))
    (found,) = verify_scorers.verify(Path("pictures"))
    assert found.state == "differs"


def test_only_the_published_pictures_count(example, weights, monkeypatch):
    monkeypatch.setenv("BENCH_WEIGHTS", str(weights))
    Image.new("RGB", (50, 40)).save("pictures/2.png")
    (found,) = verify_scorers.verify(Path("pictures"))
    assert found.state == "missing" and "2.png is another picture than the published one" in found.said
    Path("pictures/1.png").unlink()
    (found,) = verify_scorers.verify(Path("pictures"))
    assert "pictures missing in pictures: 1.png of assets of a repository" in found.said


def test_damaged_weights_are_said_in_one_line(example, weights, monkeypatch, tmp_path):
    for file in weights.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:300] if file.suffix == ".pt" else file.read_bytes())
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    (found,) = verify_scorers.verify(Path("pictures"))
    assert found.state == "missing" and found.said.startswith("not verified: ") and "\n" not in found.said


def test_every_example_names_its_source_its_pictures_and_why_so_tolerant():
    for one in verify_scorers.examples():
        assert one["metric"] in official.FILES and one["source"] and one["pictures"] and one["because"]
        assert 0 < one["tolerance"] < 0.05 and all(len(image["sha256"]) == 64 for image in one["images"])
    named = {one["metric"] for one in verify_scorers.examples()} | set(verify_scorers.without_example())
    assert named == set(official.FILES)


def test_options_of_verify_go_with_it(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", "--examples", "."])
    assert caught.value.code == 2 and "--examples goes with --verify" in capsys.readouterr().err
    assert doctor(capsys, "--examples", "gone")[2] == "bench: --examples gone: no such folder"
