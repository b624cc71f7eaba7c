"""`bench search`: grids and budgets, trials that are each done once, choices and their edges, kills and imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny_bench
import yaml
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial
from tiny_bench import bench

from bench import experiment
from bench.commands import cli
from bench.commands import search as search_command
from bench.errors import UsageError
from bench.reports.stats import estimates
from bench.sampling.sample import Sampler
from bench.scoring import evaluation
from bench.search import choice, grids, queue, search
from bench.search.queue import Cell, Study, open_storage
from bench.storage import runs, stages
from bench.suites import Suite, load_suite, override

SEARCH = {
    "seeds": [100, 101],
    "prompts": "world:validation",
    "limit": 3,
    "metric": "darkness",
    "grids": {"spin": [{"lr": [1e-3, 1e-2, 1e30]}, {"lr": [1e-4, 1e-3, 1e30]}]},
}  # the last ones break their training
SFT = {"steps": [4], "lr": [1e-3, 1e-2, 1e-1]}
LINE = "search --suite tiny.yaml"

pytestmark = pytest.mark.usefixtures("darkness")


def write_suite(folder: Path, weights: Path, **changes: object) -> None:
    evaluation = {**tiny_bench.SUITE["evaluation"], "seeds": [1]}
    suite = {
        **tiny_bench.SUITE,
        "evaluation": evaluation,
        "model": {"weights": str(weights)},
        "search": SEARCH,
        **changes,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))


@pytest.fixture(scope="module")
def undisturbed(darkness, tiny_pipeline_folder, tmp_path_factory) -> Path:
    """A folder in which one worker has searched everything."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_suite(folder, tiny_pipeline_folder)
    made = {"opponents": 0, "bases": 0}

    def counted(kind: str) -> Callable[..., Sampler]:
        def make(*arguments: object, **options: object) -> Sampler:
            made[kind] += 1
            return Sampler(*arguments, **options)

        return make

    score = evaluation.Evaluator.score

    def scored(self: evaluation.Evaluator, model: evaluation.Model, *rest: object) -> object:
        with pytest.MonkeyPatch.context() as patch:
            if model.result.iteration == 0:
                patch.setattr(evaluation, "Sampler", counted("bases"))
            return score(self, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(experiment, "Sampler", counted("opponents"))
        patch.setattr(evaluation.Evaluator, "score", scored)
        assert bench(f"{LINE} -o tried.csv") == 0
        assert bench(f"{LINE} -o tried.parquet") == 0
    (folder / "sampled.json").write_text(json.dumps(made))
    return folder


@pytest.fixture
def elsewhere(tiny_pipeline_folder, monkeypatch, tmp_path) -> Path:
    """A folder with the suite alone."""
    write_suite(tmp_path, tiny_pipeline_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(**changes: object) -> Suite:
    return Suite.model_validate({**tiny_bench.SUITE, "model": {"weights": "mini"}, "search": {**SEARCH, **changes}})


def finished(storage: BaseStorage) -> list[tuple]:
    """(study, cell) of every trial that is COMPLETE."""
    return [
        (study.study_name, queue.cell_of(trial))
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id)
        if trial.state == TrialState.COMPLETE
    ]


# grids


def test_a_grid_is_every_combination_over_what_the_entry_lists():
    suite = tiny(grids={"spin": [{"beta": [10.0, 20.0], "lr": [1e-4, 2e-4]}]})
    assert grids.settings(suite, "spin", 1) == [
        {"steps": 2, "lr": 1e-4, "beta": 10.0},
        {"steps": 2, "lr": 2e-4, "beta": 10.0},
        {"steps": 2, "lr": 1e-4, "beta": 20.0},
        {"steps": 2, "lr": 2e-4, "beta": 20.0},
    ]
    assert grids.text({"steps": 2, "lr": 2e-4, "beta": 20.0}) == "steps=2 lr=0.0002 beta=20"


def test_the_measured_suite_gives_every_method_the_same_budget():
    suite = load_suite("mini-measured")
    grids.check(suite)
    budgets = {
        entry: sum(
            setting["steps"] for number in range(1, len(grid) + 1) for setting in grids.settings(suite, entry, number)
        )
        for entry, grid in suite.search.grids.items()
    }
    assert budgets == dict.fromkeys(("sft", "diffusion_dpo", "spin", "spin-g3"), 9 * 300)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sft": [{"steps": [4], "lr": [1e-3, 1e-2]}]}, "sft 2 settings an iteration, 32 pairs; spin 3"),
        (
            {"sft": [{"steps": [3], "lr": [1e-3, 1e-2, 1e-1]}]},
            "sft 3 settings an iteration, 36 pairs; spin 3 settings an iteration, 48 pairs",
        ),
        ({"spin": [{"lr": [1e-3, 1e-2]}, {"lr": [1e-4, 1e-3, 1e-2, 1e-1]}]}, "spin 2 or 4 settings an iteration"),
        ({"spin": [{"lr": [1e-3, 1e-2, -1.0]}, {"lr": [1e-4, 1e-3, 1e-2]}]}, "search.grids.spin.0.lr"),
        (
            {"sft": [{"steps": [4], "lrr": [1e-3, 1e-2, 1e-1]}]},
            "unknown setting 'search.grids.sft.0.lrr' (did you mean 'lr'?)",
        ),
        ({"sft": [{"steps": [4], "lr": [1e-3, 1e-3, 1e-1]}]}, "names a setting twice"),
        ({"spn": SEARCH["grids"]["spin"]}, "did you mean 'spin'"),
    ],
)
def test_unequal_or_impossible_grids_are_refused(changed, said):
    with pytest.raises(UsageError) as caught:
        grids.check(tiny(grids={"sft": [SFT], **SEARCH["grids"], **changed}))
    assert said in str(caught.value)


