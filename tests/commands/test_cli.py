"""The command line: fast answers, one line for a mistake, exit status 0, 1 or 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.commands import cli

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "sacred", "pandas", "matplotlib")


@pytest.fixture
def bench(capsys, monkeypatch, tmp_path):
    """Run the command line in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BENCH_DEBUG", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run --method spn", "unknown method 'spn' (did you mean 'spin'?); methods: sft, diffusion_dpo, spin"),
        ("run --method spin-g3", "unknown method 'spin-g3' (did you mean 'spin'?)"),
        ('run --method x --set methods.x={"method":"spn","iterations":[{"steps":1,"lr":1.0}]}', "unknown method 'spn'"),
        (
            "run --method sft --set methods.sft.opponent.steps=3",
            "methods.sft.opponent: sft does not play against itself",
        ),
        ("run --method spin --set trian.lr=1", "unknown setting 'trian.lr' (did you mean 'train'?"),
        ("run --method spin --set train.batch_size=big", "expected an integer, got 'big'"),
        ("run --method spin --iters 0", "--iters: a run has at least 1 iteration, not 0"),
        ("run --method spin --iters -3", "not -3"),
        ("run --method spin --iters many", "'--iters': 'many' is not a valid integer"),
        ("run --method spin --suite mni", "unknown suite 'mni' (did you mean 'mini'?)"),
        ("run --method spin --seed -1", "'--seed'"),
        ("run", "--method is missing: all, or one of sft, diffusion_dpo, spin"),
        ("run --methd spin", "--method"),
        ("run --resume nothing", "no run 'nothing' in results/runs"),
        ("plan --method spn", "unknown method 'spn' (did you mean 'spin'?)"),
        ("plan --card h10", "unknown card 'h10' (did you mean 'h100'?); cards: b200, "),
        ("perf score --metrics clp", "unknown metric 'clp' (did you mean 'clip'?)"),
        ("perf sample -o x.txt", "-o x.txt: measurements are written as .csv or .json"),
        ("doctor --suite mni", "unknown suite 'mni' (did you mean 'mini'?)"),
        ("rnu", "unknown command 'rnu' (did you mean 'run'?)"),
        ("list metric", "cannot list 'metric' (did you mean 'metrics'?)"),
        ("list", "Missing argument"),
        ("report nothing", "no run 'nothing'"),
        ("table --format cvs nothing", "no run 'nothing'"),
        ("export nothing -o out", "no run 'nothing'"),
        ("export nothing", "Missing option '-o'"),
    ],
)
def test_a_mistake_is_one_helpful_line_and_status_2(bench, arguments, said):
    status, out, err = bench(*arguments.split())
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("bench: ")
    assert said in err


def test_a_failure_is_one_line_and_status_1(bench):
    status, out, err = bench("table")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "no finished run under results/runs" in err


def test_a_bug_is_one_line_too_and_says_how_to_see_more(bench, monkeypatch):
    monkeypatch.setattr("bench.commands.listing.KINDS", {"runs": lambda: 1 / 0})
    status, _, err = bench("list", "runs")
    assert (status, err) == (1, "bench: ZeroDivisionError: division by zero (BENCH_DEBUG=1 shows where)\n")


def test_debug_shows_the_stack(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCH_DEBUG", "1")
    with pytest.raises(Exception, match="unknown method"):
        cli.main(["run", "--method", "spn"])


def test_a_mistake_leaves_nothing_behind(bench, tmp_path):
    bench("run", "--method", "spn")
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_the_commands(bench):
    status, _, err = bench()
    assert status == 2
    assert [line.split()[0] for line in err.split("Commands:\n")[1].splitlines()] == list(cli.cli.commands)


@pytest.mark.parametrize("kind", ["metrics", "suites", "prompts", "runs"])
def test_lists_are_plain_lists_as_json(bench, kind):
    status, out, _ = bench("list", kind, "--format", "json")
    names = json.loads(out)
    assert status == 0
    assert all(isinstance(name, str) for name in names)
    expected = {"metrics": "pickscore", "suites": "mini", "prompts": "world:test"}
    assert names == [] if kind == "runs" else expected[kind] in names


def test_lists_explain_in_text(bench):
    assert bench("list", "suites")[1].startswith("mini           Drawn scenes")


def test_methods_are_listed_with_their_options(bench):
    lines = bench("list", "methods")[1].splitlines()
    assert lines[2:4] == [
        "diffusion_dpo  bench.methods.diffusion_dpo:DiffusionDPO",
        "  beta: float, required; how closely the policy is held to the reference; 2000 to 5000 for "
        "SD-1.5 (methods/preference.py)",
    ]
    assert lines[1] == (
        "  weighting: constant | min_snr | h_squared, default constant; of timesteps, multiplies the "
        "loss (methods/weightings.py)"
    )
    (sft, *_) = json.loads(bench("list", "methods", "--format", "json")[1])
    assert (sft["name"], sft["title"], sft["target"]) == ("sft", "SFT", "bench.methods.sft:SFT")
    assert sft["options"][0] == {
        "name": "weighting",
        "type": "constant | min_snr | h_squared",
        "default": "constant",
        "meaning": "of timesteps, multiplies the loss (methods/weightings.py)",
    }


def test_a_missing_database_driver_is_named_before_anything_starts(bench, monkeypatch, tmp_path):
    monkeypatch.setattr("bench.storage.tracking.find_spec", lambda package: None)
    for option, package in (("--mongo", "pymongo"), ("--sql", "sqlalchemy")):
        status, _, err = bench("run", "--method", "sft", option, "x://y")
        assert status == 1
        assert f"{option} needs {package}, which is not installed: pip install" in err
    assert list(tmp_path.iterdir()) == []


def test_quick_commands_import_nothing_heavy(tmp_path):
    """One interpreter runs them all; pandas may come with `table` and `report`, torch with neither, torch alone with
    `list methods`, which reads the options off the classes."""
    light = (
        "--help",
        "run --help",
        "report --help",
        "list metrics",
        "list suites",
        "list runs",
        "plan --help",
        "perf train --help",
        "doctor --help",
        "plan --card h10",
        "perf train --method spn",
        "perf train -o x.txt",
        "run --method spn",
        "run --method spin --set trian.lr=1",
        "run --iters 0",
    )
    steps = [
        *((line, HEAVY) for line in light),
        ("table", HEAVY[:5]),
        ("report", HEAVY[:5]),
        ("list methods", HEAVY[1:5]),
    ]
    code = """if True:
        import json, sys
        from bench.commands import cli
        for arguments, heavy in json.loads(sys.argv[1]):
            try:
                cli.main(arguments.split())
            except SystemExit:
                found = [name for name in heavy if name in sys.modules]
                assert not found, (arguments, found)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(steps)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
