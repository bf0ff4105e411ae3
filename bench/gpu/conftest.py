"""What the GPU benchmarks share: without a GPU they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import pytest

from bench.gpu.device import facts, lost_reason, machine, missing_reason
from bench.gpu.peaks import measured_peaks
from bench.gpu.prepared import tf32
from dfs_kernels.triton.tuning import tuning


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skips without a GPU, and gives each benchmark's memory back."""
    reason = missing_reason()
    if reason is not None:
        pytest.skip(reason)
    wants_tuning = request.config.getoption("autotune")
    with tf32(False), tuning() if wants_tuning else nullcontext():
        yield
    reason = lost_reason()
    if reason is not None:
        pytest.exit(f"{request.node.nodeid} broke the CUDA context: {reason}", returncode=1)
    machine().release()


# pytest-benchmark's own hook; optional, since the plugin need not be installed to collect.
@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    if any(b["extra_info"].get("kind", "").startswith("gpu_") for b in output_json["benchmarks"]):
        output_json["machine_info"]["gpu"] = {**facts(), "peaks": asdict(measured_peaks())}
