"""Results inside a training, and what is told about results, end to end on a random pipeline."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import tiny_bench
from tiny_bench import bench, history_of, run_of, scores_of, start, trained, unets_of

from bench.experiment import Experiment
from bench.scoring.evaluate import Scorers
from bench.shared import Shared
from bench.storage import runs
from bench.suites import load_suite


@pytest.fixture
def elsewhere(darkness, tiny_pipeline_folder, tmp_path, monkeypatch) -> Path:
    """An empty folder with the suite."""
    tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


INSIDE = (
    "--method sft --set methods.sft.iterations.0.steps=6 --set methods.sft.iterations.0.checkpoints=[2,4] "
    "--set train.checkpoint_every=3 --set evaluation.guidance=[1.0]"
)


def test_results_inside_a_training_killed_at_every_place_are_the_undisturbed_ones(elsewhere, capsys):
    """kill -9 before each result, state, image and score of one; then the same in one piece, and without results."""
    places = [
        r"/iter1@2$",
        r"/training1/step3$",
        r"/iter1@4$",
        r"/iter1$",
        r"/\.iter1@2\..*/000001\.json$",
        r"/\.scores1@4-test-g1\..*/000000\.json$",
    ]
    line = f"run --suite tiny.yaml {INSIDE}"
    done = start(tiny_bench.__file__, *line.split(), TINY_BENCH_KILLED_BEFORE=json.dumps(places))
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(places), done.stderr
    run = run_of("sft")
    assert not runs.finished(run.folder)
    assert bench(f"run --resume {run.id}") == 0
    assert not [*run.folder.rglob(".*.tmp"), *run.folder.rglob(".*.part"), *run.folder.rglob("training1")]
    shared = Shared(run.suite)
    whole = runs.create("sft", run.suite, 0, 1)
    Experiment(whole, shared).stages(lambda *scalar: None)
    assert unets_of(run) == unets_of(whole) and set(unets_of(run)) == {"iter1", "iter1@2", "iter1@4"}
    pd.testing.assert_frame_equal(scores_of(run.folder), scores_of(whole.folder), check_exact=True)
    pd.testing.assert_frame_equal(history_of(run.folder), history_of(whole.folder), check_exact=True)

    for steps, name in ((2, "iter1@2"), (4, "iter1@4"), (6, "iter1")):  # trainings of that many steps, without results
        settings = [f"methods.sft.iterations=[{{steps: {steps}, lr: 1e-3}}]", "evaluation.guidance=[1.0]"]
        plain = runs.create("sft", load_suite("tiny.yaml", settings), 0, 1)
        trained(plain, shared)
        assert unets_of(plain) == {"iter1": unets_of(run)[name]}

    shutil.rmtree(run.folder / "iter1@2")  # gone since: the training is done again, and ends the same
    before = unets_of(whole)
    assert bench(f"run --resume {run.id}") == 0
    assert unets_of(run) == before
    capsys.readouterr()
    assert bench(f"table --format json --against sft@2 {run.id}") == 0
    rows = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert set(rows["model"]) == {"base", "SFT@4", "SFT@6"} and set(rows["against"]) == {"SFT@2"}


def test_once_is_no_second_run_and_goes_on_with_the_first(elsewhere, capsys):
    line = "run --suite tiny.yaml --method sft --once"
    place = r"/images/test/g3/iter1$"
    killed_at = start(tiny_bench.__file__, *line.split(), TINY_BENCH_KILLED_BEFORE=json.dumps([place]))
    assert killed_at.stdout.split() == [str(-signal.SIGKILL)], killed_at.stderr
    (begun,) = runs.ids()
    assert bench(line) == 0 and runs.ids() == [begun] and runs.finished(runs.RUNS / begun)
    made = (runs.RUNS / begun / "run.json").stat().st_mtime_ns
    assert bench(line) == 0 and runs.ids() == [begun]
    assert (runs.RUNS / begun / "run.json").stat().st_mtime_ns == made
    assert bench(f"{line} --seed 1") == 0 and len(runs.ids()) == 2
    assert "Darkness" in capsys.readouterr().out


def test_images_that_show_nothing_are_counted_in_terminal_protocol_and_tables(elsewhere, tiny_pipeline, capsys):
    pipe = copy.deepcopy(tiny_pipeline)
    pipe.vae.decoder.conv_out.bias.data.fill_(1e4)  # finite, and white all over
    pipe.save_pretrained("white")
    assert bench("run --suite tiny.yaml --method sft --set model.weights=white --set evaluation.guidance=[0.5]") == 0
    told = capsys.readouterr()
    counted = "8 of 8 images show nothing (one colour, or over 99% of their values at 0 or 255), the first for"
    below = "evaluation.guidance 0.5 is below 1: the prediction leans towards the empty prompt, where diffusers'"
    assert f"warning: base, test, guidance 0.5: {counted}" in told.err
    assert f"warning: sft 1, seed 0, test, guidance 0.5: {counted}" in told.err
    assert "prompts longer than the text encoder's 8 tokens lose their end: 12 of training pairs, 4 of test" in told.err
    run = run_of("sft")
    record = json.loads((run.folder / "protocol.json").read_text())
    assert [warning.partition(":")[0] for warning in record["warnings"]] == [
        "evaluation.guidance 0.5 is below 1",
        "base, test, guidance 0.5",
        "sft 1, seed 0, test, guidance 0.5",
    ]
    assert record["warnings"][0].startswith(below)
    assert f"note: sft 1, seed 0, test, guidance 0.5: {counted}" in told.out
    assert counted in Path("report.html").read_text()
    assert bench(f"run --resume {run.id}") == 0
    assert json.loads((run.folder / "protocol.json").read_text())["warnings"] == record["warnings"]


def test_scores_of_before_there_were_checkpoints_are_not_made_again(elsewhere, monkeypatch):
    """Their files have no step, and their markers name no files."""
    shared = Shared(load_suite("tiny.yaml"))
    run = runs.create("sft", shared.suite, 0, 1)
    Experiment(run, shared).stages(lambda *scalar: None)
    before = pd.read_parquet(run.folder / "scores.parquet")
    for path in [*run.folder.glob("stages/scores*/scores.parquet"), *runs.CACHE.glob("scores-*/scores.parquet")]:
        pd.read_parquet(path).drop(columns="step").to_parquet(path)
        (path.parent / "blank.json").unlink()
        marker = path.parent / "stage.json"
        marker.write_text(
            json.dumps({name: value for name, value in json.loads(marker.read_text()).items() if name != "files"})
        )
    monkeypatch.setattr(Scorers, "score", None)
    Experiment(run, shared).stages(lambda *scalar: None)
    pd.testing.assert_frame_equal(pd.read_parquet(run.folder / "scores.parquet"), before)
