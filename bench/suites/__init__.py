"""Suites: everything two rows must have in common to be compared; YAML files, checked, overridden by key."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, Field, ValidationError

from bench import registry
from bench.errors import UsageError, did_you_mean, printable
from bench.suites import keys, options
from bench.suites.section import Iteration, Section

if TYPE_CHECKING:
    from bench.methods.base import Method

FOLDER = Path(__file__).parent
T = TypeVar("T")
JUDGE = (
    "the judge is a metric: write judge last in metrics, or leave it out there, instead of the setting 'judge'; "
    "for other weights than the bundled ones set metric_options.judge.weights"
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # becomes part of a folder's name


def _distinct(values: list[T]) -> list[T]:
    """Images are named by seed and kept by guidance: a repeated value would be the same images twice."""
    if len(set(values)) < len(values):
        raise ValueError("distinct values")
    return values


Scheduler = Literal["ddim", "pndm", "ddpm"]
Steps = Annotated[int, Field(ge=1, le=1000)]  # of a solver: diffusion models here have 1000 timesteps
Guidance = Annotated[float, Field(ge=0)]


class Model(Section):
    weights: str
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


class Data(Section):
    pairs: str
    size: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    deduplicate: Literal["prompt", "winner"] | None = None
    flip: bool = False
    precision: Literal["fp32", "fp16"] = "fp32"
    batch_size: int = Field(32, ge=1)


class Train(Section):
    batch_size: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(0, ge=0)
    lr_schedule: Literal["constant", "linear"] = "constant"
    schedule_steps: int | None = Field(None, ge=1)
    max_grad_norm: float = Field(1.0, gt=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    prompt_dropout: float = Field(0.0, ge=0, le=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    ema: float | None = Field(None, gt=0, lt=1)
    lora_rank: int | None = Field(None, ge=1)
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = Field(10, ge=1)
    checkpoint_every: int | None = Field(50, ge=1)
    checkpoint_minutes: float = Field(0.0, ge=0)
    stop_on_collapse: bool = True


class Opponent(Section):
    guidance: Guidance
    steps: Steps
    scheduler: Scheduler = "ddim"
    batch_size: int = Field(64, ge=1)
    roundtrip: bool = False
    compile: bool = False

    def identity(self) -> dict[str, Any]:
        """What decides the samples, for the hash of a stage; `compile` came later, and is in it where it is used."""
        return self.model_dump(exclude={"batch_size"} if self.compile else {"batch_size", "compile"})


class Prompts(Section):
    prompts: str
    limit: int | None = Field(None, ge=1)


class Evaluation(Section):
    prompt_sets: dict[str, Prompts] = Field(min_length=1)
    guidance: Annotated[list[Guidance], Field(min_length=1), AfterValidator(_distinct)]
    steps: Steps
    scheduler: Scheduler = "ddim"
    seeds: Annotated[list[int], Field(min_length=1), AfterValidator(_distinct)]
    protocol: Literal["one", "mean", "best"] = "one"
    batch_size: int = Field(64, ge=1)


class Schedule(Section):
    method: str | None = None  # whose variant this is, when not the method of the entry's own name
    train: dict[str, Any] = {}
    opponent: dict[str, Any] = {}
    iterations: list[Iteration] = Field(min_length=1)


class Search(Section):
    """How `bench search` seeks the settings of `methods`; `bench/suites/mini-measured.yaml` explains every field."""

    seeds: list[int] = Field(min_length=2)  # of training: none that a comparison uses
    prompts: str
    limit: int | None = Field(None, ge=1)
    metric: str
    grids: dict[str, list[dict[str, Annotated[list[Any], Field(min_length=1)]]]]  # by entry, one an iteration
    ends: dict[str, Literal["low", "high"]] = {}  # of later iterations' grids: beyond them is nothing to look for


class Suite(Section):
    """A whole suite. `bench/suites/mini.yaml` explains every field."""

    name: str
    description: str = ""
    model: Model
    data: Data
    train: Train
    opponent: Opponent
    evaluation: Evaluation
    metrics: list[str]
    metric_options: dict[str, dict[str, Any]] = {}
    methods: dict[str, Schedule] = Field(min_length=1)
    models: dict[str, str] = {}  # compared as they are: where each is found (bench.models.sources)
    search: Search | None = Field(None, exclude=True)  # not among the settings that a run keeps

    def checked(self, **changes: Any) -> Suite:
        """The suite with other sections, looked at as one that is read from a file is."""
        return _checked(self.model_copy(update=changes), "")

    def kind(self, entry: str) -> str:
        """The method that an entry of `methods` runs: the one it names, or the one of its own name."""
        return (self.methods[entry].method if entry in self.methods else None) or entry

    def method(self, entry: str) -> type[Method]:
        """The class behind an entry, which can be made with the options of each of its iterations."""
        found = registry.method(self.kind(entry))
        for index, iteration in enumerate(self.methods[entry].iterations if entry in self.methods else ()):
            options.build(found, iteration.options, ("methods", entry, "iterations", index))
        return found

    def resolved(self, entry: str, count: int | None = None) -> list[dict[str, Any]]:
        """All options of the method in each iteration, those that are not written by their default."""
        found = self.method(entry)
        return [options.resolve(found, iteration.options) for iteration in self.schedule(entry, count)]

    def entries(self, asked: str) -> list[str]:
        """The entries that `--method` asks for, one or all, models too; refuses what is not known or has no settings.

        Of the other entries the options are looked at too, so that a mistake in one does not wait for its turn; an
        entry of a method that is not installed here is left to those who have it.
        """
        names = [*self.methods, *self.models] if asked == "all" else [asked]
        for name in names:
            if name in self.models:
                continue
            registry.check("methods", self.kind(name))
            self.schedule(name)
        known = registry.names("methods")
        for name in self.methods:
            if self.kind(name) in known:
                self.method(name)
        return names

    def training(self, entry: str) -> Train:
        """The train section as an entry changes it."""
        return Train.model_validate({**self.train.model_dump(), **self.methods[entry].train})

    def opponents(self, entry: str) -> Opponent:
        """The opponent section as an entry changes it."""
        return Opponent.model_validate({**self.opponent.model_dump(), **self.methods[entry].opponent})

    def schedule(self, entry: str, count: int | None = None) -> list[Iteration]:
        """What an entry does in each iteration; beyond the listed ones, the last is repeated."""
        if entry not in self.methods:
            hint = did_you_mean(entry, self.methods)
            raise UsageError(
                f"suite '{self.name}' has no settings for method '{entry}'{hint}; it has {', '.join(self.methods)}"
            )
        listed = self.methods[entry].iterations
        count = len(listed) if count is None else count
        return [listed[min(index, len(listed) - 1)] for index in range(count)]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text for want of a dot; here it is the number it looks like."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def available() -> dict[str, Path]:
    """The suites that come with bench, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"), key=lambda path: path.stem)}


