"""The bars of bench/bars.py. One that is missed is reported, and fails nothing.

The time that pytest-benchmark shows for them is that of the whole comparison; the outcome is in
the summary at the end, and in ``extra_info``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.bars import Case, cases
from bench.prepared import Unavailable

pytest.importorskip("pytest_benchmark")
pytest.importorskip("dfs_kernels._cpu")

CASES = tuple(cases())


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c.bar.name}-{c.layer.name}-batch{c.batch}" for c in CASES]
)
@pytest.mark.parametrize("threads", [1, 2], ids=["1thread", "2threads"], indirect=True)
def test_bar(benchmark: Any, verdicts: list[dict[str, Any]], threads: int, case: Case) -> None:
    benchmark.group = f"bars, threads {threads}"
    with torch.no_grad():
        try:
            verdict = benchmark.pedantic(case.measure, args=(threads,), rounds=1, iterations=1)
        except Unavailable as reason:
            pytest.skip(str(reason))
    info = verdict.info(case.bar, case.layer.name, case.batch, threads)
    benchmark.extra_info.update(info)
    verdicts.append(info)
