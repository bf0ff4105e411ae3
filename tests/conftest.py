"""Settings that all tests share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from bench.gpu.device import is_rehearsal, lost_reason, machine, missing_reason
from build_tools import cuda_emulator
from build_tools.toolchain import BuildError

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
    # Triton looks at it when a kernel is defined, so a run compiles all kernels or interprets all,
    # on CPU tensors: tests that need a GPU have a run of their own, ``pytest -m gpu``.
    if is_rehearsal() or config.option.markexpr != "gpu" or not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        emulate_cuda()


def emulate_cuda() -> None:
    """Have the CUDA kernels run on CPU tensors too: looked at when their backend is imported."""
    if "DFS_CUDA_EMULATOR" in os.environ:
        return
    try:
        os.environ["DFS_CUDA_EMULATOR"] = str(cuda_emulator.build_module())
    except BuildError as error:
        warnings.warn(f"the CUDA kernels are not tested: {error}", RuntimeWarning, stacklevel=1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    reason = missing_reason()
    if reason is None and not is_rehearsal() and os.environ.get("TRITON_INTERPRET") == "1":
        reason = "Triton's kernels are interpreted in this run: pytest -m gpu runs these"
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def healthy_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests marked gpu: full float32, and an end of the run where the GPU is lost."""
    if request.node.get_closest_marker("gpu") is None or is_rehearsal():
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    reason = lost_reason()
    if reason is not None:
        pytest.exit(f"{request.node.nodeid} broke the CUDA context: {reason}", returncode=1)


@pytest.fixture
def device() -> torch.device:
    """For tests marked gpu: the GPU, or a CPU in a rehearsal."""
    return machine().device


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
