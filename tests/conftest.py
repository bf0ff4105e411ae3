"""Settings that all tests share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from build_tools import cuda_emulator
from build_tools.toolchain import BuildError

# The Triton kernels are tested on CPU tensors. Triton looks at it when they are defined.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Derandomized: a run draws the same examples every time, and prints how to reproduce a failure.
settings.register_profile(
    "dfs",
    derandomize=True,
    deadline=None,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("dfs")


def pytest_configure(config: pytest.Config) -> None:
    """Have the CUDA kernels emulated too, but in a run of what needs a GPU that is there."""
    if config.option.markexpr == "gpu" and torch.cuda.is_available():
        return
    if "DFS_CUDA_EMULATOR" in os.environ:
        return
    try:
        os.environ["DFS_CUDA_EMULATOR"] = str(cuda_emulator.build_module())
    except BuildError as error:
        warnings.warn(f"the CUDA kernels are not tested: {error}", RuntimeWarning, stacklevel=1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20200100705)


@pytest.fixture
def compiler() -> Iterator[None]:
    """A fresh torch.compile, whose caches no other test has filled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer, until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
