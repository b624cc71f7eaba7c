"""What every part of a suite has in common, and the part that a method adds its own settings to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Section(BaseModel):
    """Strict: no unknown keys, no silent change of type (a number in quotes is not a number), no nan and no inf."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Iteration(Section):
    """What one training does. All else that stands here is an option of the method, and is checked when that is known
    (bench/suites/options.py): a suite is read without importing any method."""

    model_config = ConfigDict(extra="allow")

    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    checkpoints: list[int] = []

    @field_validator("checkpoints")
    @classmethod
    def _ascending(cls, checkpoints: list[int], info: ValidationInfo) -> list[int]:
        """The end of an iteration is always a result, so it is not one of them."""
        steps = info.data.get("steps")
        if steps and not all(before < after for before, after in pairwise([0, *checkpoints, steps])):
            raise ValueError(f"ascending steps of the iteration, from 1 and below its {steps}")
        return checkpoints

    @model_validator(mode="before")
    @classmethod
    def _without_beta(cls, values: Any) -> Any:
        """Runs of before methods had options of their own say `beta: null` where a method has none."""
        if isinstance(values, dict) and values.get("beta", 0) is None:
            return {name: value for name, value in values.items() if name != "beta"}
        return values

    @property
    def options(self) -> dict[str, Any]:
        """The method's own settings, as they were written."""
        return dict(self.model_extra or {})
