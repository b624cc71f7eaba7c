"""Suites: what is in them, and one helpful line for every way to get a setting wrong."""

from __future__ import annotations

import pytest
import yaml
from tiny_bench import SUITE

from bench.errors import UsageError
from bench.suites import available, load_suite, stored_suite
from bench.suites.keys import flat


@pytest.fixture
def suite_file(tmp_path):
    def write(**changes):
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**SUITE, "model": {"weights": "mini"}, **changes}))
        return str(path)

    return write


def complaint(*overrides: str, suite: str = "mini") -> str:
    with pytest.raises(UsageError) as caught:
        load_suite(suite, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", available())
def test_shipped_suites_are_valid_and_carry_their_own_name(name):
    assert load_suite(name).name == name


def test_every_field_of_the_default_is_in_the_file_so_that_it_can_be_explained_there():
    written = flat(yaml.safe_load(available()["mini"].read_text()))
    resolved = flat(load_suite("mini").model_dump())
    per_method = {
        f"methods.{name}.{key}" for name in load_suite("mini").methods for key in ("method", "train", "opponent")
    } | {key for key in resolved if key.endswith(".checkpoints")}
    assert set(resolved) - set(written) == per_method


def test_evaluation_guidance_was_fixed_in_advance():
    assert load_suite("mini").evaluation.guidance == [1.0, 3.0]
    assert load_suite("mini").opponent.guidance == 1.0


def test_overrides_reach_sections_lists_and_named_entries():
    suite = load_suite(
        "mini",
        [
            "train.batch_size=8",
            "evaluation.guidance=[2, 7.5]",
            "methods.spin.iterations.1.lr=1e-5",
            "evaluation.prompt_sets.more.prompts=world:hard",
            "metric_options.clip.weights=some/folder",
        ],
    )
    assert suite.train.batch_size == 8
    assert suite.evaluation.guidance == [2, 7.5]
    assert suite.methods["spin"].iterations[1].lr == 1e-5
    assert suite.evaluation.prompt_sets["more"].limit is None
    assert suite.metric_options == {"clip": {"weights": "some/folder"}}


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("2E+3", 2e3), ("-1e2", -1e2), ("1.5e3", 1.5e3)])
def test_numbers_without_a_dot_are_numbers(text, value, suite_file):
    path = suite_file(metric_options={"darkness": {}})
    assert load_suite(path, [f"metric_options.darkness.x={text}"]).metric_options["darkness"]["x"] == value


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("trian.lr", "did you mean 'train'?"),
        ("trian.lr", "'lr' is set by methods.sft.iterations.0.lr"),
        ("train.batch_sise", "did you mean 'train.batch_size'?"),
        ("trian.batch_size", "did you mean 'train.batch_size'?"),
        ("methods.spn.iterations.0.lr", "did you mean 'methods.spin.iterations.0.lr'?"),
        ("methods.spin.iterations.9.lr", "is set by"),
        ("evaluation.prompt_sets.test.limt", "did you mean 'evaluation.prompt_sets.test.limit'?"),
        ("model.dtype.x", "did you mean 'model.dtype'?"),
        ("seed", "is set by data.seed"),
    ],
)
def test_unknown_keys_name_the_nearest(typed, nearest):
    text = complaint(f"{typed}=1")
    assert text.startswith(f"unknown setting '{typed}'")
    assert nearest in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=many", "'train.batch_size': expected an integer, got 'many' (str)"),
        ("train.batch_size=1.5", "'train.batch_size': expected an integer, got 1.5 (float)"),
        ("train.batch_size='4'", "'train.batch_size': expected an integer, got '4' (str)"),
        ("train.batch_size=0", "expected a value greater than or equal to 1, got 0"),
        ("opponent.guidance=high", "'opponent.guidance': expected a number, got 'high'"),
        ("evaluation.guidance=3", "'evaluation.guidance': expected a list, got 3 (int)"),
        ("evaluation.guidance=[1, x]", "'evaluation.guidance.1': expected a number"),
        ("evaluation.protocol=two", "expected 'one', 'mean' or 'best', got 'two'"),
        ("train=3", "'train': expected a section, got 3"),
        ("judge=null", "the judge is a metric: write judge last in metrics, or leave it out there, instead of"),
        ("train.batch_size", "--set takes KEY=VALUE, got 'train.batch_size'"),
        ("data.seed=-1", "'data.seed': expected a value greater than or equal to 0, got -1"),
        ("evaluation.seeds=[1, 1]", "'evaluation.seeds': expected distinct values, got [1, 1]"),
        ("evaluation.guidance=[1.0, 1.0]", "'evaluation.guidance': expected distinct values"),
        ("evaluation.guidance=[.nan]", "'evaluation.guidance.0': expected a finite number, got nan"),
        ("evaluation.guidance=[1.0, .inf]", "'evaluation.guidance.1': expected a finite number, got inf"),
        ("opponent.guidance=.nan", "'opponent.guidance': expected a finite number, got nan"),
        ("methods.sft.iterations.0.lr=.inf", "'methods.sft.iterations.0.lr': expected a finite number, got inf"),
        ("evaluation.steps=1001", "'evaluation.steps': expected a value less than or equal to 1000, got 1001"),
        ("opponent.steps=1001", "'opponent.steps': expected a value less than or equal to 1000, got 1001"),
        ("evaluation.batch_size=0", "'evaluation.batch_size': expected a value greater than or equal to 1, got 0"),
        ("=3", "--set takes KEY=VALUE"),
        ("metrics=[a", "'[a' is not a valid value"),
    ],
)
def test_ill_typed_values_name_key_expectation_and_value(override, said):
    assert said in complaint(override)


