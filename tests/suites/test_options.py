"""A method's own hyperparameters: found in its constructor, checked where a suite sets them, told to people."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
from plug_ins import DiffusionKTO, MaPO
from pydantic import Field

from bench import registry
from bench.commands.listing import method_records
from bench.errors import BenchError, UsageError
from bench.experiment import Experiment
from bench.methods.diffusion_dpo import DiffusionDPO
from bench.methods.sft import SFT
from bench.methods.spin import SPIN
from bench.suites import Iteration, Suite, load_suite, options
from bench.walk import Training

KTO = "methods.diffusion_kto={iterations: [{steps: 2, lr: 1e-3, beta: 10, desirable_weight: 2}]}"


@pytest.fixture(autouse=True)
def plugged_in(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN["methods"], "diffusion_kto", "plug_ins:DiffusionKTO")


def loaded(*settings: str) -> Suite:
    return load_suite("mini", settings)


def complaint(*settings: str, asked: str = "sft") -> str:
    with pytest.raises(UsageError) as caught:
        loaded(*settings).entries(asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def taking(constructor: Callable) -> type:
    return type("Own", (SFT,), {"name": "own", "__init__": constructor, "__module__": __name__})


def test_an_option_has_name_type_default_and_the_first_sentence_about_it():
    weighting = "constant | min_snr | h_squared"
    assert [option.record() for option in options.options(DiffusionKTO).values()] == [
        {"name": "beta", "type": "float", "meaning": "how fast a gain becomes certain"},
        {"name": "desirable_weight", "type": "float", "meaning": "of winners against losers", "default": 1.0},
    ]
    assert {name: (one.type, one.default) for name, one in options.options(SPIN).items()} == {
        "beta": ("float", options.REQUIRED),
        "weighting": (weighting, "constant"),
    }
    assert options.options(SFT)["weighting"].meaning == ("of timesteps, multiplies the loss (methods/weightings.py)")
    assert [one.meaning for one in options.options(MaPO).values()] == ["", "", ""]

    def constructor(self, a: float | None = None, b: list[int] = (), c: Annotated[int, Field(ge=1)] = 1): ...

    assert [one.type for one in options.options(taking(constructor)).values()][:2] == ["float | None", "list[int]"]


@pytest.mark.parametrize("method", registry.BUILT_IN["methods"])
def test_every_option_that_ships_is_explained(method):
    assert all(option.meaning for option in options.options(registry.method(method)).values())


def test_options_stand_in_a_suite_and_in_set_and_the_rest_are_defaults():
    suite = loaded(KTO, "methods.spin.iterations.1.weighting=min_snr")
    assert suite.resolved("diffusion_kto") == [{"beta": 10.0, "desirable_weight": 2.0}]
    assert suite.resolved("spin", 4)[1:3] == [
        {"beta": 10000.0, "weighting": "min_snr"},
        {"beta": 3000.0, "weighting": "constant"},
    ]
    assert suite.entries("diffusion_kto") == ["diffusion_kto"]
    kto = options.build(DiffusionKTO, suite.schedule("diffusion_kto")[0].options)
    assert (kto.beta, kto.desirable_weight) == (10.0, 2.0)
    assert isinstance(kto.beta, float)
    assert suite.model_dump()["methods"]["diffusion_kto"]["iterations"][0]["desirable_weight"] == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "iterations.0.betta=3",
            "unknown setting 'methods.{}.iterations.0.betta' (did you mean 'beta'?); {} takes beta, ",
        ),
        ("iterations.0.warmup=3", "unknown setting 'methods.{}.iterations.0.warmup'; {} takes beta, "),
        (
            "iterations.0.stepz=3",
            "unknown setting 'methods.{}.iterations.0.stepz' (did you mean 'steps'?); {} takes beta",
        ),
        ("iterations.0.beta=high", "setting 'methods.{}.iterations.0.beta': expected a number, got 'high' (str)"),
        ("iterations.0.beta='3'", "setting 'methods.{}.iterations.0.beta': expected a number, got '3' (str)"),
        ("iterations.0.beta=true", "setting 'methods.{}.iterations.0.beta': expected a number, got True (bool)"),
        ("iterations.0.beta=.nan", "setting 'methods.{}.iterations.0.beta': expected a finite number, got nan"),
        ("iterations=[{steps: 1, lr: 1.0}]", "setting 'methods.{}.iterations.0.beta' is missing"),
    ],
)
@pytest.mark.parametrize("method", ["spin", "diffusion_kto"])
def test_a_mistake_is_answered_in_one_line_whichever_method_is_asked_for(method, setting, said):
    """Built in or plugged in, and also while another method is run: SFT's run has the same suite."""
    for asked in ("sft", method, "all"):
        assert complaint(KTO, f"methods.{method}.{setting}", asked=asked).startswith(said.format(method, method))


