"""What this GPU does at best: copying memory, and multiplying int8 matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from bench.gpu.device import Machine, is_rehearsal, machine
from bench.gpu.roofline import Peaks

_ROUNDS = 10
_COPIED_BYTES = 1 << 30
_SIDE = 8192
# For a rehearsal.
_FEW_BYTES = 1 << 16
_SMALL_SIDE = 32


@cache
def measured_peaks() -> Peaks:
    """The best rounds of a copy of 1 GiB, and of a product of int8 matrices, 8192 by 8192."""
    gpu = machine()
    size, side = (_FEW_BYTES, _SMALL_SIDE) if is_rehearsal() else (_COPIED_BYTES, _SIDE)
    source = torch.ones(size, dtype=torch.uint8, device=gpu.device)
    target = torch.empty_like(source)
    copy = 2 * size / _best_seconds(gpu, lambda: target.copy_(source))
    a, b = (
        torch.randint(-128, 128, (side, side), dtype=torch.int8, device=gpu.device)
        for _ in range(2)
    )
    # int8 tensor cores want both operands along what is summed.
    int8 = 2 * side**3 / _best_seconds(gpu, lambda: torch._int_mm(a, b.t()))
    gpu.release()
    return Peaks(copy, int8)


def _best_seconds(gpu: Machine, call: Callable[[], Any]) -> float:
    replay = gpu.record(call, 1)
    return min(gpu.seconds(replay, 1) for _ in range(_ROUNDS))
