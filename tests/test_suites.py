"""Suites: what is in them, and one helpful line for every way to get a setting wrong."""

from __future__ import annotations

import pytest
import yaml
from tiny_bench import SUITE

from bench.errors import UsageError
from bench.suites import available, load_suite
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
    assert set(resolved) - set(written) == {"methods.sft.iterations.0.beta"}


def test_evaluation_guidance_was_fixed_in_advance():
    assert load_suite("mini").evaluation.guidance == [1.0, 3.0]
    assert load_suite("mini").opponent.guidance == 1.0


def test_overrides_reach_sections_lists_and_named_entries():
    suite = load_suite("mini", ["train.batch_size=8", "evaluation.guidance=[2, 7.5]", "judge=null",
                                "methods.spin.iterations.1.lr=1e-5",
                                "evaluation.prompt_sets.more.prompts=world:hard",
                                "metric_options.clip.weights=some/folder"])
    assert suite.train.batch_size == 8
    assert suite.evaluation.guidance == [2, 7.5]
    assert suite.judge is None
    assert suite.methods["spin"].iterations[1].lr == 1e-5
    assert suite.evaluation.prompt_sets["more"].limit is None
    assert suite.metric_options == {"clip": {"weights": "some/folder"}}


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("2E+3", 2e3), ("-1e2", -1e2), ("1.5e3", 1.5e3)])
def test_numbers_without_a_dot_are_numbers(text, value, suite_file):
    path = suite_file(metric_options={"darkness": {}})
    assert load_suite(path, [f"metric_options.darkness.x={text}"]).metric_options["darkness"]["x"] == value


@pytest.mark.parametrize(("typed", "nearest"), [
    ("trian.lr", "did you mean 'train'?"),
    ("trian.lr", "'lr' is set by methods.sft.iterations.0.lr"),
    ("train.batch_sise", "did you mean 'train.batch_size'?"),
    ("trian.batch_size", "did you mean 'train.batch_size'?"),
    ("methods.spn.iterations.0.lr", "did you mean 'methods.spin.iterations.0.lr'?"),
    ("methods.spin.iterations.9.lr", "is set by"),
    ("evaluation.prompt_sets.test.limt", "did you mean 'evaluation.prompt_sets.test.limit'?"),
    ("model.dtype.x", "did you mean 'model.dtype'?"),
    ("seed", "is set by data.seed"),
])
def test_unknown_keys_name_the_nearest(typed, nearest):
    text = complaint(f"{typed}=1")
    assert text.startswith(f"unknown setting '{typed}'")
    assert nearest in text


@pytest.mark.parametrize(("override", "said"), [
    ("train.batch_size=many", "'train.batch_size': expected an integer, got 'many' (str)"),
    ("train.batch_size=1.5", "'train.batch_size': expected an integer, got 1.5 (float)"),
    ("train.batch_size='4'", "'train.batch_size': expected an integer, got '4' (str)"),
    ("train.batch_size=0", "expected a value greater than or equal to 1, got 0"),
    ("opponent.guidance=high", "'opponent.guidance': expected a number, got 'high'"),
    ("evaluation.guidance=3", "'evaluation.guidance': expected a list, got 3 (int)"),
    ("evaluation.guidance=[1, x]", "'evaluation.guidance.1': expected a number"),
    ("evaluation.protocol=two", "expected 'one', 'mean' or 'best', got 'two'"),
    ("train=3", "'train': expected a section, got 3"),
    ("judge=3", "'judge': expected text, got 3"),
    ("train.batch_size", "--set takes KEY=VALUE, got 'train.batch_size'"),
    ("=3", "--set takes KEY=VALUE"),
    ("metrics=[a", "'[a' is not a valid value"),
])
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


def test_a_method_the_suite_does_not_list_is_named():
    with pytest.raises(UsageError, match="has no settings for method 'kto'; it has sft"):
        load_suite("mini").schedule("kto")