def test_a_mistake_in_a_file_names_the_file(suite_file):
    path = suite_file(trian={"lr": 1})
    assert complaint(suite=path).startswith(f"{path}: unknown setting 'trian'")


def test_a_missing_section_is_named(suite_file, tmp_path):
    path = suite_file()
    settings = yaml.safe_load((tmp_path / "own.yaml").read_text())
    del settings["opponent"]["steps"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    assert "'opponent.steps' is missing" in complaint(suite=path)


@pytest.mark.parametrize("text", ["a: [", "just text", "- a list", ""])
def test_a_file_that_is_no_suite_is_refused(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert complaint(suite=str(path)).startswith(str(path))


def test_an_unknown_suite_names_the_nearest():
    assert complaint(suite="mni").startswith("unknown suite 'mni' (did you mean 'mini'?); suites: mini")


def test_more_iterations_than_listed_repeat_the_last():
    suite = load_suite("mini", ["methods.spin.iterations=[{steps: 1, lr: 1e-3}, {steps: 2, lr: 1e-4}]"])
    assert [settings.steps for settings in suite.schedule("spin", 4)] == [1, 2, 2, 2]
    assert [settings.steps for settings in suite.schedule("spin", 1)] == [1]
    assert len(suite.schedule("spin")) == 2


def test_a_checkpoint_lies_inside_its_iteration_and_they_ascend():
    suite = load_suite("mini", ["methods.sft.iterations.0.checkpoints=[1, 299]"])
    assert suite.schedule("sft")[0].checkpoints == [1, 299]
    for wrong in ("[0, 100]", "[100, 300]", "[200, 100]", "[100, 100]", "[-1]"):
        text = complaint(f"methods.sft.iterations.0.checkpoints={wrong}")
        assert text.startswith(
            "setting 'methods.sft.iterations.0.checkpoints': expected ascending steps of the "
            f"iteration, from 1 and below its 300, got {wrong}"
        )
    assert "below its 100, got [1, 299]" in complaint(
        "methods.sft.iterations.0={steps: 100, lr: 1e-3, checkpoints: [1, 299]}"
    )


def test_the_measured_suite_reads_one_training_off_where_pairs_and_flops_are_equal():
    """An SFT image costs 3 passes and a pair 8: at equal FLOPs 8/3 of the steps."""
    suite = load_suite("mini-measured")
    (sft,), (dpo,) = suite.schedule("sft"), suite.schedule("diffusion_dpo")
    assert ([*sft.checkpoints, sft.steps], [*dpo.checkpoints, dpo.steps]) == ([100, 267, 300, 800], [100, 200, 300])
    assert [round(100 * 8 / 3), round(300 * 8 / 3)] == [267, 800]
    assert [s.steps for s in suite.schedule("spin")] == [100, 100, 100]
    for measured, tuned in ((sft, "sft"), (dpo, "diffusion_dpo")):
        (best,) = load_suite("mini").schedule(tuned)
        assert (measured.lr, measured.options) == (best.lr, best.options)


def test_a_method_the_suite_does_not_list_is_named():
    with pytest.raises(UsageError, match="has no settings for method 'kto'; it has sft"):
        load_suite("mini").schedule("kto")


def test_the_paper_scale_suite_holds_the_papers_protocol_and_hyperparameters():
    """Appendix A.1 of SPIN-Diffusion; sd15-released has what its model cards say instead."""
    paper, released = load_suite("sd15"), load_suite("sd15-released")
    evaluation = paper.evaluation
    assert (evaluation.guidance, evaluation.steps, evaluation.seeds[0], len(evaluation.seeds), evaluation.protocol) == (
        [7.5],
        50,
        5775709,
        5,
        "best",
    )
    assert [(s.steps, s.lr, s.beta) for s in paper.schedule("spin")] == [
        (50, 2e-5, 2000),
        (500, 2e-5, 5000),
        (200, 5e-8, 5000),
    ]
    assert [(s.steps, s.lr) for s in released.schedule("spin")] == [(500, 2e-5)] * 3
    sft, spin = paper.training("sft"), paper.training("spin")
    assert (sft.batch_size, sft.warmup_steps, spin.batch_size, spin.warmup_steps) == (512, 500, 2048, 200)
    assert released.evaluation == evaluation and released.name == "sd15-released"
    assert all(options == {"weights": "official"} for options in paper.metric_options.values())
    assert set(paper.metric_options) == set(paper.metrics)


def test_a_file_extends_a_suite_or_another_file(suite_file, tmp_path):
    suite_file()
    child = tmp_path / "child.yaml"
    child.write_text("extends: own.yaml\nname: child\ntrain: {batch_size: 7}\nevaluation: {guidance: [2.0]}\n")
    suite, parent = load_suite(str(child)), load_suite(str(tmp_path / "own.yaml"))
    assert (suite.name, suite.train.batch_size, suite.evaluation.guidance) == ("child", 7, [2.0])
    assert suite.train.micro_batch == parent.train.micro_batch and suite.methods == parent.methods
    child.write_text("extends: child.yaml\n")
    assert "extends itself" in complaint(suite=str(child))
    child.write_text("extends: sd51\n")
    assert complaint(suite=str(child)).startswith("unknown suite 'sd51' (did you mean 'sd15'?)")


def test_a_method_changes_the_train_section_for_itself_and_no_more():
    suite = load_suite("mini", ["methods.sft.train.batch_size=64"])
    assert (suite.training("sft").batch_size, suite.training("spin").batch_size) == (64, 32)
    assert suite.training("sft").micro_batch == suite.train.micro_batch
    text = complaint("methods.sft.train.batch_sise=64")
    assert "did you mean 'methods.sft.train.batch_size'?" in text
    assert "'methods.sft.train.batch_size': expected a value greater" in complaint("methods.sft.train.batch_size=0")
    assert complaint("methods.sft.train.precision=bf16") == (
        "methods.sft.train.precision: all methods of a suite train in one precision, train.precision"
    )
    assert load_suite("mini", ["methods.sft.train.precision=bf16", "train.precision=bf16"])


def test_a_variant_is_an_entry_of_its_own_that_names_its_method():
    entry = "{method: spin, opponent: {guidance: 3.0}, iterations: [{steps: 1, lr: 1e-3, beta: 10.0}]}"
    suite = load_suite("mini", [f"methods.spin-g3={entry}"])
    assert [suite.kind(name) for name in ("spin-g3", "spin", "kto")] == ["spin", "spin", "kto"]
    assert (suite.opponents("spin-g3").guidance, suite.opponents("spin").guidance) == (3.0, 1.0)
    assert suite.opponents("spin-g3").steps == suite.opponent.steps
    assert [settings.steps for settings in suite.schedule("spin-g3")] == [1]
    assert load_suite("mini").methods["spin"] == suite.methods["spin"]
    assert "did you mean 'methods.spin.opponent.guidance'?" in complaint("methods.spin.opponent.guidence=3.0")
    assert "'methods.spin.opponent.steps': expected a value greater" in complaint("methods.spin.opponent.steps=0")
    assert "methods.a/b: an entry's name becomes part of a folder's name" in complaint(f"methods.a/b={entry}")


def test_a_suite_that_still_has_a_judge_is_told_what_to_write(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("extends: mini\nname: old\njudge: mini\n")
    with pytest.raises(UsageError, match=r"old\.yaml: the judge is a metric: write judge last in metrics"):
        load_suite(str(path))


@pytest.mark.parametrize(
    ("judge", "metrics", "options"),
    [
        ("mini", ["clip", "judge"], {"clip": {"batch_size": 2}}),
        (None, ["clip"], {"clip": {"batch_size": 2}}),
        ("my/judge", ["clip", "judge"], {"clip": {"batch_size": 2}, "judge": {"weights": "my/judge"}}),
    ],
)
def test_a_stored_run_of_before_has_its_judge_among_the_metrics(judge, metrics, options):
    settings = load_suite("mini").model_dump()
    settings |= {"metrics": ["clip"], "metric_options": {"clip": {"batch_size": 2}}, "judge": judge}
    suite = stored_suite(settings)
    assert suite.metrics == metrics and suite.metric_options == options


def test_a_setting_that_came_later_makes_no_opponent_stale():
    """The hash of a stage of before it existed: these names and no others."""
    opponent = load_suite("mini").opponent
    assert list(opponent.identity()) == ["guidance", "steps", "scheduler", "roundtrip"]
    compiled = load_suite("mini", ["opponent.compile=true"]).opponent.identity()
    assert compiled == {**opponent.identity(), "compile": True}
