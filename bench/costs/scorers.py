"""What the scorers of a suite take, without loading what is large."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench import registry
from bench.costs import cost, memory
from bench.data import load_prompts
from bench.errors import BenchError
from bench.metrics import official
from bench.metrics.base import Metric
from bench.runtime.progress import quiet
from bench.scoring.evaluate import Scorers
from bench.suites import Suite

EXAMPLE = load_prompts("world:test", 1).prompts[0]  # a caption that every scorer can read, the judge too


def scoring_cost(suite: Suite, notes: list[str]) -> tuple[int, int]:
    """Operations for one image with its prompt, and bytes of weights, over all scorers.

    Miniatures are run once and counted; of official checkpoints the architecture is known, of others what the metric
    declares.
    """
    given = {name: suite.metric_options.get(name, {}) for name in suite.metrics}
    kinds = {name: registry.metric(name) for name in suite.metrics}
    small = [name for name, kind in kinds.items() if kind.weights_of(given[name]) == "mini"]
    large = [name for name in suite.metrics if name not in small and name in official.ENCODERS]
    flops, weights = official.cost(large)
    for name in (name for name in suite.metrics if name not in {*small, *large}):
        if (declared := kinds[name].cost) is None:
            notes.append(f"metric {name} is not counted: it declares no cost, and is too large to be loaded for a plan")
        else:
            flops, weights = flops + declared.flops, weights + declared.weights
    loaded: dict[str, Metric] = {}
    for name in small:
        try:
            loaded |= Scorers.load([name], options=given).metrics
        except BenchError as error:
            notes.append(f"metric {name} is not counted: {error}")
    with quiet():
        flops += cost.flops(lambda: Scorers(loaded).score(np.zeros((1, 64, 64, 3), np.uint8), [EXAMPLE]))
    return flops, weights + sum(map(_weights, loaded.values()))


def _weights(scorer: Any) -> int:
    """Bytes of all networks a scorer holds, and of those its parts hold."""
    parts = [scorer, *vars(scorer).values()]
    nested = [value for part in parts if hasattr(part, "__dict__") for value in vars(part).values()]
    modules = {id(part): part for part in [*parts, *nested] if isinstance(part, torch.nn.Module)}
    return sum(memory.parameter_bytes(module) for module in modules.values())
