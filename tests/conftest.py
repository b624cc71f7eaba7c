"""Fixtures for every room; importing torch is left to the tests that ask for one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import StableDiffusionPipeline

# Runs in this process are compared, to the last bit, with runs under torchrun, which sets this for its processes.
os.environ["OMP_NUM_THREADS"] = "1"


# In CI the search for counterexamples is the same every time, so that a failure is the change's; elsewhere it is new
# every time, and longer.
settings.register_profile("ci", derandomize=True)
settings.register_profile("search", max_examples=300, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "search")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def tiny_pipeline() -> StableDiffusionPipeline:
    """Shared by the whole session: copy a component before changing it."""
    from tiny import make_pipeline

    return make_pipeline()


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tiny_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def darkness() -> Iterator[None]:
    """A metric that needs no weights, under its name for the tests of a module."""
    import tiny_bench

    from bench import registry

    registry.BUILT_IN["metrics"]["darkness"] = tiny_bench.DARKNESS
    yield
    del registry.BUILT_IN["metrics"]["darkness"]


@pytest.fixture
def make_accelerator() -> Iterator[Callable[[str], Accelerator]]:
    """Build a CPU accelerator; accelerate keeps its precision in a global to be cleared between tests."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def clear() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def build(mixed_precision: str = "no") -> Accelerator:
        clear()
        return Accelerator(cpu=True, mixed_precision=mixed_precision)

    yield build
    clear()


@pytest.fixture
def accelerator(make_accelerator: Callable[[str], Accelerator]) -> Accelerator:
    return make_accelerator("no")
