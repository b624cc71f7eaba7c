"""The tutorial of metrics/README.md, and its metric of two columns, plugged in, through everything that shows it."""

from __future__ import annotations

import json
import re
import sys
from html import unescape
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pandas as pd
import pytest
import tiny_bench
from PIL import Image

from bench import registry
from bench.commands import cli
from bench.commands.doctor import metric_files
from bench.costs.plan import plan
from bench.reports import agreement, tables
from bench.reports.load import load_runs
from bench.storage.runs import ids
from bench.suites import load_suite

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tests" / "example_package"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "metrics" / "README.md").read_text("utf-8"), re.S)
NAMES = ["tones/brightness", "tones/clipped"]


@pytest.fixture(scope="module")
def plugged_in():
    """The registration of the tutorial, and another metric that is of its last block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PACKAGE))
        points = EntryPoints(
            EntryPoint(name, f"example_metric:{kind}", "bench.metrics")
            for name, kind in (("tones", "Tones"), ("large", "Large"))
        )
        patch.setattr(registry, "entry_points", lambda group: points.select(group=group))
        import example_metric

        code: dict = vars(example_metric)
        exec(BLOCKS[2], code)
        yield
        del sys.modules["example_metric"]


@pytest.fixture(scope="module")
def run(plugged_in, tiny_pipeline_folder, tmp_path_factory) -> Path:
    """A folder with a tiny run of SFT, scored by CLIP and the plugged-in metric."""
    folder = tmp_path_factory.mktemp("plugged")
    tiny_bench.write_suite(folder, tiny_pipeline_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert bench("run", "--suite", "tiny.yaml", "--method", "sft", "--set", "metrics=[clip, tones]") == 0
    return folder


@pytest.fixture
def here(run, monkeypatch) -> Path:
    monkeypatch.chdir(run)
    return run


def bench(*line: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(line))
    return caught.value.code


def test_the_blocks_of_the_tutorial_run_and_the_first_is_the_example_package() -> None:
    assert len(BLOCKS) == 3 and BLOCKS[0] == (PACKAGE / "example_metric.py").read_text("utf-8")
    names: dict = {"__name__": "tutorial"}
    for block in BLOCKS:
        exec(compile(block, "metrics/README.md", "exec"), names)
    assert [column.name for column in names["Large"].table_columns()] == ["large/brightness", "large/clipped"]


def test_the_protocol_has_its_columns_and_the_scores_are_of_the_stored_pictures(here) -> None:
    (folder,) = Path("results/runs").iterdir()
    said = json.loads((folder / "protocol.json").read_text())["metrics"]["tones"]
    assert (said["title"], said["reads"], said["version"]) == ("Tones", "image", "1")
    assert [
        (column["name"], column["unit"], column["higher_is_better"], column["decimals"]) for column in said["columns"]
    ] == [(NAMES[0], "of 255", True, 1), (NAMES[1], "%", False, 2)]
    scores = pd.read_parquet(folder / "scores.parquet")
    assert list(dict.fromkeys(scores["metric"])) == ["clip", *NAMES]
    row = scores[(scores["metric"] == NAMES[0]) & (scores["iteration"] == 1)].iloc[0]
    picture = folder / "images" / "test" / f"g{row['guidance']:g}" / "iter1" / f"{row['prompt_id']}-{row['seed']}.png"
    with Image.open(picture) as image:
        pixels = list(image.convert("RGB").tobytes())
    assert row["value"] == pytest.approx(sum(pixels) / len(pixels), rel=1e-5)


def test_tables_and_page_show_titles_units_direction_and_decimals_without_the_package(here, monkeypatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints())  # what shows it is the protocol alone
    runs = load_runs()
    tidy = tables.table(runs, metrics=["tones"])
    assert tidy["metric"].unique().tolist() == NAMES
    assert tidy["higher_is_better"].tolist() == [name == NAMES[0] for name in tidy["metric"]]
    text = tables.render(tidy)
    assert (
        "brightness, of 255" in text
        and "clipped pixels, % ↓" in text
        and r"clipped pixels, \% $\downarrow$" in (tables.render(tidy, "latex"))
    )
    for value in re.findall(r"base +(-?\d+\.\d+)", text):
        assert len(value.partition(".")[2]) == 1
    assert bench("report", "-o", "page.html") == 0
    page = unescape(Path("page.html").read_text("utf-8"))
    assert "clipped pixels, % ↓" in page and re.search(r"brightness <b>\d+\.\d[ <]", page)
    numbers = json.loads(re.search(r'id="numbers" hidden>(.*?)</pre>', page, re.DOTALL).group(1))  # of the comparison
    assert "clipped pixels" in json.dumps(numbers)
    assert {(row.first, row.second) for row in agreement.table(runs).itertuples()} == {
        ("clip", NAMES[0]),
        ("clip", NAMES[1]),
        tuple(NAMES),
    }


def test_the_plan_counts_it_and_an_undeclared_cost_is_said(plugged_in, monkeypatch) -> None:
    def scoring(*metrics: str):
        made = plan(load_suite("mini", [f"metrics=[{', '.join(metrics)}]", "data.size=8"]), ["sft"])
        return made.stages[-1], made.notes

    alone, notes = scoring("tones")
    assert alone.flops == 0 and alone.disk_bytes == alone.count * 2 * 40 and not notes  # two numbers a picture
    declared, notes = scoring("tones", "large")
    assert declared.flops == alone.count * 120 * 10**9 and not notes
    assert declared.peak_memory_bytes - alone.peak_memory_bytes == 1200 * 10**6
    monkeypatch.setattr(registry.metric("large"), "cost", None)
    assert any("metric large is not counted" in note for note in scoring("tones", "large")[1])


def test_its_published_checkpoint_is_found_by_doctor(plugged_in, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BENCH_WEIGHTS", str(tmp_path))
    suite = load_suite("mini", ["metrics=[tones, large]"])
    (missing,) = metric_files(suite)
    assert (missing.name, missing.where, missing.size) == ("model.safetensors", None, "1.2 GB")
    assert "from owner/name" in missing.fix
    (tmp_path / "model.safetensors").write_bytes(b"123")
    (found,) = metric_files(suite)
    assert found.where == str(tmp_path / "model.safetensors") and found.size == "3 bytes"


def test_a_folder_is_scored_by_both_columns_once(here, capsys) -> None:
    (folder,) = Path("results/runs").iterdir()
    pictures = next((folder / "images" / "test").glob("g*/iter1"))
    names = sorted(path.name for path in pictures.glob("*.png"))
    pd.DataFrame({"file_name": names, "prompt": "a cat"}).to_csv("prompts.csv", index=False)
    for file in ("first.csv", "again.csv"):
        assert bench("score", str(pictures), "--prompts", "prompts.csv", "--metrics", "tones", "-o", file) == 0
    first, again = (pd.read_csv(file, comment="#") for file in ("first.csv", "again.csv"))
    pd.testing.assert_frame_equal(first, again)
    assert [name for name in first if "/" in name] == NAMES and first[NAMES].notna().all(axis=None)
    stored = pd.read_parquet(folder / "scores.parquet")
    guidance = float(pictures.parent.name.removeprefix("g"))
    stored = stored[(stored["metric"] == NAMES[1]) & (stored["guidance"] == guidance) & (stored["iteration"] == 1)]
    by_name = {f"{row.prompt_id}-{row.seed}.png": row.value for row in stored.itertuples()}
    assert dict(zip(first["file_name"], first[NAMES[1]], strict=True)) == pytest.approx(by_name)
    assert "clipped pixels" in capsys.readouterr().out


def test_a_run_of_before_knows_built_in_columns_and_others_by_name(here, tmp_path) -> None:
    from shutil import copytree

    (source,) = Path("results/runs").iterdir()
    copytree(source, tmp_path / source.name)
    path = tmp_path / source.name / "protocol.json"
    path.with_name("seal.json").unlink()  # those of before had none
    protocol = json.loads(path.read_text())
    for info in protocol["metrics"].values():
        for key in ("title", "reads", "columns"):
            del info[key]
    protocol["suite"] |= {"judge": "mini", "metrics": ["clip", "unknown"]}
    protocol |= {"judge": {"version": "of before"}, "metrics": {**protocol["metrics"], "unknown": {"version": "0"}}}
    path.write_text(json.dumps(protocol))
    rows = pd.read_parquet(path.with_name("scores.parquet"))
    rows = rows.replace({"metric": {NAMES[0]: "unknown", NAMES[1]: "judge/fade"}})
    rows.to_parquet(path.with_name("scores.parquet"))
    found = load_runs([tmp_path / source.name])
    assert [(column.name, column.title, column.higher_is_better, column.truth) for column in found.columns] == [
        ("clip", "CLIP", True, False),
        ("unknown", "unknown", True, False),
        ("judge/fade", "fade", False, True),
    ]
    assert tables.lead_column(found).name == "judge/fade"
    assert ids()  # the runs of this folder are still there
