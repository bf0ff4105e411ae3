"""Whole networks at a few batch sizes: all contestants take turns in one benchmark.

The time that pytest-benchmark shows for it is that of the whole comparison. A bar that is missed is
reported, and fails nothing.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")
# A machine with a GPU may have what the kernels need, and no more.
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from bench.gpu.network import BATCHES, bar_info, time_networks


@pytest.mark.parametrize("batch", BATCHES, ids="network-batch{}".format)
def test_gpu_network(benchmark: Any, verdicts: list[dict[str, Any]], batch: int) -> None:
    benchmark.group = "GPU networks"
    measure = time_networks(batch)
    if benchmark.disabled:
        return
    times = benchmark.pedantic(measure, rounds=1, iterations=1)
    bars = []
    verdict = times.verdict()
    if verdict is not None:
        bars.append(bar_info(batch, verdict))
    benchmark.extra_info.update(kind="gpu_network", points=times.points(), bars=bars)
    verdicts += bars
