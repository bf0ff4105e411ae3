"""How fast this processor multiplies and adds at best, measured beside the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from bench import peers
from bench.layers import Layer, layer_input, layer_weights
from bench.prepared import Unavailable

_ROUNDS = 12
# Large, and in the cache: what oneDNN runs at its best.
_CONVOLUTIONS = (
    (Layer("256x14x14", "square", 256, 256, 14, (1,)), 1),
    (Layer("512x7x7", "square", 512, 512, 7, (8,)), 8),
)


@dataclass(frozen=True)
class Peaks:
    """Multiply-accumulates a second.

    Attributes:
        fma: float32.
        int8: 8-bit codes into 32-bit sums.
        source: "native" for our own instruction loops, "library" for the best rate that PyTorch
            reached on large problems, which is a little below the processor's peak.
    """

    fma: float
    int8: float
    source: str


def measured_peaks(threads: int) -> Peaks:
    """The peaks of a number of threads: that many times the peaks of one.

    Measured on one thread, since two are at the mercy of whatever else runs, and a peak that comes
    out too low makes everybody look good. Where two processors share a core it is too high.
    """
    peaks = _peaks_of_one_thread()
    return Peaks(peaks.fma * threads, peaks.int8 * threads, peaks.source)


@cache
def _peaks_of_one_thread() -> Peaks:
    native = _native_rates()
    if native is not None:
        return Peaks(native["fma"], native["int8"], "native")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return Peaks(_best_rate(_float_problems()), _best_rate(_int8_problems()), "library")
    finally:
        torch.set_num_threads(threads)


def _native_rates() -> dict[str, float] | None:
    """What the compiled module says of one core, if it can."""
    try:
        from dfs_kernels import _cpu
    except ImportError:
        return None
    measure = getattr(_cpu, "peak_rates", None)
    return None if measure is None else measure()


Problem = tuple[int, Callable[[], Any]]


def _float_problems() -> list[Problem]:
    problems: list[Problem] = []
    for size in (512, 1024):
        a, b = torch.randn(size, size), torch.randn(size, size)
        problems.append((size**3, partial(torch.mm, a, b)))
    for layer, batch in _CONVOLUTIONS:
        x, weight = layer_input(layer, batch), layer_weights(layer).weight
        for memory_format in (torch.contiguous_format, torch.channels_last):
            a, b = (t.contiguous(memory_format=memory_format) for t in (x, weight))
            problems.append((batch * layer.macs, partial(F.conv2d, a, b, padding=1)))
    return problems


def _int8_problems() -> list[Problem]:
    rows, columns = 512, 1024
    a = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    b = torch.randint(-128, 128, (columns, columns), dtype=torch.int8)
    problems: list[Problem] = [(rows * columns**2, partial(torch._int_mm, a, b))]
    for layer, batch in _CONVOLUTIONS:
        # Without a oneDNN engine the product has to do.
        with suppress(Unavailable):
            call = peers.torch_int8(layer, batch, threads=1).call
            problems.append((batch * layer.macs, call))
    return problems


def _best_rate(problems: list[Problem]) -> float:
    """Of all problems and rounds: whatever slows a round down is not the processor's peak."""
    best = 0.0
    for macs, call in problems:
        call()
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            call()
            best = max(best, macs / (time.perf_counter() - start))
    return best
