"""Runs end to end on a random pipeline: what is on disk, pairing between runs, killing and going on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_bench
import yaml
from safetensors.torch import load_file
from tiny_bench import SPIN, bench, history_of, run_of, scores_of, start, trained, unets_of

from bench import experiment
from bench.commands.export import export_run
from bench.data import PreferenceData
from bench.errors import UsageError
from bench.experiment import Experiment
from bench.methods.signals import EVERY_TRAINING, Signal
from bench.methods.spin import SPIN as SPIN_CLASS
from bench.reports.load import load_runs
from bench.sampling.opponent import opponent_batches, opponent_keys
from bench.shared import Shared
from bench.storage import runs
from bench.suites import load_suite
from bench.walk import Opponent, walk


@pytest.fixture(scope="module")
def workplace(darkness, tiny_pipeline_folder, tmp_path_factory) -> Path:
    """A folder with the suite and the three runs of `--method all --iters 2`."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny_bench.write_suite(folder, tiny_pipeline_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bench("run --suite tiny.yaml --method all --iters 2") == 0
    return folder


@pytest.fixture
def here(workplace, monkeypatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def elsewhere(workplace, monkeypatch, tmp_path) -> Path:
    """An empty folder with the suite."""
    (tmp_path / "tiny.yaml").write_text((workplace / "tiny.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_methods_leave_a_complete_record(here):
    assert [runs.load(name).method for name in sorted(runs.ids())] == list(tiny_bench.SUITE["methods"])
    for method, iterations in {"sft": 1, "diffusion_dpo": 1, "spin": 2}.items():
        run = run_of(method)
        record = json.loads((run.folder / "protocol.json").read_text())
        assert json.loads((run.folder / "config.json").read_text()) == run.config()
        assert json.loads((run.folder / "run.json").read_text())["status"] == "COMPLETED"
        assert (record["run"], record["method"], record["iterations"]) == (run.id, method, iterations)
        assert record["prompt_sets"] == {"test": {"source": "world:test", "count": 4, "truncated": 4}}  # of 8 tokens
        assert record["data"]["truncated"] == 12 and record["warnings"] == []
        assert [(result["iteration"], result["step"], result["end"]) for result in record["results"]] == [
            (k + 1, 2 * (k + 1), True) for k in range(iterations)
        ]
        assert record["metrics"]["darkness"]["scale"] == "0 to 255"
        table = pd.read_parquet(run.folder / "scores.parquet")
        models = table[["method", "iteration"]].drop_duplicates().itertuples(index=False, name=None)
        assert list(models) == [("base", 0), *((method, k + 1) for k in range(iterations))]
        assert len(table) == (1 + iterations) * 4 * 2 * 2  # models x prompts x image seeds x guidance scales
        assert not list(run.folder.rglob(".*.tmp"))


def test_the_protocol_says_what_each_iteration_did_and_what_was_logged(here):
    record = json.loads((run_of("spin").folder / "protocol.json").read_text())
    assert (
        record["schedule"] == [{"steps": 2, "lr": 1e-3, "checkpoints": [], "beta": 1000.0, "weighting": "constant"}] * 2
    )
    assert [(option["name"], option.get("default")) for option in record["options"]] == [
        ("beta", None),
        ("weighting", "constant"),
    ]
    logged = pd.read_parquet(run_of("spin").folder / "history.parquet")
    signals = [Signal.read(signal) for signal in record["signals"]]
    assert signals == [*SPIN_CLASS.signals, *EVERY_TRAINING]
    assert {signal.name for signal in signals} <= set(logged)


def test_images_are_where_the_report_looks_and_base_images_are_shared(here):
    texts = {}
    for method in ("sft", "spin"):
        folder = run_of(method).folder / "images" / "test"
        texts = json.loads((folder / "prompts.json").read_text())
        for prompt, seed, scale in ((p, s, g) for p in texts for s in (1, 2) for g in ("g1", "g3")):
            assert (folder / scale / "iter0" / f"{prompt}-{seed}.png").is_file()
            assert (folder / scale / "iter1" / f"{prompt}-{seed}.png").is_file()
    assert len(texts) == 4
    image = Path("images", "test", "g1", "iter0", f"{next(iter(texts))}-1.png")
    assert os.path.samefile(run_of("sft").folder / image, run_of("spin").folder / image)


def test_methods_share_base_scores_and_training_order(here):
    tables = [scores_of(run_of(method).folder).query("method == 'base'") for method in ("sft", "spin")]
    pd.testing.assert_frame_equal(*tables)


def test_sacred_holds_the_history(here):
    run = run_of("spin")
    history = pd.read_parquet(run.folder / "history.parquet")
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert history[["method", "iteration", "step"]].values.tolist() == [
        ["spin", 1, 1],
        ["spin", 1, 2],
        ["spin", 2, 3],
        ["spin", 2, 4],
    ]
    assert metrics["loss"]["values"] == pytest.approx(history["loss"])
    assert metrics["loss"]["steps"] == [1, 2, 3, 4]
    assert "training" in (run.folder / "cout.txt").read_text()
    assert "\r" not in (run.folder / "cout.txt").read_text()


def test_every_iteration_of_self_play_starts_level_with_its_reference(here):
    history = pd.read_parquet(run_of("spin").folder / "history.parquet")
    assert history["loss"][[0, 2]].tolist() == pytest.approx([np.log(2)] * 2, abs=1e-6)


def test_cost_counts_what_training_and_self_play_took(here):
    cost = {
        method: json.loads((run_of(method).folder / "cost.json").read_text())
        for method in ("sft", "diffusion_dpo", "spin")
    }
    assert [cost[method]["pairs_seen"] for method in cost] == [8, 8, 16]
    assert cost["diffusion_dpo"]["train_flops"] / cost["sft"]["train_flops"] == pytest.approx(8 / 3)
    assert cost["spin"]["sample_flops"] > 0 == cost["diffusion_dpo"]["sample_flops"]
    assert [stage["name"] for stage in cost["spin"]["stages"]][:3] == [
        "iter1/opponent",
        "iter1/train",
        "iter1/images/test-g1",
    ]


def test_a_checkpoint_loads_in_plain_diffusers(here):
    from diffusers import UNet2DConditionModel

    first = UNet2DConditionModel.from_pretrained(run_of("spin").folder / "iter1", subfolder="unet")
    second = UNet2DConditionModel.from_pretrained(run_of("spin").folder / "iter2", subfolder="unet")
    assert not np.allclose(first.conv_in.weight.detach(), second.conv_in.weight.detach())


def test_export_loads_whole_and_tells_protocol_and_scores(here, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    run = run_of("spin")
    export_run(run.id, 1, tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    trained = experiment.models.load_unet(run.folder / "iter1" / "unet")
    assert torch.equal(pipe.unet.conv_in.weight, trained.conv_in.weight)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red cat", num_inference_steps=1).images[0].size == (64, 64)
    card = (tmp_path / "model" / "README.md").read_text()
    for text in (
        run.id,
        "SPIN-Diffusion, iteration 1",
        "world:test",
        "guidance 1, 3",
        "protocol `mean`",
        "| base | ",
        "SPIN-1",
        "- test at guidance 3: ",
        "about checkpoints",
        "One training seed",
    ):
        assert text in card
    assert "SPIN-2" not in card
    with pytest.raises(UsageError, match="exists and is not empty"):
        export_run(run.id, 1, tmp_path / "model")
    with pytest.raises(UsageError, match="has no iteration 3; it has 1, 2"):
        export_run(run.id, 3, tmp_path / "other")


def test_run_ends_with_the_comparison_and_the_page(here, capsys):
    assert bench(f"run --resume {run_of('sft').id}") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("base", "SFT", "Diffusion-DPO", "SPIN-2"))
    assert out.splitlines()[-1] == "report.html"
    assert Path("report.html").is_file()
    assert bench("table --format json") == 0
    models = {row["model"] for row in json.loads(capsys.readouterr().out)}
    assert models == {"base", "SFT", "Diffusion-DPO", "SPIN-1", "SPIN-2"}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--seed 1", "another seed: it was started with 0, not 1"),
        ("--iters 3", "another iterations: it was started with 2, not 3"),
        ("--method sft", "another method: it was started with spin, not sft"),
        ("--set train.batch_size=8", "another train.batch_size: it was started with 4, not 8"),
        ("--suite mini", "another name: it was started with tiny, not mini"),
    ],
)
def test_resume_refuses_other_settings(here, capsys, option, said):
    assert bench(f"run --resume {run_of('spin').id} {option}") == 2
    assert said in capsys.readouterr().err


def test_resume_does_nothing_twice(here, monkeypatch):
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr(experiment, "Sampler", None)
    monkeypatch.setattr("bench.scoring.evaluation.Sampler", None)
    run = run_of("spin")
    before = scores_of(run.folder)
    assert bench(f"run --resume {run.id}") == 0
    pd.testing.assert_frame_equal(scores_of(run.folder), before)


def test_another_scorer_reads_the_images_that_are_there(here, elsewhere, monkeypatch):
    assert bench("run --suite tiny.yaml --method sft --set metrics=[judge]") == 0
    run = run_of("sft")
    assert scores_of(run.folder)["metric"].str.startswith("judge/").all()
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr("bench.scoring.evaluation.Sampler", None)
    settings = (run.folder / "config.json").read_text()
    assert bench(f"run --resume {run.id} --set metrics=[darknes]") == 2
    assert (run.folder / "config.json").read_text() == settings
    assert bench(f"run --resume {run.id} --set metrics=[darkness]") == 0
    assert list(json.loads((run.folder / "protocol.json").read_text())["metrics"]) == ["darkness"]
    assert runs.load(run.id).suite.metrics == ["darkness"]
    again = scores_of(run.folder)
    monkeypatch.chdir(here)
    pd.testing.assert_frame_equal(again, scores_of(run_of("sft").folder))


def test_a_variant_has_a_column_of_its_own_beside_its_method(elsewhere, capsys):
    """The same settings under another name make the same model; a stronger opponent makes another one."""
    suite = yaml.safe_load(Path("tiny.yaml").read_text())
    spin = suite["methods"]["spin"]
    suite["methods"] |= {
        "spin-same": {"method": "spin", **spin},
        "spin-g3": {"method": "spin", "opponent": {"guidance": 3.0}, **spin},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(suite))
    for name in ("spin", "spin-same", "spin-g3"):
        assert bench(f"run --suite tiny.yaml --method {name}") == 0
    capsys.readouterr()
    assert bench("table --format json") == 0
    rows = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert list(rows["model"].unique()) == ["base", "SPIN-Diffusion", "spin-g3", "spin-same"]
    values = {
        name: scores_of(run_of(name).folder).query("method != 'base'")["value"].tolist()
        for name in ("spin", "spin-same", "spin-g3")
    }
    assert values["spin"] == values["spin-same"] != values["spin-g3"]
    record = json.loads((run_of("spin-g3").folder / "protocol.json").read_text())
    assert record["method_title"] == "spin-g3"
    assert record["suite"]["methods"]["spin-g3"]["method"] == "spin"
    export_run(run_of("spin-g3").id, 1, Path("exported"))
    assert "(self-play only): 2 ddim steps, guidance 3\n" in Path("exported/README.md").read_text()


def test_human_losers_are_read_only_by_methods_on_human_pairs(elsewhere, monkeypatch):
    read = []
    losers = PreferenceData.losers
    monkeypatch.setattr(PreferenceData, "fingerprint", "probe")  # it draws a loser of its own
    monkeypatch.setattr(PreferenceData, "losers", lambda self, rows: read.append(rows) or losers(self, rows))
    shared = Shared(load_suite("tiny.yaml"))
    for method, reads in (("sft", False), ("spin", False), ("diffusion_dpo", True)):
        trained(runs.create(method, shared.suite, 0, 1), shared)
        assert bool(read) == reads


def test_opponents_are_new_each_iteration_and_differ_where_prompts_repeat():
    first, again, second = (opponent_keys(["a red cat"] * 3, 0, iteration) for iteration in (1, 1, 2))
    assert first == again
    assert len({*first, *second}) == 6 and {prompt for _, prompt in first} == {"a red cat"}


def test_each_iteration_samples_only_the_losers_it_trains_on(here):
    run = run_of("spin")
    seen = [np.load(run.folder / "stages" / f"opponent{k}" / "pairs.npy") for k in (1, 2)]
    assert len(seen[0]) == 8  # 2 steps of 4
    assert set(np.concatenate(seen)) == set(range(12))  # the second iteration goes on in the data


def test_interrupting_says_how_to_go_on_and_going_on_ends_the_same(here, elsewhere, monkeypatch, capsys):
    """Stopped in its second iteration and resumed, a run's table is that of the undisturbed one."""
    train, calls = experiment.train, []

    def stopped(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(experiment, "train", stopped)
    assert bench("run --suite tiny.yaml --method spin --iters 2") == 130
    run = run_of("spin")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"bench: interrupted; to go on: bench run --resume {run.id}"
    assert json.loads((run.folder / "run.json").read_text())["status"] == "INTERRUPTED"
    assert bench(f"run --resume {run.id}") == 0
    assert len(calls) == 3
    resumed = scores_of(run.folder)
    monkeypatch.chdir(here)
    pd.testing.assert_frame_equal(resumed, scores_of(run_of("spin").folder))


def test_killed_in_every_stage_and_resumed_the_table_is_the_same(here, elsewhere, monkeypatch):
    """kill -9 while opponents are sampled, after training, while images are drawn and while they are scored."""
    places = [
        r"/\.opponent2\..*/000001\.json$",
        r"runs/[^/]+/iter2$",
        r"g3/\.iter2\..*/000002\.json$",
        r"/\.scores2-test-g3\..*/000000\.json$",
    ]
    done = start(tiny_bench.__file__, *SPIN.split(), TINY_BENCH_KILLED_BEFORE=json.dumps(places))
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(places), done.stderr
    run = run_of("spin")
    assert (run.folder / "iter2" / "stage.json").exists()
    assert (run.folder / "images" / "test" / "g3" / "iter2" / "stage.json").exists()
    assert not runs.finished(run.folder)
    assert list(run.folder.rglob(".*.part"))
    assert bench(f"run --resume {run.id}") == 0
    assert not [*run.folder.rglob(".*.tmp"), *run.folder.rglob(".*.part"), *run.folder.rglob("pieces")]
    resumed, history = scores_of(run.folder), history_of(run.folder)
    monkeypatch.chdir(here)
    pd.testing.assert_frame_equal(resumed, scores_of(run_of("spin").folder), check_exact=True)
    pd.testing.assert_frame_equal(history, history_of(run_of("spin").folder), check_exact=True)


def test_two_processes_make_the_run_that_one_makes(here, elsewhere, monkeypatch):
    """Equal samples of the opponent and equal signals to the last bit: a process's share of a training batch is one
    micro-batch. Of the second iteration's weights the last bit depends on the processor (on a Zen 4 they differ by
    1.5e-8, on others by nothing), and with it the last grey level of an image.

    A result inside their second iteration, which the one process did not make, changes nothing.
    """
    done = start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tiny_bench.__file__,
        *SPIN.split(),
        "--set",
        "methods.spin.iterations=[{steps: 2, lr: 1e-3, beta: 1000.0}, "
        "{steps: 2, lr: 1e-3, beta: 1000.0, checkpoints: [1]}]",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "report.html"
    assert "1 of 2 processes" in done.stderr
    run = run_of("spin")  # the only one
    assert runs.finished(run.folder)
    assert not [*run.folder.rglob(".*.tmp"), *run.folder.rglob(".*.part"), *run.folder.rglob("pieces")]
    scores, history = pd.read_parquet(run.folder / "scores.parquet").drop(columns="run"), history_of(run.folder)
    assert scores["step"].unique().tolist() == [0, 2, 3, 4]
    scores = scores[scores["step"] != 3].reset_index(drop=True)
    losers = np.load(run.folder / "stages" / "opponent1" / "latents.npy")
    monkeypatch.chdir(here)
    alone = run_of("spin").folder
    np.testing.assert_array_equal(losers, np.load(alone / "stages" / "opponent1" / "latents.npy"))
    pd.testing.assert_frame_equal(history, history_of(alone), check_exact=True)
    weights = {
        folder: load_file(folder / "iter2/unet/diffusion_pytorch_model.safetensors")
        for folder in (alone, elsewhere / run.folder)
    }
    ours, theirs = weights.values()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-7
    expected = pd.read_parquet(alone / "scores.parquet").drop(columns="run")
    first, exact = expected["iteration"] < 2, {"check_exact": True}
    pd.testing.assert_frame_equal(scores[first], expected[first], **exact)
    pd.testing.assert_frame_equal(scores, expected, check_exact=False, rtol=0, atol=0.001 * expected["value"].std())


def test_results_inside_self_play_are_counted_evaluated_and_exported(elsewhere, here, monkeypatch):
    """And the iterations are those of a run without, which the reference of the second shows too."""
    monkeypatch.chdir(elsewhere)
    assert bench(f"{SPIN} --set methods.spin.iterations.0.checkpoints=[1]") == 0
    run = run_of("spin")
    scores, record = scores_of(run.folder), json.loads((run.folder / "cost.json").read_text())
    assert scores[["iteration", "step"]].drop_duplicates().values.tolist() == [[0, 0], [1, 1], [1, 2], [2, 3], [2, 4]]
    assert [(entry["name"], entry["pairs"]) for entry in record["checkpoints"]] == [
        ("iter1@1/train", 4),
        ("iter2@1/train", 4),
    ]
    train = {entry["name"]: entry for entry in record["stages"] if entry["name"].endswith("/train")}
    assert set(train) == {"iter1/train", "iter2/train"} and record["pairs_seen"] == 16
    for entry in record["checkpoints"]:
        whole = train[entry["name"].replace("@1", "")]
        assert entry["flops"] * 2 == whole["flops"] and 0 < entry["seconds"] < whole["seconds"]
    assert list(load_runs([run.folder]).models) == ["base", "SPIN-1@1", "SPIN-1", "SPIN-2@1", "SPIN-2"]
    export_run(run.id, 2, Path("model"), 1)
    assert (Path("model") / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == unets_of(run)["iter2@1"]
    card = Path("model/README.md").read_text()
    assert "# SPIN-Diffusion, iteration 2, after 1 steps of it" in card and "| SPIN-2@1 |" in card
    with pytest.raises(UsageError, match="has no result after 3 steps of iteration 2; it has 1, 2"):
        export_run(run.id, 2, Path("other"), 3)
    ends = scores[scores["step"] % 2 == 0].reset_index(drop=True)
    monkeypatch.chdir(here)
    pd.testing.assert_frame_equal(ends, scores_of(run_of("spin").folder), check_exact=True)


@pytest.mark.parametrize("setting", ["steps=3", "guidance=2.0", "roundtrip=true", "batch_size=2"])
def test_what_an_opponent_is_made_with_decides_whether_it_is_made_again(elsewhere, setting):
    made = []
    for settings in ([], [f"opponent.{setting}"]):
        shared = Shared(load_suite("tiny.yaml", settings))
        run = runs.Run("x", "spin", 0, 1, shared.suite)
        opponent = next(stage for stage in walk(shared.suite, "spin", 1) if isinstance(stage, Opponent))
        made.append(Experiment(run, shared).opponent(opponent))
        made[-1] = made[-1].hash, np.load(made[-1].directory / "latents.npy")
    (first, before), (second, after) = made
    assert (first == second) == np.array_equal(before, after) == (setting == "batch_size=2")


def test_batches_of_the_opponent_hold_each_row_once_and_are_not_small():
    keys = [(seed, f"{row}") for seed, rows in enumerate([70, 20, 7, 5, 3, 2, 1]) for row in range(rows)]
    few, many = keys[:-3], keys + [(seed, "x") for seed in range(10, 80)]
    assert [len(batch) for batch in opponent_batches(few, 32)] == [32, 32, 6, 20, 7, 5, 3]
    batches = opponent_batches(many, 32)
    assert sorted(row for batch in batches for row in batch) == list(range(len(many)))
    assert [len(batch) for batch in batches] == [32, 32, 20, 32, 32, 30]
