"""The bars of bench/gpu/bars.py. One that is missed is reported, and fails nothing.

The time that pytest-benchmark shows for them is that of the whole comparison; the outcome is in
the summary at the end, and in ``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu.bars import GpuCase, cases
from bench.prepared import Unavailable

pytest.importorskip("pytest_benchmark")

CASES = tuple(cases())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_gpu_bar(benchmark: Any, verdicts: list[dict[str, Any]], case: GpuCase) -> None:
    benchmark.group = "GPU bars"
    with torch.no_grad():
        try:
            judge = case.prepare()
        except Unavailable as reason:
            pytest.skip(str(reason))
        if benchmark.disabled:
            return
        verdict = benchmark.pedantic(judge, rounds=1, iterations=1)
    info = {
        "kind": "gpu_bar",
        "bar": case.bar.name,
        "label": case.bar.label,
        "layer": case.layer.name,
        "batch": case.batch,
        "implementation": case.implementation,
        "ratio": verdict.ratio.median,
        "low": verdict.ratio.low,
        "high": verdict.ratio.high,
        "limit": verdict.limit,
        "at_least": case.at_least,
        "held": verdict.held,
        **verdict.details,
    }
    benchmark.extra_info.update(info)
    verdicts.append(info)
