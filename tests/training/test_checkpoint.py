"""A training that is killed and resumed ends as the undisturbed one does, bit for bit."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny_bench
import torch
from tiny import make_unet
from tiny_bench import trained
from train_tiny import SCHEDULER, SETTINGS, make_data

from bench import registry
from bench.commands import cli
from bench.errors import BenchError
from bench.experiment import Experiment
from bench.methods.diffusion_dpo import DiffusionDPO
from bench.methods.sft import SFT
from bench.models import adapters, load_unet
from bench.shared import Shared
from bench.storage import runs
from bench.suites import load_suite
from bench.training import train as training
from bench.training.checkpoint import Checkpoints, Writer
from bench.training.train import Loop, train

RATES = ["pairs_per_s", "images_per_s"]  # what time it took, the one thing that may differ


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return make_unet()


@pytest.fixture
def dies(monkeypatch):
    """`dies(n)`: stop before the n-th step from now; `dies(None)`: no more."""
    step, left = Loop.step, []

    def deadly(self, number):
        if left and left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
        return step(self, number)

    monkeypatch.setattr(Loop, "step", deadly)

    def at(count: int | None) -> None:
        left[:] = [count]

    return at


def go(base, accelerator, checkpoints=None, method=None, data=None, results=(), kept=None, **changes):
    """Train a copy of `base`; return its weights and the history without rates. `kept` is given the results inside."""
    policy = copy.deepcopy(base)
    settings = replace(SETTINGS, **{"steps": 7, "log_every": 3, "batch_size": 3, "micro_batch": 2, **changes})
    history = train(
        policy,
        copy.deepcopy(base),
        method or DiffusionDPO(500.0),
        data or make_data(),
        settings,
        SCHEDULER,
        0,
        accelerator,
        checkpoints=checkpoints,
        results=results,
        keep=lambda step, seconds: kept.update({step: (copy.deepcopy(policy.state_dict()), seconds)}),
    )
    return policy.state_dict(), pd.DataFrame(history).drop(columns=RATES)


def assert_same(one, other):
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    pd.testing.assert_frame_equal(one[1], other[1], check_exact=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9, "lr_schedule": "linear", "warmup_steps": 3, "first_step": 100}, {"optimizer": "adamw8bit"}],
)
def test_stopped_twice_and_resumed_equals_undisturbed(base, accelerator, tmp_path, dies, changes):
    """Log intervals of 3 straddle checkpoints every 2: sums of a begun interval are part of the state."""
    undisturbed = go(base, accelerator, **changes)
    checkpoints = Checkpoints(tmp_path / "training", "key", 2)
    for stop, kept in ((4, "step2"), (3, "step4")):  # in step 4; then again, resumed from 2, in step 5
        dies(stop)
        with pytest.raises(Killed):
            go(base, accelerator, checkpoints, **changes)
        assert [path.name for path in (tmp_path / "training").iterdir()] == [kept]
    dies(None)
    assert_same(go(base, accelerator, checkpoints, **changes), undisturbed)


def test_a_checkpoint_of_other_settings_or_half_written_is_never_used(base, accelerator, tmp_path, dies):
    mine = Checkpoints(tmp_path, "mine", 2)
    dies(4)
    with pytest.raises(Killed):
        go(base, accelerator, mine)
    dies(None)
    assert mine.newest() == tmp_path / "step2"
    assert mine.seconds() > 0
    other = Checkpoints(tmp_path, "other", 2)
    assert other.newest() is None and other.seconds() == 0
    undisturbed = go(base, accelerator, lr=2e-3)
    assert_same(go(base, accelerator, other, lr=2e-3), undisturbed)
    assert (mine.newest(), other.newest()) == (None, tmp_path / "step6")
    with pytest.raises(Killed), other.write(8, 0.0) as folder:
        (folder / "state.pt").write_bytes(b"half")
        raise Killed
    assert other.newest() == tmp_path / "step6"
    other.remove()
    assert not tmp_path.exists()


def test_none_are_kept_unless_asked_for_and_none_at_the_end(base, accelerator, tmp_path):
    for every in (None, 7):
        checkpoints = Checkpoints(tmp_path / "training", "key", every)
        go(base, accelerator, checkpoints)
        assert not (tmp_path / "training").exists()


def test_an_unreadable_checkpoint_is_said_in_one_line(base, accelerator, tmp_path):
    checkpoints = Checkpoints(tmp_path, "key", 2)
    go(base, accelerator, checkpoints)
    marker = json.loads((tmp_path / "step6" / "stage.json").read_text())
    (tmp_path / "step6" / "stage.json").write_text(json.dumps({**marker, "files": {}}))  # an older version's
    (tmp_path / "step6" / "state.pt").write_bytes(b"")
    with pytest.raises(BenchError, match=r"step6/state.pt cannot be read \(EOFError\): remove "):
        go(base, accelerator, checkpoints)


def test_a_damaged_checkpoint_is_named_set_aside_and_not_used(base, accelerator, tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, "key", 2)
    undisturbed = go(base, accelerator, checkpoints)
    weights = tmp_path / "step6" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    checkpoints.check()
    assert f"{weights} does not hold what was written: set aside as step6.damaged-1" in capsys.readouterr().err
    assert checkpoints.newest() is None
    assert_same(go(base, accelerator, checkpoints), undisturbed)


def break_weights(monkeypatch, value: float) -> None:
    """Fill a weight with `value` at the end of the 5th step."""
    step = Loop.step

    def breaks(self, number):
        step(self, number)
        if number == 4:
            with torch.no_grad():
                self.trained[0].fill_(value)

    monkeypatch.setattr(Loop, "step", breaks)


def test_a_broken_training_names_the_last_good_checkpoint_which_is_a_model(base, accelerator, tmp_path, monkeypatch):
    """From the 5th step on the weights are not finite: the checkpoint after 6 steps must not be written."""
    break_weights(monkeypatch, torch.nan)
    checkpoints = Checkpoints(tmp_path, "key", 2)
    with pytest.raises(BenchError, match=r"sft: loss became nan in steps 4 to 6 .*; last good checkpoint: \S+step4$"):
        go(base, accelerator, checkpoints, method=SFT())
    kept = load_unet(checkpoints.newest() / "unet")
    assert all(weight.isfinite().all() for weight in kept.parameters())
    assert not torch.equal(kept.conv_in.weight, base.conv_in.weight)


@pytest.mark.parametrize("every", [5, 1])
def test_no_checkpoint_is_written_of_weights_that_just_broke(base, accelerator, tmp_path, monkeypatch, every):
    """At step 5 loss and gradient are still finite, but not what the optimizer made of them."""
    break_weights(monkeypatch, torch.inf)
    checkpoints = Checkpoints(tmp_path, "key", every)
    with pytest.raises(BenchError, match="became nan"):
        go(base, accelerator, checkpoints)
    assert checkpoints.newest() == (None if every == 5 else tmp_path / "step4")


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "warmup_steps": 3, "first_step": 100}])
def test_results_inside_a_training_are_what_shorter_ones_end_in_and_change_nothing(base, accelerator, changes):
    """Of the moving average too: it is lent for the moment, and the training goes on with its own weights."""
    kept: dict = {}
    assert_same(go(base, accelerator, results=(2, 5), kept=kept, **changes), go(base, accelerator, **changes))
    assert list(kept) == [2, 5] and 0 < kept[2][1] < kept[5][1]
    for steps in (2, 5):
        shorter, _ = go(base, accelerator, steps=steps, **changes)
        assert all(torch.equal(kept[steps][0][name], shorter[name]) for name in shorter)


def test_a_training_stopped_between_a_result_and_a_state_makes_both_again_to_the_bit(base, accelerator, tmp_path, dies):
    """Results at 2 and 4, states at 3 and 6; stopped in step 4, before the first state, and in step 6, after it."""
    first, second, third, whole = {}, {}, {}, {}
    undisturbed = go(base, accelerator, results=(2, 4), kept=whole, ema=0.9)
    checkpoints = Checkpoints(tmp_path, "key", 3)
    for stop, kept, state in ((3, first, None), (6, second, "step3"), (None, third, "step6")):
        dies(stop)
        if stop:
            with pytest.raises(Killed):
                go(base, accelerator, checkpoints, results=(2, 4), kept=kept, ema=0.9)
        else:
            assert_same(go(base, accelerator, checkpoints, results=(2, 4), kept=kept, ema=0.9), undisturbed)
        newest = checkpoints.newest()
        assert (newest and newest.name) == state
    assert (list(first), list(second), list(third)) == ([2], [2, 4], [4])
    for kept in (first, second, third):
        for step, (weights, _) in kept.items():
            assert all(torch.equal(weights[name], whole[step][0][name]) for name in weights)
    assert third[4][1] > checkpoints.seconds() / 2  # the time of the stopped ones is part of it


def test_a_result_comes_before_the_state_of_its_step_so_that_no_resumed_training_passes_it_by(
    base, accelerator, tmp_path
):
    class Full(dict):
        def update(self, _):
            raise Killed

    checkpoints, kept = Checkpoints(tmp_path, "key", 3), {}
    with pytest.raises(Killed):
        go(base, accelerator, checkpoints, results=(3,), kept=Full())
    assert checkpoints.reached() == 0
    go(base, accelerator, checkpoints, results=(3,), kept=kept)
    assert list(kept) == [3] and checkpoints.reached() == 6


@pytest.mark.parametrize("results", [(5,), ()])
def test_weights_that_just_broke_are_no_result(base, accelerator, monkeypatch, results):
    """At step 5 loss and gradient are finite still, and the log would have said so."""
    break_weights(monkeypatch, torch.nan)
    with pytest.raises(BenchError, match=r"diffusion_dpo: the weights are not finite after step 5 \(lr 0.001\)"):
        go(base, accelerator, results=results, kept={}, steps=7 if results else 5)


@pytest.fixture
def workplace(tiny_pipeline_folder, tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(registry.BUILT_IN["metrics"], "darkness", tiny_bench.DARKNESS)
    tiny_bench.write_suite(tmp_path, tiny_pipeline_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS = [
    "train.checkpoint_every=2",
    "train.log_every=3",
    "evaluation.prompt_sets.test.limit=1",
    "evaluation.guidance=[1.0]",
    "methods.spin.iterations.0.steps=5",
]


def test_killed_in_the_middle_of_training_and_resumed_the_run_is_the_same(workplace):
    """kill -9 in step 4 of the second iteration, through the command line; resumed, against a run of one piece."""
    line = ["run", "--suite", "tiny.yaml", "--method", "spin", "--iters", "2"]
    options = [part for option in OPTIONS for part in ("--set", option)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TINY_BENCH_DIES_AT_STEP": "9"}
    killed = subprocess.run(
        [sys.executable, tiny_bench.__file__, *line, *options], capture_output=True, env=environment, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run,) = map(runs.load, runs.ids())
    kept = run.folder / "stages" / "training2" / "step2"
    assert (kept / "stage.json").exists() and not (run.folder / "iter2").exists()
    assert not (run.folder / "stages" / "training1").exists()
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["run", "--resume", run.id])
    assert not (run.folder / "stages" / "training2").exists()

    whole = runs.create("spin", run.suite, run.seed, 2)  # base images and scores come from the cache
    Experiment(whole, Shared(run.suite)).stages(lambda *scalar: None)
    for iteration in ("iter1", "iter2"):
        killed, undisturbed = (load_unet(one.folder / iteration / "unet").state_dict() for one in (run, whole))
        assert all(torch.equal(killed[name], undisturbed[name]) for name in undisturbed)
    tables = [
        pd.read_parquet(one.folder / name).drop(columns=columns)
        for name, columns in (("history.parquet", RATES), ("scores.parquet", ["run"]))
        for one in (run, whole)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    pd.testing.assert_frame_equal(tables[2], tables[3], check_exact=True)


def test_the_time_of_the_killed_process_is_part_of_the_cost(workplace, dies, monkeypatch):
    shared = Shared(load_suite("tiny.yaml", ["train.checkpoint_every=1"]))
    run = runs.create("sft", shared.suite, 0, 1)
    dies(2)
    with pytest.raises(Killed):
        trained(run, shared)
    dies(None)
    monkeypatch.setattr(Checkpoints, "seconds", lambda self: 1000.0)
    trained(run, shared)
    assert json.loads((run.folder / "cost.json").read_text())["stages"][0]["seconds"] > 1000


@pytest.fixture
def beside(monkeypatch):
    """States written while the training goes on, as on a GPU."""
    monkeypatch.setattr(training, "Writer", lambda beside: Writer(True))


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"optimizer": "adamw8bit"}, {"lora_rank": 2}])
def test_a_state_written_beside_the_training_is_that_of_its_step(
    base, accelerator, tmp_path, dies, beside, monkeypatch, changes
):
    """The disk is slower than two steps; what is written is of the step that it was begun after, to the bit."""
    if "lora_rank" in changes:
        base = copy.deepcopy(base)
        adapters.attach(base, 2, 0)
    undisturbed = go(base, accelerator, **changes)
    slow, done = training.save_state, []

    def save_state(folder, state):
        while len(done) < state["step"] + 1:  # until the next step has changed all that was copied
            time.sleep(0.001)
        slow(folder, state)

    step = Loop.step
    monkeypatch.setattr(training, "save_state", save_state)
    monkeypatch.setattr(Loop, "step", lambda self, number: step(self, number) or done.append(number))
    checkpoints = Checkpoints(tmp_path, "key", 2)
    dies(6)
    with pytest.raises(Killed):
        go(base, accelerator, checkpoints, **changes)
    assert checkpoints.reached() == 4
    dies(None)
    done += [0] * 10
    assert_same(go(base, accelerator, checkpoints, **changes), undisturbed)


def test_what_goes_wrong_beside_the_training_ends_it_and_leaves_the_state_of_before(
    base, accelerator, tmp_path, beside, monkeypatch
):
    write = training.save_state

    def full(folder, state):
        if state["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, state)

    monkeypatch.setattr(training, "save_state", full)
    checkpoints = Checkpoints(tmp_path, "key", 2)
    with pytest.raises(OSError, match="No space left"):
        go(base, accelerator, checkpoints)
    assert checkpoints.reached() == 2 and [path.name for path in tmp_path.iterdir()] == ["step2"]


def test_states_are_minutes_apart_where_asked(base, accelerator, tmp_path, monkeypatch):
    """Steps of 100 seconds, 5 minutes between two: at 3 of every step, then 6; of every second step, 4 alone."""
    now, step = [0.0], Loop.step

    def slow(self, number):
        now[0] += 100
        step(self, number)

    monkeypatch.setattr(Loop, "step", slow)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for every, expected in ((1, [3, 6]), (2, [4])):
        written = []
        monkeypatch.setattr(Writer, "write", lambda self, call, to=written: to.append(now[0] // 100) or call())
        now[0] = 0.0
        go(base, accelerator, Checkpoints(tmp_path / str(every), "key", every, 5.0))
        assert written == expected