def load_suite(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Suite:
    """Load a suite by name, or from a YAML file, and apply `KEY=VALUE` overrides (dotted, YAML)."""
    path = available().get(name) or Path(name)
    suite = _validated(_read(name, path), f"{path}: ")
    return override(suite, overrides) if overrides else suite


def _read(name: str, path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a file, over those of the suite that its `extends` names; lists are replaced whole."""
    if not path.is_file():
        hint = did_you_mean(name, available())
        raise UsageError(f"unknown suite '{name}'{hint}; suites: {', '.join(available())}, or a YAML file")
    if path in below:
        raise UsageError(f"{path}: extends itself, by way of {below[-1]}")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected a mapping of settings, got {type(settings).__name__}")
    if "extends" not in settings:
        return settings
    parent = str(settings.pop("extends"))
    return _merged(_read(parent, available().get(parent) or path.parent / parent, (*below, path)), settings)


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return {**settings, **changes, **both}


def stored_suite(settings: dict[str, Any]) -> Suite:
    """The suite a run keeps in its folder."""
    return _validated(of_before(settings), "stored configuration: ")


def of_before(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they are written now, of a run from when the judge was a setting of its own and no metric."""
    if "judge" not in settings:
        return settings
    kept = {name: value for name, value in settings.items() if name != "judge"}
    weights = settings["judge"]
    if weights is None:
        return kept
    options = (
        kept.get("metric_options", {})
        if weights == "mini"
        else {**kept.get("metric_options", {}), "judge": {"weights": weights}}
    )
    return {**kept, "metrics": [*kept.get("metrics", []), "judge"], "metric_options": options}


def override(suite: Suite, overrides: list[str] | tuple[str, ...]) -> Suite:
    """Apply `KEY=VALUE` settings to a suite and check the result."""
    search = {} if suite.search is None else {"search": suite.search.model_dump()}
    known = {**suite.model_dump(), **search}
    tree = copy.deepcopy(known)
    typed = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--set takes KEY=VALUE, got '{item}'")
        if key == "judge":
            raise UsageError(JUDGE)
        try:
            keys.assign(tree, key, yaml.load(text, Loader=_Loader))
        except yaml.YAMLError as error:
            raise UsageError(f"--set {key}: '{text}' is not a valid value") from error
        typed.append(key)
    try:
        return _checked(Suite.model_validate(tree), "")
    except ValidationError as error:
        raise UsageError(keys.explain(error.errors(include_url=False)[0], known, typed)) from error


def _validated(settings: dict[str, Any], source: str) -> Suite:
    try:
        return _checked(Suite.model_validate(settings), source)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        known = copy.deepcopy(settings)
        if "judge" in settings:
            raise UsageError(source + JUDGE) from error
        for problem in problems:
            if problem["type"] == "extra_forbidden":
                keys.remove(known, problem["loc"])
        raise UsageError(source + keys.explain(problems[0], known)) from error


def _checked(suite: Suite, source: str) -> Suite:
    """Refuse names that are no folder's, and what an entry of `methods` may not change in train and opponent."""
    named = {"methods": suite.methods, "models": suite.models, "evaluation.prompt_sets": suite.evaluation.prompt_sets}
    for kind, names in named.items():
        for name in names:
            if not NAME.fullmatch(name):
                raise UsageError(
                    f"{source}{kind}.{printable(name, 80)}: an entry's name becomes part of a folder's "
                    "name: at most 64 letters, digits, - and _ only"
                )
    if both := [name for name in suite.models if name in suite.methods or name == "base"]:
        raise UsageError(f"{source}models.{both[0]}: a method of the suite, or the base, has this name already")
    for entry in suite.methods:
        for section, changed in (("train", suite.training), ("opponent", suite.opponents)):
            try:
                changed(entry)
            except ValidationError as error:
                raise UsageError(source + _explained(error, suite, entry, section)) from error
        if suite.training(entry).precision != suite.train.precision:
            raise UsageError(
                f"{source}methods.{entry}.train.precision: all methods of a suite train in one "
                "precision, train.precision"
            )
    return suite


def _explained(error: ValidationError, suite: Suite, entry: str, section: str) -> str:
    """What is wrong in a section as an entry changes it."""
    problem = error.errors(include_url=False)[0]
    known = {"methods": {entry: {section: getattr(suite, section).model_dump()}}}
    return keys.explain({**problem, "loc": ("methods", entry, section, *problem["loc"])}, known)
