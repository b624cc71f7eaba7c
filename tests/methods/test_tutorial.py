"""methods/README.md does what it says, and so does the example package: installed with pip, run, compared, shown."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.commands import cli
from bench.reports.load import load_runs
from bench.storage import runs

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "methods" / "README.md").read_text(encoding="utf-8"))
FILES = {text.splitlines()[0].removeprefix("# "): text for language, text in BLOCKS if language != "sh"}
(COMMANDS,) = [text.splitlines() for language, text in BLOCKS if language == "sh"]
HINGE = "methods.hinge={iterations: [{steps: 2, lr: 1e-3, beta: 100, margin: 2, power: 2}]}"
SMALL = (
    "data.size=8",
    "train.batch_size=4",
    "train.micro_batch=4",
    "train.log_every=1",
    "opponent.steps=1",
    "evaluation.steps=1",
    "evaluation.guidance=[1.0]",
    "metrics=[aesthetic]",
    "evaluation.prompt_sets={test: {prompts: 'world:test', limit: 4}}",
    *(f"methods.{name}.iterations.0.steps=2" for name in ("ipo", "ipo-near", "diffusion_dpo")),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tutorial's files in a folder, and what pip makes of it and of the example package on the path."""
    folder, place = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("installed")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    example = tmp_path_factory.mktemp("example") / "package"  # pip leaves its build folders beside what it builds
    example.mkdir()
    for path in (ROOT / "tests" / "example_package").glob("*.*"):
        (example / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    offline = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline.split(), "--target", str(place), str(folder), str(example)],
        check=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        patch.syspath_prepend(str(folder))
        patch.chdir(folder)
        yield folder


@pytest.fixture
def bench(project, capsys):
    def call(line: str, *settings: str) -> str:
        words = [*line.split(), *(word for setting in settings for word in ("--set", setting))]
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        out, err = capsys.readouterr()
        assert caught.value.code == 0, err
        return out

    return call


def read(method: str, name: str) -> list[dict]:
    found = [runs.load(identity) for identity in runs.ids()]
    return [json.loads((run.folder / name).read_text()) for run in found if run.method == method]


def test_the_hand_worked_tests_of_the_tutorial_hold(project):
    module = importlib.import_module("test_ipo")
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_commands_of_the_tutorial_show_the_method_everywhere(bench):
    """List, plan, run, table and page; the option is in the protocol, the signal on the page."""
    said = {}
    for line in COMMANDS:
        if line.startswith("bench "):
            small = SMALL if line.startswith("bench run") else ()
            given = re.findall(r" --set (\S+)", line)  # after the small ones, as typed
            said[line] = bench(re.sub(r" --set \S+", "", line).removeprefix("bench "), *small, *given)
    listed = said["bench list methods"]
    assert "  tau: float, default 100.0; how closely the policy is held to the reference\n" in listed
    assert "ipo 1: training" in said["bench plan --suite mine.yaml --method ipo"]
    assert [record["schedule"][0]["tau"] for record in read("ipo", "protocol.json")] == [200.0, 50.0]
    assert "margin" in [signal["name"] for signal in read("ipo", "protocol.json")[0]["signals"]]
    assert "IPO" in said["bench table"] and "Diffusion-DPO" in said["bench table"]
    page = Path("report.html").read_text(encoding="utf-8")
    assert "margin during training of IPO" in page


def test_runs_that_differ_in_an_option_are_set_apart(project):
    (problem,) = [line for line in load_runs().problems if "ipo" in line]
    assert "ipo with other settings than" in problem and "iterations.0.tau 200.0 against 50.0" in problem


def test_the_example_package_is_listed_run_and_shown(bench):
    assert "  power: 1 | 2, default 1; of the loss; 2 makes the pull grow" in bench("list methods")
    bench("run --suite mine.yaml --method hinge", *SMALL, HINGE)
    (record,) = read("hinge", "protocol.json")
    assert record["schedule"] == [{"steps": 2, "lr": 1e-3, "checkpoints": [], "beta": 100.0, "margin": 2.0, "power": 2}]
    assert "Hinge" in bench("table")
    assert "within the margin during training of Hinge" in Path("report.html").read_text(encoding="utf-8")
    identity = next(name for name in runs.ids() if "hinge" in name)
    bench(f"export {identity} -o exported")
    card = Path("exported/README.md").read_text(encoding="utf-8")
    assert "| iteration | steps | learning rate | beta | margin | power |" in card
    assert "| 1 | 2 | 0.001 | 100.0 | 2.0 | 2 |" in card
