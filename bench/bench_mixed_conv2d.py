"""Mixed-bitwidth convolution beside PyTorch and ONNX Runtime, and its backward.

Every benchmark first checks the result that it times: ours against the reference on some samples of
the batch, the peers against it or a float64 convolution. All contestants of a group run one after
the other and are roughly comparable; where a ratio matters, bench_bars.py takes it in turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contestants import CONTESTANTS, Unavailable, prepare
from bench.layers import LAYERS, Layer, layer_input, layer_weights
from bench.ours import repeated_bits, steps
from bench.peaks import measured_peaks
from dfs_kernels import available_backends, mixed_conv2d

pytest.importorskip("pytest_benchmark")
pytest.importorskip("dfs_kernels._cpu")

# A round is long enough for the clock, and a benchmark for a median, within the patience of
# somebody who runs them all.
ROUND_SECONDS = 200e-6
BENCHMARK_SECONDS = 0.1
MIN_ROUNDS, MAX_ROUNDS = 3, 50
# Until threads that spin after the last benchmark's calls have gone to sleep.
SETTLE_SECONDS = 0.015

FORWARD = [
    pytest.param(layer, batch, name, id=f"{layer.name}-batch{batch}-{name}")
    for layer in LAYERS
    for batch in layer.batches
    for name, contestant in CONTESTANTS.items()
    if batch >= contestant.smallest_batch
]
BACKWARD_BATCH = 64
BACKWARD_WIDTHS = (2, 4, 8, 32)


@pytest.mark.parametrize(("layer", "batch", "name"), FORWARD)
@pytest.mark.parametrize("threads", [1, 2], ids=["1thread", "2threads"], indirect=True)
def test_forward(benchmark: Any, threads: int, layer: Layer, batch: int, name: str) -> None:
    peaks = measured_peaks(threads)
    with torch.no_grad():
        try:
            prepared = prepare(name, layer, batch, threads)
        except Unavailable as reason:
            pytest.skip(str(reason))
        prepared.check_and_warm_up()
        benchmark.group = f"forward {layer.name} batch {batch}, threads {threads}"
        benchmark.extra_info.update(
            kind="layer",
            layer=layer.name,
            family=layer.family,
            batch=batch,
            threads=threads,
            contestant=name,
            macs=batch * layer.macs,
            copies=prepared.copies,
            peak=peaks.int8 if CONTESTANTS[name].is_integer else peaks.fma,
            peak_source=peaks.source,
        )
        run_rounds(benchmark, prepared.call)


def run_rounds(benchmark: Any, call: Callable[[], Any]) -> None:
    time.sleep(SETTLE_SECONDS)
    call()
    start = time.perf_counter()
    call()
    seconds = max(time.perf_counter() - start, 1e-7)
    iterations = math.ceil(ROUND_SECONDS / seconds)
    rounds = round(BENCHMARK_SECONDS / (iterations * seconds))
    benchmark.pedantic(call, rounds=min(max(rounds, MIN_ROUNDS), MAX_ROUNDS), iterations=iterations)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("layer", LAYERS[:3], ids=[layer.name for layer in LAYERS[:3]])
@pytest.mark.parametrize("threads", [1, 2], ids=["1thread", "2threads"], indirect=True)
def test_backward(benchmark: Any, threads: int, layer: Layer, backend: str) -> None:
    """A batch of 2, 4, 8 and 32 bits, with gradients of the input, the weight and all steps."""
    tensors = leaves(layer, BACKWARD_BATCH)
    y = forward(layer, tensors, backend)
    gradients = []
    for name in (backend, "reference"):
        few = leaves(layer, len(BACKWARD_WIDTHS))
        few_y = forward(layer, few, name)
        gradients.append(torch.autograd.grad(few_y, list(few.values()), torch.ones_like(few_y)))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )

    benchmark.group = f"backward {layer.name} batch {BACKWARD_BATCH}, threads {threads}"
    benchmark.extra_info.update(kind="backward", layer=layer.name, threads=threads)
    dy = torch.ones_like(y)
    run_rounds(
        benchmark,
        lambda: torch.autograd.grad(y, list(tensors.values()), dy, retain_graph=True),
    )


def leaves(layer: Layer, batch: int) -> dict[str, Tensor]:
    weights = layer_weights(layer)
    values = {
        "input": layer_input(layer, batch),
        "weight": weights.weight,
        "input_scale": steps(layer),
        "weight_scale": torch.stack(list(weights.scales.values())),
    }
    return {name: value.clone().requires_grad_() for name, value in values.items()}


def forward(layer: Layer, tensors: dict[str, Tensor], backend: str) -> Tensor:
    result = mixed_conv2d(
        tensors["input"],
        tensors["weight"],
        repeated_bits(BACKWARD_WIDTHS, len(tensors["input"])),
        tensors["input_scale"],
        weight_scale=tensors["weight_scale"],
        padding=layer.padding,
        backend=backend,
    )
    assert isinstance(result, Tensor)
    return result
