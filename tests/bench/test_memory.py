"""The measurement of extra memory, on a call that needs a known amount."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import memory
from bench.layers import LAYERS

MIB = 1 << 20


@pytest.mark.skipif(not memory._RESET.exists(), reason="needs Linux")
@pytest.mark.parametrize("scratch_mib", [0, 24])
def test_extra_memory_is_what_a_call_allocates_beside_its_result(
    scratch_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.ones(scratch_mib * MIB, dtype=torch.uint8)
        result = x.clone()
        del scratch
        return result

    x = torch.ones(8 * MIB, dtype=torch.uint8)

    def arguments(*_: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        return run, x, x[:1]

    monkeypatch.setattr(memory, "_arguments", arguments)
    extra = memory._extra_bytes("packed", LAYERS[0], 64)
    assert abs(extra - scratch_mib * MIB) < 2 * MIB


@pytest.mark.skipif(not memory._RESET.exists(), reason="needs Linux")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "float_in_out", "float32"])
def test_each_kind_of_call_is_measured_in_its_own_process(kind: str) -> None:
    pytest.importorskip("dfs_kernels._cpu")
    extra, allowed = memory.measure(kind, LAYERS[0], batch=4, threads=1)
    packed = 4 * 16 * 32 * 32 * (4 if kind == "float32" else 1)
    assert allowed == packed + MIB
    assert 0 <= extra < 64 * MIB
