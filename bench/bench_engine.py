"""Frozen networks beside PyTorch, ONNX Runtime and OpenVINO, and the bars of bench/engine_bars.py.

All contestants on a network, batch and number of threads are timed in turns within one comparison,
which the first benchmark that looks at it makes. What pytest-benchmark shows as its time is that of
the whole comparison; what counts is in ``extra_info`` and in the report.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.engine_bars import BATCHES, DEPTHS, EngineCase, engine_cases
from bench.engine_contestants import CONTESTANTS, measure
from bench.interleaved import spread
from bench.prepared import Unavailable

pytest.importorskip("pytest_benchmark")
pytest.importorskip("dfs_kernels._cpu")

CASES = tuple(engine_cases())


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("threads", [1, 2], ids=["1thread", "2threads"], indirect=True)
@pytest.mark.parametrize("batch", BATCHES, ids=[f"batch{batch}" for batch in BATCHES])
@pytest.mark.parametrize("depth", DEPTHS, ids=[f"resnet{depth}" for depth in DEPTHS])
def test_network(benchmark: Any, threads: int, depth: int, batch: int, name: str) -> None:
    benchmark.group = f"networks, threads {threads}"
    measured = benchmark.pedantic(measure, args=(depth, batch, threads), rounds=1, iterations=1)
    if name in measured.missing:
        pytest.skip(measured.missing[name])
    seconds = spread(measured.times[name])
    benchmark.extra_info.update(
        {
            "kind": "network",
            "contestant": name,
            "label": CONTESTANTS[name].label,
            "network": f"ResNet-{depth}",
            "batch": batch,
            "threads": threads,
            "seconds": seconds.median,
            "low": seconds.low,
            "high": seconds.high,
        }
    )


def _id(case: EngineCase) -> str:
    return f"{case.bar.name}-{case.network.lower().replace(' ', '-')}-batch{case.batch}"


@pytest.mark.parametrize(
    ("threads", "case"),
    [pytest.param(c.threads, c, id=f"{_id(c)}-{c.threads}threads") for c in CASES],
    indirect=["threads"],
)
def test_engine_bar(
    benchmark: Any, verdicts: list[dict[str, Any]], threads: int, case: EngineCase
) -> None:
    benchmark.group = f"engine bars, threads {threads}"
    with torch.inference_mode():
        try:
            verdict = benchmark.pedantic(case.measure, rounds=1, iterations=1)
        except Unavailable as reason:
            pytest.skip(str(reason))
    info = verdict.info(case.bar, case.network, case.batch, threads)
    benchmark.extra_info.update(info)
    verdicts.append(info)
