"""Every contestant on every layer of a GPU, one after the other.

Times are medians of CUDA-graph replays, in ``extra_info``; the time that pytest-benchmark shows is
that of the whole measurement. Where a ratio matters, bench_gpu_bars.py takes it in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu.contestants import labels, names_for, prepare
from bench.gpu.peaks import measured_peaks
from bench.gpu.prepared import take_gpu_turns
from bench.interleaved import spread
from bench.layers import GPU_LAYERS, Layer
from bench.prepared import Unavailable

pytest.importorskip("pytest_benchmark")

# The largest batches of all layers come first: whoever stops early has them.
POINTS = [
    pytest.param(layer, layer.batches[i], name, id=f"{layer.name}-batch{layer.batches[i]}-{name}")
    for i in range(max(len(layer.batches) for layer in GPU_LAYERS))
    for layer in GPU_LAYERS
    if i < len(layer.batches)
    for name in names_for(layer, layer.batches[i])
]


@pytest.mark.parametrize(("layer", "batch", "name"), POINTS)
def test_gpu_forward(benchmark: Any, layer: Layer, batch: int, name: str) -> None:
    benchmark.group = f"GPU forward {layer.name} batch {batch}"
    with torch.no_grad():
        try:
            contestant = prepare(name, layer, batch)
        except Unavailable as reason:
            pytest.skip(str(reason))
        contestant.prepared.check()
        if benchmark.disabled:
            return
        (times,) = benchmark.pedantic(take_gpu_turns, args=([contestant],), rounds=1, iterations=1)
    seconds, work = spread(times), contestant.work
    benchmark.extra_info.update(
        kind="gpu_layer",
        layer=layer.name,
        family=layer.family,
        batch=batch,
        contestant=name,
        label=labels()[name],
        seconds=seconds.median,
        low=seconds.low,
        high=seconds.high,
        copies=contestant.prepared.copies,
    )
    if work is not None:
        benchmark.extra_info.update(
            bytes=work.bytes,
            operations=work.operations,
            roofline_fraction=work.seconds(measured_peaks()) / seconds.median,
        )
