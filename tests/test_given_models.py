"""Models that are compared as they are: beside those trained here, and with their numbers where they are the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pandas as pd
import pytest
import tiny_bench
import yaml
from tiny_bench import bench, run_of, scores_of, start

from bench.commands.evaluate import _named
from bench.commands.export import export_run
from bench.costs.plan import plan
from bench.errors import UsageError
from bench.storage import runs
from bench.suites import load_suite
from bench.walk import Evaluation, Given, walk

VALUES = ["prompt_set", "prompt_id", "seed", "guidance", "metric", "value"]


@pytest.fixture(scope="module")
def here(tiny_pipeline_folder, tmp_path_factory, darkness) -> Path:
    """A folder with a trained run and its export."""
    folder = tmp_path_factory.mktemp("given")
    tiny_bench.write_suite(folder, tiny_pipeline_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bench("run --suite tiny.yaml --method spin --iters 1") == 0
        export_run(run_of("spin").id, 1, Path("exported"))
    return folder


def values_of(method: str) -> pd.DataFrame:
    rows = scores_of(run_of(method).folder)
    return rows[rows["iteration"] > 0][VALUES].reset_index(drop=True)


def test_the_same_model_in_any_form_has_the_scores_of_its_training(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    monkeypatch.setattr("bench.shared.load_pairs", None)  # nothing is trained, so no training data are opened
    run = run_of("spin")
    (weights,) = Path("exported/unet").glob("*.safetensors")
    base = load_suite("tiny.yaml").model.weights
    forms = f"whole=exported alone=exported/unet file={weights} again={run.id}:1 other={base}"
    assert bench(f"evaluate --suite tiny.yaml {forms}") == 0
    for name in ("whole", "alone", "file", "again"):
        pd.testing.assert_frame_equal(values_of(name), values_of("spin"), check_exact=True)
    of_base = scores_of(run.folder).query("iteration == 0")[VALUES].reset_index(drop=True)
    pd.testing.assert_frame_equal(values_of("other"), of_base, check_exact=True)
    record = json.loads((run_of("alone").folder / "protocol.json").read_text())
    assert record["given"]["kind"] == "network" and len(record["given"]["files"]) >= 1
    assert all(len(digest) == 64 for digest in record["given"]["files"].values())
    assert (record["schedule"], record["signals"], record["method_title"]) == ([], [], "alone")
    cost = json.loads((run_of("alone").folder / "cost.json").read_text())
    assert cost["train_flops"] == 0 and cost["total_seconds"] > 0
    capsys.readouterr()
    assert bench("table --format json") == 0
    rows = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert set(rows["model"]) == {"base", "SPIN-Diffusion", "whole", "alone", "file", "again", "other"}
    assert bench("report") == 0 and "whole" in Path("report.html").read_text("utf-8")
    assert bench(f"export {run_of('whole').id} -o twice") == 2
    assert "trained nothing: whole is exported, as it was found" in capsys.readouterr().err


def test_killed_and_resumed_it_is_the_same(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text((here / "tiny.yaml").read_text())
    places = [r"/iter1$", r"/images/test/g3/.*\.png$", r"/iter1/stage\.json$"]
    line = f"evaluate --suite tiny.yaml whole={here / 'exported'}"
    done = start(tiny_bench.__file__, *line.split(), TINY_BENCH_KILLED_BEFORE=json.dumps(places[:2]))
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 2, done.stderr
    run = run_of("whole")
    assert not runs.finished(run.folder) and bench(f"run --resume {run.id}") == 0
    made = values_of("whole")
    monkeypatch.chdir(here)
    pd.testing.assert_frame_equal(made, values_of("spin"), check_exact=True)


def test_a_suite_may_name_models_beside_methods(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load((here / "tiny.yaml").read_text())
    Path("tiny.yaml").write_text(
        yaml.safe_dump({**written, "models": {"published": str(here / "exported")}}, sort_keys=False)
    )
    suite = load_suite("tiny.yaml")
    assert suite.entries("all") == [*written["methods"], "published"]
    assert [type(stage) for stage in walk(suite, "published", 1)] == [Evaluation, Given, Evaluation]
    planned = plan(suite, ["published"])
    assert [stage.name for stage in planned.stages] == [
        "published: read",
        "evaluation: sampling",
        "evaluation: scoring",
    ]
    assert planned.stages[1].count == 2 * 4 * 2 * 2  # base and it, prompts, seeds, guidance scales
    assert bench("run --suite tiny.yaml --method published") == 0
    assert len(values_of("published")) == 4 * 2 * 2
    capsys.readouterr()


def test_names_are_short_and_none_is_taken_twice(here, monkeypatch, capsys):
    assert _named("UCLA-AGI/SPIN-Diffusion-iter3") == ("SPIN-Diffusion-iter3", "UCLA-AGI/SPIN-Diffusion-iter3")
    assert _named("x=a/b.safetensors") == ("x", "a/b.safetensors")
    assert _named("a/my model.safetensors")[0] == "my-model"
    assert _named("20261125-120000-spin-s0:2")[0] == "20261125-120000-spin-s0-2"
    monkeypatch.chdir(here)
    assert bench("evaluate --suite tiny.yaml a=exported a=exported/unet") == 2
    assert "two models of one name" in capsys.readouterr().err
    assert bench("evaluate --suite tiny.yaml spin=exported") == 2
    assert "models.spin: a method of the suite, or the base, has this name already" in capsys.readouterr().err
    assert bench("evaluate --suite tiny.yaml x=nowhere") == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    with pytest.raises(UsageError, match="becomes part of a folder's name"):
        load_suite("tiny.yaml").checked(models={"a/b": "exported"})
