"""Damage of every kind to what is finished: named, set aside, and that alone made again; never used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import tiny_bench
from tiny_bench import bench

from bench.commands.export import export_run
from bench.errors import BenchError
from bench.storage import runs
from bench.storage.integrity import expecting
from bench.storage.stages import MARKER, Stage
from bench.storage.verify import made_from, verify

SETTINGS = "--set evaluation.prompt_sets.test.limit=2 --set evaluation.guidance=[1.0] --set evaluation.seeds=[1]"


@pytest.fixture(scope="module")
def finished(darkness, tiny_pipeline_folder, tmp_path_factory) -> Path:
    """A folder with a finished run of two iterations."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_bench.write_suite(folder, tiny_pipeline_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bench(f"run --suite tiny.yaml --method spin --iters 2 {SETTINGS}") == 0
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, where its run is."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Path("results/runs") / runs.ids()[0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.unlink()  # a hard link shares its content
    path.write_bytes(content)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.unlink()
    path.touch()


DAMAGES = [flip, cut, empty, Path.unlink]
FILES = [
    "results/cache/latents-*/00000/rows.npy",
    "results/cache/images-*/*.png",
    "results/cache/scores-*/scores.parquet",
    "results/runs/*/iter1/unet/*.safetensors",
    "results/runs/*/iter2/history.parquet",
    "results/runs/*/stages/opponent1/latents.npy",
    "results/runs/*/stages/opponent2/pairs.npy",
    "results/runs/*/images/test/g1/iter2/*.png",
    "results/runs/*/stages/scores1-test-g1/scores.parquet",
    "results/runs/*/stages/scores2-test-g1/cost.json",
]


@pytest.mark.parametrize("damage", [flip, empty])
def test_what_is_damaged_is_named_set_aside_and_made_again(here, capsys, damage):
    """A file of every kind at once; resumed, each is named, its stage alone made again, and the table is the same."""
    places = [sorted(Path().glob(name))[0] for name in FILES]
    stages = {next(parent for parent in place.parents if (parent / MARKER).exists()) for place in places}
    before = pd.read_parquet(here / "scores.parquet")
    for place in places:
        damage(place)
    assert bench("verify") == 1
    told = capsys.readouterr().out
    assert all(f"  {place} " in told for place in places)
    assert bench(f"run --resume {here.name}") == 0
    said = capsys.readouterr().err
    assert all(f"bench: {place} " in said for place in places)
    aside = {path.with_name(path.name.removesuffix(".damaged-1")) for path in Path("results").rglob("*.damaged-*")}
    assert aside == stages
    pd.testing.assert_frame_equal(pd.read_parquet(here / "scores.parquet"), before, check_exact=True)
    assert bench("verify") == 0


def test_a_damaged_cache_is_not_used_by_the_next_run(here, capsys):
    (prompts,) = Path().glob("results/cache/prompts-*/00000/rows.npy")
    flip(prompts)
    assert bench(f"run --suite tiny.yaml --method sft --seed 1 {SETTINGS}") == 0
    assert f"{prompts} does not hold what was written: set aside as 00000.damaged-1" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_damaged_record_is_reported_by_nobody_and_made_again(here, capsys, damage):
    """The files of a run that are in no stage; each alone is enough to keep it out of a table."""
    paths = [here / "scores.parquet", here / "protocol.json", next((here / "images/test/g1/iter0").iterdir())]
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        damage(path)
        assert bench("table") == 1
        gone = not (here / "protocol.json").exists()  # then it is no run to reports
        said = capsys.readouterr().err
        assert gone or f"{here.name}: left out, damaged: " in said and path.name in said
        path.write_bytes(whole[path])
    for path in paths:
        damage(path)
    assert bench(f"run --resume {here.name}") == 0 and bench("verify") == 0 and bench("table") == 0
    assert [path.name for path in paths if path.read_bytes() != whole[path]] == ["protocol.json"]


def test_damaged_settings_are_not_gone_on_with(here, capsys):
    config = here / "config.json"
    config.write_text(config.read_text().replace('"seed": 0,', '"seed": 1,', 1))
    assert bench(f"run --resume {here.name}") == 1
    assert "config.json does not hold what was written: what the run was started with" in capsys.readouterr().err