def test_a_larger_batch_is_a_larger_budget():
    suite = tiny(grids={"sft": [SFT], **SEARCH["grids"]})
    sft = suite.methods["sft"].model_copy(update={"train": {"batch_size": 8}})
    with pytest.raises(UsageError, match="96 pairs; spin 3 settings an iteration, 48 pairs"):
        grids.check(suite.model_copy(update={"methods": {**suite.methods, "sft": sft}}))


def test_a_repeated_seed_is_no_second_training():
    with pytest.raises(UsageError, match="a seed twice"):
        grids.check(tiny(seeds=[100, 100]))


@pytest.mark.parametrize(
    ("best", "ends", "found"),
    [
        ({"lr": 2e-4, "beta": 20, "steps": 5}, {}, {}),  # a list of one was not searched
        ({"lr": 1e-4, "beta": 20, "steps": 5}, {}, {"lr": ("low", 5e-5)}),
        ({"lr": 6e-4, "beta": 30, "steps": 5}, {}, {"lr": ("high", 1.8e-3), "beta": ("high", 45)}),
        ({"lr": 1e-4, "beta": 30, "steps": 5}, {"lr": "low"}, {"beta": ("high", 45)}),
        ({"lr": 6e-4, "beta": 20, "steps": 5}, {"lr": "low"}, {"lr": ("high", 1.8e-3)}),
    ],
)
def test_edges_say_where_a_grid_must_grow(best, ends, found):
    grid = {"steps": [5], "lr": [2e-4, 1e-4, 6e-4], "beta": [20, 30, 10]}
    assert grids.edges(grid, best, ends) == found


def test_an_edge_that_no_setting_can_pass_is_none():
    assert grids.edges({"steps": [1, 2, 3]}, {"steps": 1, "lr": 1e-3}, {}) == {}  # 0.5, in whole numbers 0, is no step


# the queue


@pytest.fixture(params=["journal", "database"])
def storage(request, tmp_path) -> BaseStorage:
    return open_storage(tmp_path, None if request.param == "journal" else f"sqlite:///{tmp_path}/trials.db")


