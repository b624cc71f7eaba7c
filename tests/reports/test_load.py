"""Reading runs: what belongs together, what is set apart, what is unreadable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fake_runs
import numpy as np
import pandas as pd
import pytest

from bench.errors import BenchError, UsageError
from bench.reports.cost import costs
from bench.reports.load import load_runs, prompt_texts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def test_runs_of_one_suite_are_joined_and_base_rows_counted_once(root: Path) -> None:
    fake_runs.write_all(root, seeds=(0, 1))
    runs = load_runs(None, root)
    assert list(runs.models) == ["base", "SFT", "Diffusion-DPO", "SPIN-1", "SPIN-2", "SPIN-3"]
    assert runs.problems == []
    counts = runs.scores.groupby("model", observed=True).size()
    assert counts["base"] == 24 * 2 * len(fake_runs.METRICS)
    assert counts["SPIN-2"] == 2 * counts["base"]
    assert runs.scores.loc[runs.scores["model"] == "base", "train_seed"].isna().all()
    assert set(runs.history["model"]) == set(runs.models) - {"base"}
    assert runs.groups == [("test", 1.0), ("test", 3.0)]


def test_another_suite_is_set_apart_with_the_reason(root: Path) -> None:
    fake_runs.write_run(root, "spin", created="2026-11-23T12:00:00")
    changed = {"data": {"pairs": "world", "size": 99, "seed": 0}}
    other = fake_runs.write_run(root, "sft", change=changed)
    runs = load_runs(None, root)
    assert "SFT" not in runs.models
    assert runs.problems == [
        f"{other.name}: set apart, another suite than 20261123-100000-spin-s0: data.size 99 against 2000"
    ]


def test_what_only_changes_speed_does_not_set_apart(root: Path) -> None:
    fake_runs.write_run(root, "spin")
    suite = fake_runs.suite(("test",), (1.0, 3.0), (5775709,))
    fake_runs.write_run(root, "sft", change={"train": {**suite["train"], "micro_batch": 4}, "description": "mine"})
    assert load_runs(None, root).problems == []


def test_other_settings_of_a_method_are_not_averaged_with_it(root: Path) -> None:
    fake_runs.write_run(root, "sft", 0, created="2026-11-23T12:00:00")
    fake_runs.write_run(root, "sft", 1, change={"methods": {"sft": {"iterations": [{"steps": 200, "lr": 1.0}]}}})
    runs = load_runs(None, root)
    assert len(runs.protocols) == 1
    assert "sft with other settings" in runs.problems[0]
    assert "lr 1.0 against 1e-05" in runs.problems[0]


@pytest.mark.parametrize(("section", "key"), [("train", "batch_size"), ("opponent", "guidance")])
def test_settings_that_only_one_run_of_a_method_changes_set_it_apart(root: Path, section: str, key: str) -> None:
    iterations = [{"steps": 100, "lr": 1e-5, "beta": 2000.0}]
    fake_runs.write_run(root, "spin", 0, change={"methods": {"spin": {"iterations": iterations}}})
    changed = {"spin": {"iterations": iterations, section: {key: 7}}}
    fake_runs.write_run(root, "spin", 1, change={"methods": changed}, created="2026-11-22")
    (problem,) = load_runs(None, root).problems
    assert f"spin with other settings than 20261123-100000-spin-s0: {section}.{key} 7 against" in problem


@pytest.mark.parametrize("old", [False, True])
def test_an_option_that_only_one_run_sets_counts_by_its_default_in_the_other(root: Path, old: bool) -> None:
    """min_snr apart from a run that says nothing of weightings, also one of before there were any; `constant` not."""
    declared = {"options": [{"name": "weighting", "type": "text", "meaning": "", "default": "constant"}]}

    def write(seed: int, declared: dict, **options: object) -> None:
        iterations = [{"steps": 100, "lr": 1e-5, "beta": 2000.0, **options}] * 3
        folder = fake_runs.write_run(root, "spin", seed, change={"methods": {"spin": {"iterations": iterations}}})
        protocol = json.loads((folder / "protocol.json").read_text())
        (folder / "protocol.json").write_text(json.dumps(protocol | declared))

    write(0, {} if old else declared)
    write(1, declared, weighting="constant")
    assert load_runs(None, root).problems == []
    write(2, declared, weighting="min_snr")
    problems = load_runs(None, root).problems
    assert len(problems) == 2 and all("weighting constant against min_snr" in problem for problem in problems)


def test_a_repeated_run_gives_way_to_the_newer(root: Path) -> None:
    fake_runs.write_run(root, "sft", name="old", created="2026-11-23T09:00:00")
    fake_runs.write_run(root, "sft", name="new", created="2026-11-23T10:00:00")
    runs = load_runs(None, root)
    assert set(runs.scores["run"]) == {"new"}
    assert "old: repeats" in runs.problems[0]


def test_unreadable_and_unfinished_runs_are_named_and_passed_over(root: Path) -> None:
    fake_runs.write_run(root, "spin")
    for name in ("cut", "early", "garbled", "hollow"):
        fake_runs.write_run(root, "sft", name=name)
    (root / "cut" / "scores.parquet").write_bytes((root / "cut" / "scores.parquet").read_bytes()[:300])
    (root / "early" / "scores.parquet").unlink()
    (root / "garbled" / "protocol.json").write_text("{")
    pd.DataFrame({"run": ["x"]}).to_parquet(root / "hollow" / "scores.parquet")
    (root / "notes.txt").write_text("not a run")
    runs = load_runs(None, root)
    assert list(runs.protocols) == ["20261123-100000-spin-s0"]
    assert sorted(problem.split(":")[0] for problem in runs.problems) == ["cut", "early", "garbled", "hollow"]
    assert all("\n" not in problem for problem in runs.problems)


def test_partly_finished_runs_and_bad_scores_are_told(root: Path) -> None:
    folder = fake_runs.write_run(root, "spin")
    protocol = json.loads((folder / "protocol.json").read_text()) | {"iterations": 5}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    scores = pd.read_parquet(folder / "scores.parquet")
    scores.loc[:2, "value"] = np.nan
    scores.to_parquet(folder / "scores.parquet")
    (folder / "cost.json").unlink()
    problems = "\n".join(load_runs(None, root).problems)
    assert "3 scores are not numbers" in problems
    assert "3 of 5 iterations" in problems
    assert "no cost.json" in problems


def test_base_scores_that_disagree_are_told(root: Path) -> None:
    fake_runs.write_run(root, "spin")
    folder = fake_runs.write_run(root, "sft")
    scores = pd.read_parquet(folder / "scores.parquet")
    scores.loc[scores["method"] == "base", "value"] += 1
    scores.to_parquet(folder / "scores.parquet")
    assert any("base scores differ" in problem for problem in load_runs(None, root).problems)


def test_paths_ids_and_folders_of_runs_are_found(root: Path) -> None:
    fake_runs.write_all(root)
    name = "20261123-100000-sft-s0"
    assert list(load_runs([root / name]).protocols) == [name]
    assert list(load_runs([Path(name)], root).protocols) == [name]
    assert len(load_runs([root]).protocols) == 3
    with pytest.raises(UsageError, match="did you mean"):
        load_runs([Path("20261123-100000-sft-s9")], root)
    with pytest.raises(BenchError, match="bench run"):
        load_runs(None, root / "nowhere")


def test_models_are_found_by_label_method_and_iteration(root: Path) -> None:
    fake_runs.write_all(root)
    runs = load_runs(None, root)
    found = {name: runs.resolve(name) for name in ("spin-2", "spin", "spin:1", "diffusion_dpo", "Base")}
    assert found == {
        "spin-2": "SPIN-2",
        "spin": "SPIN-3",
        "spin:1": "SPIN-1",
        "diffusion_dpo": "Diffusion-DPO",
        "Base": "base",
    }
    with pytest.raises(UsageError, match="did you mean 'SFT'"):
        runs.resolve("SFTT")


STEPS = {"sft": [100, 267, 300, 800], "spin": [200, 300, 400]}  # since the base; spin's 300 is 100 inside iteration 2


def write_with_checkpoints(root: Path, method: str, seed: int = 0) -> Path:
    """A run whose results are those of STEPS: the scores of step s are s more than those of the end."""
    folder = fake_runs.write_run(root, method, seed)
    scores = pd.read_parquet(folder / "scores.parquet").query("iteration < 2")
    results = [{"method": method, "iteration": 1, "step": s, "within": s, "end": s == 800} for s in STEPS["sft"]]
    if method == "spin":
        results = [
            {"method": method, "iteration": i, "step": s, "within": w, "end": w == 200}
            for i, s, w in ((1, 200, 200), (2, 300, 100), (2, 400, 200))
        ]
    frames = [scores.query("iteration == 0").assign(step=0)]
    for result in results:
        own = scores.query("iteration == 1").assign(iteration=result["iteration"], step=result["step"])
        frames.append(own.assign(value=own["value"] + result["step"]))
    pd.concat(frames).to_parquet(folder / "scores.parquet")
    logged = [
        {"method": method, "iteration": 1 + (method == "spin" and step > 200), "step": step, "loss": 0.1}
        for step in range(50, results[-1]["step"] + 1, 50)
    ]
    pd.DataFrame(logged).to_parquet(folder / "history.parquet")
    protocol = json.loads((folder / "protocol.json").read_text()) | {"results": results}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return folder


def test_results_inside_a_training_have_rows_of_their_own(root: Path) -> None:
    write_with_checkpoints(root, "sft")
    write_with_checkpoints(root, "spin")
    fake_runs.write_run(root, "diffusion_dpo")  # written before there were any
    runs = load_runs(None, root)
    assert list(runs.models) == [
        "base",
        "SFT@100",
        "SFT@267",
        "SFT@300",
        "SFT@800",
        "Diffusion-DPO",
        "SPIN-1",
        "SPIN-2@100",
        "SPIN-2",
    ]
    assert [result.name for result in runs.models.values()] == [
        "iter0",
        "iter1@100",
        "iter1@267",
        "iter1@300",
        "iter1",
        "iter1",
        "iter1",
        "iter2@100",
        "iter2",
    ]
    assert runs.problems == []
    means = runs.scores.query("metric == 'clip'").groupby("model", observed=True)["value"].mean()
    assert means["SFT@267"] - means["SFT@100"] == pytest.approx(167, abs=1e-3)
    assert not runs.scores.duplicated(
        ["model", "train_seed", "prompt_set", "prompt_id", "seed", "guidance", "metric"]
    ).any()
    found = {
        name: runs.resolve(name)
        for name in (
            "sft@100",
            "SFT",
            "sft:1@267",
            "spin:2@100",
            "spin:2",
            "spin@100",
            "spin-2@100",
            "sft@800",
            "diffusion_dpo@200",
        )
    }
    assert list(found.values()) == [
        "SFT@100",
        "SFT@800",
        "SFT@267",
        "SPIN-2@100",
        "SPIN-2",
        "SPIN-2@100",
        "SPIN-2@100",
        "SFT@800",
        "Diffusion-DPO",
    ]
    with pytest.raises(UsageError, match=r"no model 'sft@99'.* there are base, SFT@100"):
        runs.resolve("sft@99")


def test_a_row_of_the_log_belongs_to_the_next_result_of_its_iteration(root: Path) -> None:
    write_with_checkpoints(root, "sft")
    write_with_checkpoints(root, "spin")
    logged = load_runs(None, root).history
    steps = {model: rows["step"].tolist() for model, rows in logged.groupby("model")}
    assert steps == {
        "SFT@100": [50, 100],
        "SFT@267": [150, 200, 250],
        "SFT@300": [300],
        "SFT@800": list(range(350, 801, 50)),
        "SPIN-1": [50, 100, 150, 200],
        "SPIN-2@100": [250, 300],
        "SPIN-2": [350, 400],
    }


def test_an_unfinished_training_is_not_called_by_its_method_alone(root: Path) -> None:
    folder = write_with_checkpoints(root, "sft")
    scores = pd.read_parquet(folder / "scores.parquet")
    scores[scores["step"] <= 100].to_parquet(folder / "scores.parquet")
    assert list(load_runs(None, root).models) == ["base", "SFT@100"]


def test_checkpoints_alone_set_no_run_apart_and_the_end_is_the_same_model(root: Path) -> None:
    """The training is the same with and without."""
    write_with_checkpoints(root, "sft", 0)
    plain = fake_runs.write_run(root, "sft", 1)
    for name, checkpoints in ((f"20261123-100000-sft-s{seed}", [[100, 267, 300], []][seed]) for seed in (0, 1)):
        protocol = json.loads((root / name / "protocol.json").read_text())
        protocol["suite"]["methods"]["sft"] = {"iterations": [{"steps": 800, "lr": 1e-5, "checkpoints": checkpoints}]}
        (root / name / "protocol.json").write_text(json.dumps(protocol))
    runs = load_runs(None, root)
    assert runs.problems == []
    seeds = {model: set(rows["train_seed"]) for model, rows in runs.scores.groupby("model", observed=True)}
    assert (seeds["SFT@300"], seeds["SFT@800"]) == ({0}, {0, 1})
    assert plain.name in set(runs.scores["run"])


def test_a_checkpoint_costs_what_its_training_had_by_then(root: Path) -> None:
    for method in ("sft", "spin"):
        folder = write_with_checkpoints(root, method)
        cost = json.loads((folder / "cost.json").read_text())
        cost["checkpoints"] = [
            {
                "name": f"iter{1 + (method == 'spin')}@{step}/train",
                "seconds": step / 10,
                "pairs": 32 * step,
                "flops": 1e10 * step,
            }
            for step in (100, 267, 300)
        ]
        (folder / "cost.json").write_text(json.dumps(cost))
    price = costs(load_runs(None, root)).set_index("model")
    kinds = ["pairs", "train_flops", "sample_flops", "seconds"]
    assert price.loc["SFT@267", kinds].tolist() == [8544, 2.67e12, 0, 26.7]
    assert price.loc["SFT@800", ["pairs", "seconds"]].tolist() == [6400, 100]
    # one whole iteration with its opponent, the second's opponent, and 100 steps
    assert price.loc["SPIN-2@100", kinds].tolist() == [6400 + 3200, 2e13 + 1e12, 8e13, 60 + 100 + 60 + 10]
    assert price.loc["SPIN-2", ["pairs", "seconds"]].tolist() == [12800, 320]


def test_warnings_of_a_protocol_are_problems_said_once(root: Path) -> None:
    for method in ("sft", "spin"):
        folder = fake_runs.write_run(root, method)
        protocol = json.loads((folder / "protocol.json").read_text()) | {"warnings": ["base, test: 1 of 24 images"]}
        (folder / "protocol.json").write_text(json.dumps(protocol))
    assert load_runs(None, root).problems == ["base, test: 1 of 24 images"]


def test_results_that_are_none_leave_the_run_out(root: Path) -> None:
    fake_runs.write_run(root, "spin")
    folder = fake_runs.write_run(root, "sft")
    protocol = json.loads((folder / "protocol.json").read_text()) | {"results": [{"iteration": 1}]}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    (problem,) = load_runs(None, root).problems
    assert problem.startswith(f"{folder.name}: left out, protocol.json: results are not as bench writes them")


def test_prompt_texts_and_costs(root: Path) -> None:
    fake_runs.write_all(root, seeds=(0, 1))
    runs = load_runs(None, root)
    texts = prompt_texts(runs, "test")
    assert texts[fake_runs.prompt_id(fake_runs.HOSTILE[0])] == fake_runs.HOSTILE[0]
    price = costs(runs).set_index("model")
    assert price["pairs"].to_dict() == {
        "base": 0,
        "SFT": 6400,
        "Diffusion-DPO": 6400,
        "SPIN-1": 6400,
        "SPIN-2": 12800,
        "SPIN-3": 19200,
    }
    assert price.loc["SPIN-2", ["train_flops", "sample_flops", "seconds"]].tolist() == [4e13, 8e13, 320]


def test_reports_start_without_torch_and_plotting() -> None:
    code = (
        "import sys, bench.reports.load, bench.reports.tables, bench.reports.page; "
        "print([m for m in ('torch', 'matplotlib', 'seaborn', 'scipy', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_suite_written_before_a_setting_existed_has_its_default(root: Path) -> None:
    from bench.suites import load_suite

    suite = load_suite("mini").model_dump(mode="json")
    older = {name: value for name, value in suite["data"].items() if name not in ("flip", "precision")}
    fake_runs.write_run(root, "spin", change=suite)
    fake_runs.write_run(root, "sft", change={**suite, "data": older})
    assert load_runs(None, root).problems == []
    flipped = {**suite, "data": {**older, "flip": True}}
    other = fake_runs.write_run(root, "diffusion_dpo", created="2026-11-22", change=flipped)
    assert [problem.split(":")[0] for problem in load_runs(None, root).problems] == [other.name]
