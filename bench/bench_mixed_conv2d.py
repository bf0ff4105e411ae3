"""Mixed-bitwidth convolution beside PyTorch's float32 convolution, forward and backward.

Run with ``pytest bench/ --benchmark-only``. Every benchmark first checks the result that it times
against the reference, on a smaller batch. Times of one group are comparable with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_kernels import (
    PackedActivation,
    PackedConvWeight,
    available_backends,
    mixed_conv2d,
    quantize_pack,
    warmup,
)

pytest.importorskip("pytest_benchmark")

# The three stages of a ResNet for CIFAR: channels and side.
SHAPES = ((16, 32), (32, 16), (64, 8))
BATCHES = (64, 1)
CHECKED_SAMPLES = 4
WIDTHS = (2, 4, 8, 32)
MIX = (0, 2, 4, 8)
MODES: dict[str, tuple[int, ...]] = {
    **{f"{bits}_bits": (bits,) for bits in (0, *WIDTHS)},
    "mixed": MIX,
}
STEPS = {2: 1.0, 4: 0.25, 8: 0.016, 32: 1.0}
ZERO_POINTS = {2: 1, 4: 3, 8: 100, 32: 0}
pytestmark = pytest.mark.benchmark(min_rounds=5, max_time=0.4, warmup=True, warmup_iterations=2)
backends = pytest.mark.parametrize(
    "backend", [name for name in available_backends() if name != "reference"]
)
shapes = pytest.mark.parametrize(
    ("channels", "side"), SHAPES, ids=[f"{c}x{s}x{s}" for c, s in SHAPES]
)
batches = pytest.mark.parametrize("batch", BATCHES, ids=[f"batch{n}" for n in BATCHES])


@dataclass
class Layer:
    """A 3x3 convolution of a residual block, and a batch for it."""

    x: Tensor
    weight: Tensor
    packed: PackedConvWeight


@cache
def make_layer(channels: int, side: int, batch: int) -> Layer:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, channels, side, side, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * 0.1
    scales = {bits: torch.full((channels,), 0.2 / 2 ** (bits - 1)) for bits in WIDTHS[:-1]}
    return Layer(x, weight, PackedConvWeight.from_float(weight, scales, WIDTHS))


def group(benchmark: Any, kind: str, channels: int, side: int, batch: int) -> None:
    benchmark.group = f"{kind} {channels}x{side}x{side} batch {batch}"
    benchmark.extra_info["threads"] = torch.get_num_threads()


def sample_bits(widths: tuple[int, ...], batch: int) -> Tensor:
    return torch.tensor([widths[n % len(widths)] for n in range(batch)], dtype=torch.int32)


def first_samples(x: Any, count: int) -> Any:
    if isinstance(x, PackedActivation):
        return replace(x, data=x.data[:count], bits=x.bits[:count])
    return x[:count] if isinstance(x, Tensor) else x


def check_against_reference(run: Callable[..., Any], x: Any, bits: Tensor) -> None:
    """Integer widths bit for bit; 32 bits within the rounding of a float32 sum."""
    got, expected = (
        run(first_samples(x, CHECKED_SAMPLES), bits[:CHECKED_SAMPLES], name)
        for name in (None, "reference")
    )
    assert got.shape == expected.shape
    if isinstance(got, PackedActivation):
        assert torch.equal(got.bits, bits[:CHECKED_SAMPLES])
    for n, width in enumerate(bits[:CHECKED_SAMPLES].tolist()):
        if width == 0 and isinstance(got, PackedActivation):
            continue  # its row is unspecified
        a, b = (r.data[n] if isinstance(r, PackedActivation) else r[n] for r in (got, expected))
        if width == 32:
            if isinstance(got, PackedActivation):
                a, b = a.view(torch.float32), b.view(torch.float32)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            size = a.numel()
            if isinstance(got, PackedActivation):
                size = got.height * got.width * ((got.channels * width + 7) // 8)
            assert torch.equal(a.flatten()[:size], b.flatten()[:size])


@shapes
@pytest.mark.parametrize(
    ("batch", "mode"),
    # A mix needs a sample of each width.
    [(batch, mode) for batch in BATCHES for mode in MODES if batch >= len(MODES[mode])],
)
@backends
def test_packed_in_packed_out(
    benchmark: Any, channels: int, side: int, batch: int, backend: str, mode: str
) -> None:
    layer = make_layer(channels, side, batch)
    bits = sample_bits(MODES[mode], batch)
    x = quantize_pack(layer.x, bits, STEPS, ZERO_POINTS)

    def run(x: PackedActivation, bits: Tensor, name: str | None = None) -> Any:
        return mixed_conv2d(
            x,
            layer.packed,
            bits,
            padding=1,
            activation="relu",
            output_scale=STEPS,
            output_zero_point=ZERO_POINTS,
            backend=name or backend,
        )

    check_against_reference(run, x, bits)
    group(benchmark, "forward", channels, side, batch)
    benchmark(run, x, bits)


@shapes
@batches
@backends
def test_float_in_float_out_at_8_bits(
    benchmark: Any, channels: int, side: int, batch: int, backend: str
) -> None:
    layer = make_layer(channels, side, batch)
    bits = sample_bits((8,), batch)

    def run(x: Tensor, bits: Tensor, name: str | None = None) -> Any:
        return mixed_conv2d(
            x, layer.packed, bits, STEPS, ZERO_POINTS, padding=1, backend=name or backend
        )

    check_against_reference(run, layer.x, bits)
    group(benchmark, "forward", channels, side, batch)
    benchmark(run, layer.x, bits)


@shapes
@batches
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_torch_float32(
    benchmark: Any, channels: int, side: int, batch: int, memory_format: str
) -> None:
    layer = make_layer(channels, side, batch)
    x, weight = layer.x, layer.weight
    if memory_format == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
    expected = mixed_conv2d(layer.x[:CHECKED_SAMPLES], layer.weight, 32, padding=1)
    assert isinstance(expected, Tensor)
    got = F.conv2d(x[:CHECKED_SAMPLES], weight, padding=1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    group(benchmark, "forward", channels, side, batch)
    with torch.no_grad():
        benchmark(F.conv2d, x, weight, padding=1)


@shapes
@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("batch", [64], ids=["batch64"])
def test_backward(benchmark: Any, channels: int, side: int, batch: int, backend: str) -> None:
    """A batch of 2, 4, 8 and 32 bits, with gradients of the input, the weight and all steps."""
    layer = make_layer(channels, side, batch)

    def leaves(samples: int) -> dict[str, Tensor]:
        scales = torch.stack([torch.full((channels,), 0.2 / 2 ** (b - 1)) for b in (2, 4, 8)])
        values = {
            "input": layer.x[:samples],
            "weight": layer.weight,
            "input_scale": torch.tensor([STEPS[b] for b in (2, 4, 8)]),
            "weight_scale": scales,
        }
        return {name: value.clone().requires_grad_() for name, value in values.items()}

    def forward(tensors: dict[str, Tensor], name: str) -> Tensor:
        result = mixed_conv2d(
            **tensors,
            bits=sample_bits(WIDTHS, len(tensors["input"])),
            padding=1,
            backend=name,
        )
        assert isinstance(result, Tensor)
        return result

    gradients = []
    for name in (backend, "reference"):
        tensors = leaves(CHECKED_SAMPLES)
        y = forward(tensors, name)
        gradients.append(torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y)))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )

    tensors = leaves(batch)
    y = forward(tensors, backend)
    dy = torch.ones_like(y)
    group(benchmark, "backward", channels, side, batch)
    benchmark(torch.autograd.grad, y, list(tensors.values()), dy, retain_graph=True)


@pytest.fixture(autouse=True, scope="module")
def warm_kernels() -> None:
    warmup()