CELLS = {Cell(f"lr={lr}", seed): {"lr": lr} for lr in (0.1, 0.2) for seed in (7, 8)}


def test_every_cell_is_claimed_once_and_finished_once(storage):
    ours, theirs = Study(storage, "s"), Study(storage, "s")
    taken = []
    while claim := (ours, theirs)[len(taken) % 2].claim(CELLS):
        with claim:
            assert claim.finish(len(taken), gain=0.5)
        taken.append(claim.cell)
    assert sorted(taken) == sorted(CELLS)
    assert sorted(cell for _, cell in finished(storage)) == sorted(CELLS)
    assert {trial.user_attrs["gain"] for trial in ours.done().values()} == {0.5}


def test_what_is_being_worked_on_is_not_taken_and_what_was_left_is(storage):
    study = Study(storage, "s")
    claims = [study.claim(CELLS) for _ in CELLS]
    assert study.claim(CELLS) is None
    with pytest.raises(KeyboardInterrupt), claims[0]:
        raise KeyboardInterrupt
    again = study.claim(CELLS)
    assert again.cell == claims[0].cell and again.number != claims[0].number


def test_of_two_trials_put_in_line_for_a_cell_only_the_first_is_done(storage):
    study = Study(storage, "s")
    cell, setting = next(iter(CELLS.items()))
    for _ in range(2):  # as two workers that start at the same moment would
        storage.create_new_trial(
            study.study, create_trial(state=TrialState.WAITING, user_attrs={"setting": setting, "seed": cell.seed})
        )
    with study.claim({cell: setting}) as claim:
        claim.finish(1.0)
    assert study.claim({cell: setting}) is None
    states = [trial.state for trial in storage.get_all_trials(study.study)]
    assert states == [TrialState.COMPLETE, TrialState.FAIL]


def test_a_dead_process_of_this_host_gives_its_trial_back_at_once(storage):
    study = Study(storage, "s")
    claim = study.claim(CELLS)
    process = subprocess.Popen([sys.executable, "-c", ""])
    storage.set_trial_user_attr(claim.number, "worker", f"{process.pid}@{queue.socket.gethostname()}")
    process.wait()
    assert study.claim(CELLS).cell == claim.cell


def test_a_worker_elsewhere_is_gone_when_it_shows_no_life(storage, monkeypatch):
    study = Study(storage, "s")
    claim = study.claim(dict([next(iter(CELLS.items()))]))
    storage.set_trial_user_attr(claim.number, "worker", "1@another-host")
    clock = [0.0]
    monkeypatch.setattr(queue.time, "monotonic", lambda: clock[0])
    only = {claim.cell: CELLS[claim.cell]}
    assert study.claim(only) is None
    clock[0] = queue.GRACE
    storage.set_trial_user_attr(claim.number, "beat", 1)
    assert study.claim(only) is None
    clock[0] = 2 * queue.GRACE + 1
    assert study.claim(only).cell == claim.cell
    assert not claim.finish(1.0)  # it was alive after all, and too late
    assert finished(storage) == []


def test_a_claim_shows_life(storage, monkeypatch):
    monkeypatch.setattr(queue, "BEAT", 0.01)
    study = Study(storage, "s")
    with study.claim(CELLS) as claim:
        while "beat" not in storage.get_trial(claim.number).user_attrs:
            pass
        assert storage.get_trial(claim.number).user_attrs["worker"].startswith(f"{os.getpid()}@")


def test_an_address_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="--storage nonsense: cannot be used"):
        open_storage(tmp_path, "nonsense")


# choices


def trials(values: dict[float, np.ndarray], scores: bool = True) -> dict:
    """Finished trials by cell; `values`: per-prompt utilities [seeds, prompts] by lr."""
    return {
        Cell(grids.text({"steps": 5, "lr": lr}), seed): create_trial(
            value=float(rows.mean()),
            user_attrs={"gain": float(rows.mean()) - 0.5, "prompts": rows.tolist() if scores else None},
        )
        for lr, table in values.items()
        for seed, rows in enumerate(table)
    }


