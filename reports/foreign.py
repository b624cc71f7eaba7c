"""What a run's files must look like, so that a folder with anything else in it costs the others nothing."""

from __future__ import annotations

from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pydantic import BaseModel, ConfigDict, ValidationError

Section = dict[str, Any]
TEXTS = ("method", "prompt_set", "prompt_id", "metric")


class Open(BaseModel):
    """Everything reports read has its type; what they do not know may be there."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Evaluation(Open):
    prompt_sets: dict[str, Section] = {}
    guidance: list[float] = []
    seeds: list[int] = []
    protocol: str = "one"


class Suite(Open):
    name: str = ""
    model: Section = {}
    data: Section = {}
    train: Section = {}
    opponent: Section = {}
    evaluation: Evaluation = Evaluation()
    metric_options: dict[str, Section] = {}
    methods: dict[str, Section] = {}


class Protocol(Open):
    method: str
    method_title: str | None = None
    seed: int
    iterations: int | None = None
    created: str = ""
    git_commit: str | None = None
    suite: Suite = Suite()
    metrics: dict[str, Section] = {}
    prompt_sets: dict[str, Section] = {}
    model: Section | None = None
    judge: Section | None = None
    data: Section = {}
    versions: dict[str, str] = {}


class Spent(Open):
    name: str
    seconds: float
    flops: float | None = None
    pairs: int | None = None
    images: int | None = None


class Cost(Open):
    stages: list[Spent] = []
    shared_stages: list[Spent] = []
    device: str | None = None


def checked(run: dict[str, Any]) -> dict[str, Any]:
    """A run as `load._read` returns it, if everything in it is what reports take it for; else ValueError."""
    for shape, name in ((Protocol, "protocol"), (Cost, "cost")):
        try:
            shape.model_validate(run[name])
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise ValueError(f"{name}.json: {place}: {problem['msg']}, got {str(problem['input'])[:40]!r}") from error
    if not (run["protocol"].get("method_title") or "").isprintable():
        raise ValueError(f"protocol.json: method_title {run['protocol']['method_title']!r} cannot be printed")
    _expect_texts(run["scores"], "scores.parquet", TEXTS)
    history = run["history"]
    if len(history):
        _expect_texts(history, "history.parquet", ("method",))
        for name in history.columns.difference(["method", "run"]):
            if not is_numeric_dtype(history[name]):
                raise ValueError(f"history.parquet: {name} is not a number everywhere")
    return run


def _expect_texts(table: pd.DataFrame, file: str, names: tuple[str, ...]) -> None:
    for name in names:
        values = table[name].unique() if name in table else [None]
        if not all(isinstance(value, str) and value.isprintable() for value in values):
            raise ValueError(f"{file}: {name} is not text that can be printed everywhere")
