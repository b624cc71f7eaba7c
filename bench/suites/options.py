"""A method's own hyperparameters: what its constructor takes, found there, checked, and told to people.

An option needs a type, and has what else the constructor says: a default, a line `name: what it is` in its docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, PydanticUserError, ValidationError, create_model

from bench.errors import BenchError, UsageError, did_you_mean, first_line
from bench.suites import keys
from bench.suites.section import Iteration, Section

if TYPE_CHECKING:
    from bench.methods.base import Method

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One hyperparameter, for people: its type as it is written, its default, and the first sentence about it."""

    name: str
    type: str
    default: Any
    meaning: str

    def record(self) -> dict[str, Any]:
        """Without a `default` where there is none."""
        known = {"name": self.name, "type": self.type, "meaning": self.meaning}
        return known if self.default is REQUIRED else {**known, "default": self.default}


def options(method: type[Method]) -> dict[str, Option]:
    """Every option of a method by name, in the constructor's order; BenchError where one has no type."""
    hints, text = _hints(method), inspect.getdoc(method.__init__) or ""
    return {
        name: Option(name, _written(hints[name]), parameter.default, _meaning(name, text))
        for name, parameter in _parameters(method).items()
    }


def resolve(method: type[Method], given: Mapping[str, Any], place: Sequence[str | int] = ()) -> dict[str, Any]:
    """All options, as given or by default; UsageError with the setting's name, which is below `place` in the suite."""
    try:
        return dict(_model(method).model_validate(dict(given)))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] != "extra_forbidden":
            raise UsageError(keys.explain({**problem, "loc": (*place, *problem["loc"])}, {})) from error
        name, takes = str(problem["loc"][0]), list(_parameters(method))
        raise UsageError(
            f"unknown setting '{'.'.join(map(str, (*place, name)))}'"
            f"{did_you_mean(name, [*Iteration.model_fields, *takes])}; {method.name} takes "
            f"{', '.join(takes) or 'no options'}"
        ) from error


def build(method: type[Method], given: Mapping[str, Any], place: Sequence[str | int] = ()) -> Method:
    """A method with its options; what the constructor itself refuses is a UsageError too."""
    complete = resolve(method, given, place)
    try:
        return method(**complete)
    except (TypeError, ValueError) as error:
        where = ".".join(map(str, place)) or f"method {method.name}"
        raise UsageError(f"{where}: {first_line(error)}") from error


def identity(method: type[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are not at their default: an option that a method is given later makes no older result stale."""
    known = _parameters(method)
    return {
        name: value
        for name, value in resolve(method, given).items()
        if known[name].default is REQUIRED or value != known[name].default
    }


@lru_cache
def _model(method: type[Method]) -> type[BaseModel]:
    """What checks the options: strict like every section of a suite."""
    hints = _hints(method)
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is REQUIRED else parameter.default)
        for name, parameter in _parameters(method).items()
    }
    try:
        return create_model(f"{method.__name__}Options", __base__=Section, **fields)
    except (PydanticUserError, NameError) as error:
        raise BenchError(f"{_whose(method)}: {first_line(error)}") from error


def _parameters(method: type[Method]) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(method).parameters)
    for name, parameter in found.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise BenchError(f"{_whose(method)} takes {parameter}: name every option, so that a mistake can be found")
        if parameter.annotation is REQUIRED:
            raise BenchError(f"{_whose(method)} does not say what type '{name}' is: write '{name}: float' or the like")
        if name in Iteration.model_fields:
            raise BenchError(
                f"{_whose(method)} cannot have an option '{name}': every iteration has a setting of that "
                "name; choose another"
            )
    return found


def _hints(method: type[Method]) -> dict[str, Any]:
    try:
        return get_type_hints(method.__init__, include_extras=True)
    except NameError as error:
        raise BenchError(f"{_whose(method)}: {first_line(error)}; import what its types need") from error


def _whose(method: type[Method]) -> str:
    return f"the constructor of {method.__module__}.{method.__qualname__}"


def _written(hint: Any) -> str:
    """A type as in a suite's comment: `float`, `float | None`, `constant | min_snr`."""
    if get_origin(hint) is Literal:
        return " | ".join(str(value) for value in get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _meaning(name: str, text: str) -> str:
    """The first sentence of the line `name: ...` of a docstring and what follows it up to the next such line."""
    found = re.search(rf"^{name}: (.+?)(?=\n\s*\n|\n\w+: |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.split(r"(?<=\.)\s", " ".join(found[1].split()))[0].rstrip(".") if found else ""