LRS = [1e-4, 2e-4, 4e-4]
SETTINGS = [{"steps": 5, "lr": lr} for lr in LRS]


def chosen(values: dict, scores: bool = True, **ends: str) -> choice.Choice:
    return choice.choose(SETTINGS, (0, 1), trials(values, scores), {"lr": LRS}, ends)


def test_the_best_mean_over_seeds_is_chosen_with_its_gap():
    rng = np.random.default_rng(0)
    base = rng.normal(0.6, 0.1, (2, 50))
    values = {1e-4: base - 0.1, 2e-4: base + rng.normal(0.05, 0.02, (2, 50)), 4e-4: base}
    made = chosen(values)
    assert made.best == SETTINGS[1] and made.runner_up == SETTINGS[2] and not made.edges
    assert made.utility == pytest.approx(values[2e-4].mean()) and made.gain == pytest.approx(made.utility - 0.5)
    found = estimates((values[2e-4] - values[4e-4])[None])
    assert made.gap == (found.low[0], found.high[0], found.value[0], "prompts and seeds") and found.low[0] > 0
    line = choice.verdict("sft 1", made, "judge/utility", "3 settings with 2 seeds")
    assert line.startswith("sft 1: chosen steps=5 lr=0.0002: judge/utility 0.6") and "not told apart" not in line


def test_a_lead_within_its_interval_is_said_not_to_be_told_apart():
    rng = np.random.default_rng(1)
    values = {lr: rng.normal(mean, 0.3, (2, 20)) for lr, mean in zip(LRS, (0.0, 0.61, 0.6), strict=True)}
    made = chosen(values)
    assert made.gap.low < 0 < made.gap.value
    assert "not told apart from this runner-up" in choice.verdict("sft 1", made, "judge/utility", "")


def test_without_scores_of_prompts_the_interval_is_over_seeds_alone():
    values = {1e-4: np.zeros((2, 1)), 2e-4: np.array([[0.5], [0.8]]), 4e-4: np.array([[0.4], [0.5]])}
    low, high, value, over = chosen(values, scores=False).gap  # of 0.1 and 0.3: t(1) = 12.706, s / sqrt(2) = 0.1
    assert (low, high, value) == pytest.approx((0.2 - 1.2706, 0.2 + 1.2706, 0.2), abs=1e-4) and over == "seeds alone"


def test_the_best_at_an_edge_is_not_called_chosen():
    values = {1e-4: np.full((2, 3), 0.7), 2e-4: np.full((2, 3), 0.6), 4e-4: np.full((2, 3), 0.5)}
    made = chosen(values)
    line = choice.verdict("sft 1", made, "judge/utility", "")
    assert line.startswith("sft 1: best so far steps=5 lr=0.0001")
    assert line.endswith("NOT CHOSEN: the best lies at the edge of its grid, lr=0.0001 is the lowest (add 5e-05)")
    assert not chosen(values, lr="low").edges


def test_nothing_is_chosen_before_every_setting_has_every_seed():
    done = trials(dict.fromkeys(LRS, np.ones((2, 3))))
    del done[Cell("steps=5 lr=0.0002", 1)]
    assert choice.choose(SETTINGS, (0, 1), done, {"lr": LRS}, {}) is None


def test_a_setting_that_breaks_one_training_is_out():
    values = {1e-4: np.zeros((2, 3)), 2e-4: np.full((2, 3), 0.1), 4e-4: np.full((2, 3), 0.9)}
    values[4e-4][1] = -np.inf
    made = chosen(values)
    assert made.best == SETTINGS[1] and made.runner_up == SETTINGS[0]


# the suite