def test_a_word_that_is_not_among_the_choices_names_them():
    assert complaint("methods.sft.iterations.0.weighting=minsnr") == (
        "setting 'methods.sft.iterations.0.weighting': expected 'constant', 'min_snr' or 'h_squared', "
        "got 'minsnr' (str)"
    )


def test_what_the_constructor_refuses_names_the_iteration():
    assert complaint("methods.spin.iterations.1.beta=-1") == (
        "methods.spin.iterations.1: beta must be above 0, not -1.0"
    )


def test_a_variants_options_are_those_of_its_method():
    entry = "methods.kto-2={method: diffusion_kto, iterations: [{steps: 1, lr: 1.0, beta: 1.0, weight: 2.0}]}"
    assert "'methods.kto-2.iterations.0.weight' (did you mean 'desirable_weight'?)" in complaint(entry)


def test_an_entry_of_a_method_that_is_not_installed_waits_for_those_who_have_it():
    suite = loaded("methods.elsewhere={iterations: [{steps: 1, lr: 1.0, anything: 3}]}")
    assert suite.entries("sft") == ["sft"]
    assert suite.model_dump()["methods"]["elsewhere"]["iterations"] == [
        {"steps": 1, "lr": 1.0, "checkpoints": [], "anything": 3}
    ]
    with pytest.raises(UsageError, match="unknown method 'elsewhere'"):
        suite.entries("elsewhere")


def untyped(self, beta): ...
def keywords(self, **rest: float): ...
def taken(self, lr: float): ...
def unknown_type(self, beta: NoSuchType): ...  # noqa: F821


@pytest.mark.parametrize(
    ("constructor", "said"),
    [
        (untyped, "does not say what type 'beta' is: write 'beta: float'"),
        (keywords, r"takes \*\*rest: .*name every option"),
        (taken, "cannot have an option 'lr': every iteration has a setting of that name"),
        (unknown_type, "name 'NoSuchType' is not defined; import what its types need"),
    ],
)
def test_a_constructor_that_cannot_be_checked_is_named(constructor, said):
    with pytest.raises(BenchError, match=f"the constructor of test_options.Own:? {said}"):
        options.build(taking(constructor), {})


def test_constraints_in_the_annotation_are_kept():
    def constructor(self, order: Annotated[int, Field(ge=1)] = 1, norm: Literal[1, 2] = 2): ...

    assert options.resolve(taking(constructor), {"order": 3}) == {"order": 3, "norm": 2}
    with pytest.raises(UsageError, match="'order': expected a value greater than or equal to 1, got 0"):
        options.resolve(taking(constructor), {"order": 0})


def test_only_what_differs_from_a_default_decides_a_stage():
    """So results of before an option existed stay good, and `weighting: constant` written out is the same training."""
    assert options.identity(DiffusionDPO, {"beta": 5}) == {"beta": 5.0}
    assert options.identity(DiffusionDPO, {"beta": 5, "weighting": "constant"}) == {"beta": 5.0}
    assert options.identity(DiffusionDPO, {"beta": 5, "weighting": "min_snr"}) == {"beta": 5.0, "weighting": "min_snr"}
    assert options.identity(SFT, {}) == {}


def test_options_decide_the_stage_of_a_training_unless_they_are_at_their_default():
    def chosen(**own: object) -> dict:
        span = Training("spin", 1, Iteration(steps=1, lr=1.0, **own), 0, 1)
        return Experiment.chosen(SimpleNamespace(methods=[SPIN(1.0)]), span)

    assert chosen(beta=2) == chosen(beta=2.0, weighting="constant") == {"beta": 2.0}
    assert chosen(beta=2.0, weighting="min_snr") == {"beta": 2.0, "options": {"weighting": "min_snr"}}
    span = Training("sft", 1, Iteration(steps=1, lr=1.0), 0, 1)
    assert Experiment.chosen(SimpleNamespace(methods=[SFT()]), span) == {"beta": None}


def test_settings_of_older_runs_are_read():
    """They said `beta: null` where a method has none."""
    assert Iteration(steps=1, lr=1.0, beta=None).options == {}
    assert Iteration.model_validate({"steps": 1, "lr": 1.0, "beta": 3.0}).options == {"beta": 3.0}


def test_the_list_says_of_a_method_that_cannot_be_imported_why(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN["methods"], "broken", "no_such_package:Thing")
    records = {record["name"]: record for record in method_records()}
    assert "cannot be loaded from no_such_package:Thing" in records["broken"]["problem"]
    assert [option["name"] for option in records["diffusion_kto"]["options"]] == ["beta", "desirable_weight"]
