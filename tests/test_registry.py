"""Methods and metrics by name, built in or from another package."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import pytest

from bench import registry
from bench.errors import BenchError, UsageError
from bench.methods.sft import SFT
from bench.methods.signals import Signal
from bench.metrics.base import Metric
from bench.metrics.columns import Column


@pytest.fixture
def third_party(monkeypatch):
    """Another package's entry points: a method, a broken one, and one that takes a built-in's name."""
    module = ModuleType("other_package")
    module.Theirs = type("Theirs", (SFT,), {"name": "theirs"})
    module.Hollow = type("Hollow", (), {"name": "hollow", "__module__": "other_package"})
    module.Loud = type("Loud", (SFT,), {"signals": (Signal("grad_norm", "", ""),)})
    monkeypatch.setitem(sys.modules, "other_package", module)
    theirs, missing = "other_package:Theirs", "no_such_package:Thing"
    points = EntryPoints(
        EntryPoint(name, value, "bench.methods")
        for name, value in (
            ("theirs", theirs),
            ("broken", missing),
            ("sft", theirs),
            ("loud", "other_package:Loud"),
            ("hollow", "other_package:Hollow"),
        )
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    return module


@pytest.mark.parametrize("kind", registry.BUILT_IN)
def test_built_ins_load_under_their_own_names(kind):
    load = {"methods": registry.method, "metrics": registry.metric}[kind]
    for name in registry.BUILT_IN[kind]:
        assert load(name).name == name


def test_unknown_names_list_what_there_is_and_the_nearest():
    with pytest.raises(UsageError) as caught:
        registry.method("spn")
    assert str(caught.value) == ("unknown method 'spn' (did you mean 'spin'?); methods: sft, diffusion_dpo, spin")


def test_another_package_adds_a_method(third_party):
    assert registry.method("theirs") is third_party.Theirs
    assert set(registry.names("methods")) - set(registry.BUILT_IN["methods"]) == {"theirs", "broken", "loud", "hollow"}
    assert registry.names("metrics") == list(registry.BUILT_IN["metrics"])


def test_another_package_cannot_replace_a_built_in(third_party):
    assert registry.method("sft").__module__ == "bench.methods.sft"


def test_a_broken_plug_in_is_named_when_it_is_used_and_not_before(third_party):
    assert "broken" in registry.names("methods")
    with pytest.raises(BenchError, match="method 'broken' cannot be loaded from no_such_package:Thing"):
        registry.method("broken")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hollow", "other_package.Hollow has no title, pairing, needs_reference"),
        ("loud", "a signal cannot be called grad_norm: every training logs that"),
    ],
)
def test_a_plug_in_that_breaks_the_contract_is_named(third_party, name, said):
    with pytest.raises(BenchError, match=f"method '{name}'.*{said}"):
        registry.method(name)


@pytest.mark.parametrize(
    ("attributes", "problem"),
    [
        (None, "is no subclass of bench.metrics.base.Metric"),
        ({"name": "mine"}, "calls itself 'mine'; register it under that name"),
        ({"name": "theirs", "columns": ()}, r"columns need names of their own, without a slash; it has \[\]"),
        ({"name": "theirs", "columns": (Column("a", "A"), Column("a", "B"))}, r"it has \['a', 'a'\]"),
        ({"name": "theirs", "columns": (Column("theirs/a", "A"),)}, r"it has \['theirs/a'\]"),
    ],
)
def test_a_plugged_in_metric_is_checked_when_it_is_loaded(monkeypatch, attributes, problem):
    module = ModuleType("other_package")
    module.Theirs = object if attributes is None else type("Theirs", (Metric,), {"title": "Theirs", **attributes})
    monkeypatch.setitem(sys.modules, "other_package", module)
    points = EntryPoints([EntryPoint("theirs", "other_package:Theirs", "bench.metrics")])
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    with pytest.raises(BenchError, match=f"^metric 'theirs': .*{problem}"):
        registry.metric("theirs")