def test_a_run_keeps_nothing_of_the_search():
    suite = tiny()
    assert "search" not in suite.model_dump()
    assert override(suite, ["evaluation.steps=3"]).search == suite.search
    assert override(suite, ["search.limit=9"]).search.limit == 9


def test_runs_of_a_suite_with_and_without_a_search_are_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    monkeypatch.setattr(runs, "finished", lambda folder: True)
    suite = tiny()
    before = runs.create("sft", suite, 0, 1)  # its folder has lost the search
    assert [run.id for run in runs.comparable(before)] == [before.id]


# the command


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": "world:test"}, "3 of 3 prompts of world:test are in evaluation.prompt_sets.test too"),
        ({"metric": "darknes"}, "did you mean 'darkness'"),
        ({"metric": "judge/utility"}, "the suite has no 'judge/utility'"),
        ({"grids": {"sft": [{"beta": [1.0, 2.0, 3.0]}]}}, "unknown setting 'search.grids.sft.0.beta'; sft takes"),
    ],
)
def test_a_search_that_cannot_be_is_refused(elsewhere, tiny_pipeline_folder, capsys, change, said):
    write_suite(elsewhere, tiny_pipeline_folder, search={**SEARCH, **change})
    assert bench(LINE) == 2
    assert said in capsys.readouterr().err


def test_methods_without_a_grid_and_suites_without_a_search_are_named(elsewhere, capsys):
    assert bench(f"{LINE} spn") == 2 and "did you mean 'spin'" in capsys.readouterr().err
    assert bench("search --suite mini") == 2 and "no search section" in capsys.readouterr().err
    assert bench(f"{LINE} -o tried.txt") == 2 and ".csv or .parquet" in capsys.readouterr().err
    assert bench(f"{LINE} --worker -o tried.csv") == 2 and "does not go with --worker" in capsys.readouterr().err


def test_the_table_holds_everything_tried_and_the_gains_are_those_of_a_run(undisturbed, monkeypatch, capsys):
    monkeypatch.chdir(undisturbed)
    tried = pd.read_csv("tried.csv")
    assert list(tried.columns) == [
        "entry",
        "iteration",
        "steps",
        "lr",
        "beta",
        "seed",
        "pairs",
        "utility",
        "gain",
        "gain_g1",
        "gain_g3",
        "after",
        "identity",
    ]
    assert len(tried) == 12 and len(tried.drop_duplicates(["entry", "iteration", "steps", "lr", "seed"])) == 12
    assert (np.isneginf(tried["utility"]) == tried["lr"].eq(1e30)).all()
    second = tried[tried["iteration"] == 2]
    assert set(second["after"]) == {"steps=2 lr=0.01 beta=1000"}
    row = second[second["lr"].eq(1e-3) & second["seed"].eq(101)].iloc[0]
    iterations = json.dumps([{"steps": 2, "lr": lr, "beta": 1000.0} for lr in (1e-2, 1e-3)], separators=(",", ":"))
    validation = json.dumps({"validation": {"prompts": "world:validation", "limit": 3}}, separators=(",", ":"))
    assert (
        bench(
            f"run --suite tiny.yaml --method spin --seed 101 --set 'methods.spin.iterations={iterations}' "
            f"--set 'evaluation.prompt_sets={validation}'"
        )
        == 0
    )
    (run,) = runs.ids()
    scores = pd.read_parquet(runs.RUNS / run / "scores.parquet").astype({"value": float})
    means = scores[scores["metric"] == "darkness"].groupby(["iteration", "guidance"])["value"].mean()
    assert row["utility"] == pytest.approx(means[2].mean(), rel=1e-8)
    assert row["gain_g3"] == pytest.approx(means[2][3.0] - means[0][3.0], rel=1e-6)