def test_a_damaged_model_is_not_exported(here, tmp_path):
    weights = here / "iter2" / "unet" / "diffusion_pytorch_model.safetensors"
    other = here / "iter1" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(other, weights)  # whole, of the same size, and another model
    with pytest.raises(BenchError, match=r"iter2/unet/diffusion_pytorch_model.safetensors does not hold"):
        export_run(here.name, 2, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    export_run(here.name, 1, tmp_path / "model")


def test_verify_names_what_was_made_from_what_is_damaged(here):
    flip(here / "iter1" / "unet" / "diffusion_pytorch_model.safetensors")
    found = verify(here, [runs.CACHE, runs.RUNS]).made_from
    names = {path.relative_to(here).as_posix() for path in found[here / "iter1"]}
    assert names == {
        "iter2",
        "stages/opponent2",
        "images/test/g1/iter1",
        "images/test/g1/iter2",
        "stages/scores1-test-g1",
        "stages/scores2-test-g1",
    }
    (latents,) = runs.CACHE.glob("latents-*/00000")
    flip(latents / "rows.npy")
    everything = verify(runs.CACHE, [runs.CACHE, runs.RUNS]).made_from[latents]
    assert here / "iter1" in everything and here / "stages" / "scores2-test-g1" in everything


def test_what_was_made_from_what_is_found_at_any_remove_and_nothing_else():
    markers = {
        Path(name): {"hash": name, "inputs": {"policy": below}}
        for name, below in (("a", "base"), ("b", "a"), ("c", "b"), ("other", "base"))
    }
    assert made_from(markers[Path("a")], markers) == [Path("b"), Path("c")]


def test_a_lost_marker_is_found(here, capsys):
    places = ("results/cache/images-*", "results/cache/latents-*/*", "results/runs/*/iter2")
    stages = [stage for place in places for stage in Path().glob(place)]
    assert len(stages) == len(places)
    for stage in stages:
        (stage / MARKER).unlink()
    assert bench("verify") == 1
    said = capsys.readouterr().out
    for stage in stages:
        assert f"  {stage / MARKER} is missing" in said and f"made from {stage}: nothing else" in said


def test_stages_of_older_versions_are_used_and_called_unverified(here, capsys):
    for path in Path("results").rglob(MARKER):
        marker = json.loads(path.read_text())
        del marker["files"]
        path.write_text(json.dumps(marker))
    assert bench("verify cache") == 0
    assert "unverified" in capsys.readouterr().out
    assert bench(f"run --resume {here.name}") == 0
    assert not list(Path().rglob("*.damaged-*"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rows.npy", "below/image.png"])
def test_every_kind_of_damage_is_found_in_any_file(tmp_path, capsys, damage, name):
    def fill(folder: Path) -> None:
        for file in ("rows.npy", "below/image.png", "empty.json"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("" if file == "empty.json" else "content")

    stage = Stage(tmp_path / "stage", {})
    stage.make(fill)
    damage(stage.directory / name)
    assert not stage.whole
    stage.make(fill)
    assert stage.whole and f"{stage.directory / name} " in capsys.readouterr().err


def test_what_this_process_wrote_is_looked_at_again_when_it_changed(tmp_path):
    stage = Stage(tmp_path / "stage", {})
    stage.make(lambda folder: (folder / "file").write_text("content"))
    assert stage.whole
    (tmp_path / "stage" / "file").write_text("c0ntent")
    assert stage.done and not stage.whole
    stage.make(lambda folder: (folder / "file").write_text("content"))
    assert (tmp_path / "stage.damaged-1" / "file").read_text() == "c0ntent"
    assert (tmp_path / "stage" / "file").read_text() == "content"
    (tmp_path / "stage" / MARKER).write_text("{half")
    assert not stage.ready() and (tmp_path / "stage.damaged-2").is_dir()


def test_an_early_end_of_a_file_is_no_interruption(here, capsys, monkeypatch):
    """click takes EOFError, NumPy's for an empty .npy, for the end of its terminal."""
    with (
        pytest.raises(BenchError, match=r"x.npy is damaged \(EOFError: .*remove results, and"),
        expecting(Path("results/x.npy")),
    ):
        raise EOFError("No data left in file")

    def ends(*arguments):
        raise EOFError("No data left in file")

    monkeypatch.setattr(runs, "load", ends)
    assert bench(f"run --resume {here.name}") == 1
    assert "bench: EOFError: No data left in file" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_order_of_its_settings(here):
    before = (here / "config.json").read_text()
    assert bench(f"run --resume {here.name}") == 0
    assert (here / "config.json").read_text() == before
    assert list(json.loads(before)["suite"])[:3] == ["name", "description", "model"]  # not sorted


def test_a_second_resume_says_who_is_at_work(here, capsys):
    run = runs.load(here.name)
    with runs.held(run):
        process = os.fork()
        if not process:
            os._exit(bench(f"run --resume {here.name}") or 0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
