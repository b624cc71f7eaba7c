"""What is found, what is missing, and how to get it."""

from __future__ import annotations

import json

import pytest
import tiny_bench

from bench import registry
from bench.commands import cli, doctor
from bench.commands.doctor import data_files, metric_files, model_files
from bench.costs.plan import Plan, StagePlan
from bench.errors import BenchError
from bench.metrics import official
from bench.suites import load_suite

ALL = "[pickscore, hpsv2, imagereward, aesthetic, clip]"
OFFICIAL = [f"metrics={ALL}", *(f"metric_options.{name}.weights=official" for name in ALL[1:-1].split(", "))]


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BENCH_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_embedded_default_is_complete():
    suite = load_suite("mini", ["metrics=[pickscore, aesthetic, clip, judge]"])
    files = [*model_files(suite), *data_files(suite), *metric_files(suite)]
    assert len(files) == 5 + 3 + 3 + 1  # the pipeline's parts, data, scorers (one encoder shared), the judge
    assert all(file.where for file in files)


def test_every_official_file_is_named_once_with_its_size_and_place():
    files = list(metric_files(load_suite("mini", OFFICIAL)))
    assert [file.name for file in files] == [
        "yuvalkirstain/PickScore_v1",
        "tokenizer.json",
        "preprocessor_config.json",
        "HPS_v2_compressed.pt",
        "ImageReward.pt",
        "med_config.json",
        "vocab.txt",
        "sac+logos+ava1-l14-linearMSE.pth",
        "openai/clip-vit-large-patch14",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ]
    assert all(file.where is None and file.size and "BENCH_WEIGHTS" in file.fix for file in files)
    assert "xswu/HPSv2" in files[3].fix


def test_a_file_in_the_folder_of_weights_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    (tmp_path / "HPS_v2_compressed.pt").write_bytes(b"12345")
    (tmp_path / "clip-vit-large-patch14").mkdir()
    found = {file.name: file for file in metric_files(load_suite("mini", OFFICIAL)) if file.where}
    assert found["HPS_v2_compressed.pt"].size == "5 bytes"
    assert "openai/clip-vit-large-patch14" in found


def test_a_tokenizer_counts_where_the_loaders_look(monkeypatch, tmp_path):
    """Beside the weights, or in a folder with the name of its repository; not just anywhere."""

    def tokenizer() -> str | None:
        suite = load_suite("mini", ["metrics=[hpsv2]", "metric_options.hpsv2.weights=official"])
        return {file.name: file.where for file in metric_files(suite)}["tokenizer.json"]

    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer() is None
    folder = tmp_path / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer() == str(folder / "tokenizer.json")
    (tmp_path / "HPS_v2_compressed.pt").write_bytes(b"")
    assert tokenizer() == str(tmp_path / "tokenizer.json")


def test_every_metric_is_known():
    for name in registry.BUILT_IN["metrics"]:
        metric = registry.metric(name)
        assert name in official.MINI_FILES
        assert metric.columns[0].truth or name in official.FILES and name in official.ENCODERS


def test_a_pipeline_of_the_hub_that_is_not_here():
    files = list(model_files(load_suite("mini", ["model.weights=stable-diffusion-v1-5/stable-diffusion-v1-5"])))
    assert [file.where for file in files] == [None] * 5
    assert "huggingface-cli download stable-diffusion-v1-5/stable-diffusion-v1-5" in files[0].fix


def test_data_that_is_not_here(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    suite = load_suite(
        "mini",
        ["data.pairs=pickapic:owner/name#train", f"evaluation.prompt_sets.mine.prompts={tmp_path / 'prompts.txt'}"],
    )
    pairs, *prompts = data_files(suite)
    assert pairs.where is None
    assert "owner/name is a data set on the hub" in pairs.fix
    assert all(file.where for file in prompts)


def test_the_command(tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
    line = ["doctor", "--suite", str(tiny_bench.write_suite(tmp_path, tiny_pipeline_folder))]
    status, out, err = run(line, capsys)
    assert status == 0
    assert out.splitlines()[-1] == "suite tiny has all it needs"
    monkeypatch.setattr(doctor, "plan", lambda *_: Plan("", (), (StagePlan("", 1, "", 1, 10**15, 10**15, "fp32"),), ()))
    status, out, err = run([*line, "--set", "evaluation.prompt_sets.test.prompts=gone.txt", "--format", "json"], capsys)
    said = ["1 of 7 files are missing", "not enough disk space here (results/, all methods once)", "not enough memory"]
    assert (status, json.loads(out)["problems"]) == (1, said)
    assert err.splitlines()[-1] == f"bench: suite tiny: {'; '.join(said)}"


def test_a_plan_that_cannot_be_made_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "plan", lambda *_: (_ for _ in ()).throw(BenchError("no such file")))
    found = doctor.examine(load_suite("mini"))
    assert (found.rooms, found.notes) == ([], ["disk and memory were not planned: no such file"])


def run(line: list[str], capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(line)
    out, err = capsys.readouterr()
    return caught.value.code, out, err