def test_trials_share_the_base_and_their_opponents_and_leave_what_the_next_iteration_needs(undisturbed):
    made = json.loads((undisturbed / "sampled.json").read_text())
    assert made == {"opponents": 2 * 2, "bases": 2}  # a seed and iteration; a guidance scale
    left = sorted(path.name for path in (undisturbed / "results/search").glob("*/*"))
    setting = stages.fingerprint("steps=2 lr=0.01 beta=1000")[:8]
    assert left == [f"s100-{setting}", f"s101-{setting}"]


def test_two_workers_one_of_them_killed_do_every_setting_once_as_one_alone_would(undisturbed, elsewhere):
    def worker(line: str, dies: int | None = None) -> int:
        process = os.fork()
        if not process:
            try:
                if dies:
                    tiny_bench.die_at(dies)
                cli.main(line.split())
            except SystemExit as end:
                os._exit(end.code)
            finally:
                os._exit(99)
        return process

    doomed, other = worker(f"{LINE} --worker", dies=2), worker(f"{LINE} -o tried.parquet")
    ended = {process: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in (doomed, other)}
    assert ended == {doomed: -signal.SIGKILL, other: 0}
    done = finished(open_storage(Path("results/search")))
    assert len(done) == len(set(done)) == 12
    order = ["iteration", "lr", "seed"]
    one, two = (
        pd.read_parquet(folder / "tried.parquet").sort_values(order, ignore_index=True)
        for folder in (undisturbed, elsewhere)
    )
    pd.testing.assert_frame_equal(one, two, check_exact=True)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_imported_table_is_gone_on_from(undisturbed, elsewhere, capsys, monkeypatch, suffix):
    monkeypatch.setattr(search.Trials, "do", None)  # nothing is left to do
    assert bench(f"{LINE} --import {undisturbed / 'tried'}.{suffix} -o tried.{suffix}") == 0
    shown = capsys.readouterr()
    assert "12 of 12 results taken" in shown.err
    assert ("over seeds alone" in shown.out) == (suffix == "csv")
    if suffix == "csv":
        assert Path("tried.csv").read_text() == (undisturbed / "tried.csv").read_text()
    else:
        pd.testing.assert_frame_equal(pd.read_parquet("tried.parquet"), pd.read_parquet(undisturbed / "tried.parquet"))


def test_a_table_of_another_suite_is_refused(undisturbed, elsewhere, capsys):
    assert bench(f"{LINE} --import {undisturbed / 'tried.csv'} --set train.weight_decay=0.5") == 2
    assert "spin was searched with another suite" in capsys.readouterr().err


def test_an_edge_ends_the_command_with_what_to_add(undisturbed, elsewhere, capsys):
    """The same trials, in a grid without the settings that break."""
    grid = json.dumps([{"lr": [1e-3, 1e-2]}, {"lr": [1e-4, 1e-3]}], separators=(",", ":"))
    line = f"{LINE} --import {undisturbed / 'tried.parquet'} --set search.grids.spin={grid}"
    assert bench(line) == 1
    shown = capsys.readouterr()
    assert "spin 1: the best lies at the edge of its grid, lr=0.01 is the highest (add 0.1)" in shown.err
    assert "spin 1: best so far" in shown.out and "spin 2" not in shown.out  # not begun from what is not chosen
    assert "for the suite" not in shown.out


def test_jobs_are_further_workers_on_the_same_search(undisturbed, elsewhere, monkeypatch):
    started = []

    class Process:
        def __init__(self, arguments: list[str]):
            started.append(arguments)

        def wait(self) -> None:
            started.append("ended")

    monkeypatch.setattr(search_command.subprocess, "Popen", Process)
    table = undisturbed / "tried.parquet"
    assert bench(f"{LINE} spin --jobs 3 --set search.limit=3 --storage sqlite:///s.db --import {table}") == 0
    child = [
        sys.executable,
        "-m",
        "bench",
        "search",
        "--worker",
        "spin",
        "--suite",
        "tiny.yaml",
        "--set",
        "search.limit=3",
        "--storage",
        "sqlite:///s.db",
    ]
    assert started == [child, child, "ended", "ended"]
