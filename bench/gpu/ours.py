"""This project's contestants on a GPU: the public functions, on each backend for GPU tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from bench.gpu import roofline
from bench.gpu.backends import gpu_backends
from bench.gpu.device import machine
from bench.gpu.prepared import GpuPrepared, copies_for, tf32
from bench.gpu.roofline import Work
from bench.layers import UNSIGNED_STEPS, Layer, layer_input
from bench.ours import (
    MIX,
    TRAINED_WIDTHS,
    Run,
    check_gradients,
    check_in_place,
    float_bytes,
    packed_input,
    prepared,
    repeated_bits,
    run_float_at_8,
    run_from_stream,
    run_gradients,
    run_into_stream,
    run_packed,
    run_plain_float,
    steps,
    zero_points,
)
from bench.prepared import Prepared
from bench.rotation import Rotation
from dfs_kernels import PackedActivation, quantize_pack, unpack_dequantize
from dfs_kernels.backends import triton
from dfs_kernels.triton import tuning

_BUCKETS = "buckets"


@dataclass(frozen=True)
class Form:
    """One way to call the kernels.

    Attributes:
        label: its name in a report.
        make: from layer, batch and implementation.
        in_buckets: whether it is worth timing with its samples sorted by width.
        square_only: a block's second convolution adds into what the first one read.
        largest_batch_only: as in training.
    """

    label: str
    make: Callable[[Layer, int, str], GpuPrepared]
    in_buckets: bool = False
    square_only: bool = False
    smallest_batch: int = 1
    largest_batch_only: bool = False


def implementations(buckets: bool = True) -> tuple[str, ...]:
    """The backends, and Triton's other way to serve a mixed batch: ``triton_buckets``."""
    found = []
    for backend in gpu_backends():
        found.append(backend)
        if backend == "triton" and buckets:
            found.append(f"{backend}_{_BUCKETS}")
    return tuple(found)


def bind(run: Run, implementation: str) -> Run:
    """``run`` on an implementation, unless it is given another backend."""
    own, _, dispatch = implementation.partition("_")

    def bound(x: Any, backend: str = own) -> Any:
        with _in_buckets() if dispatch == _BUCKETS else nullcontext():
            return run(x, backend=backend)

    return bound


@contextmanager
def _in_buckets() -> Iterator[None]:
    """Whatever configuration is chosen, with its samples sorted by width."""

    def chosen(problem: tuning.Problem, *arguments: Any) -> Any:
        config = tuning.choose(problem, *arguments)
        if problem.kernel != "mixed_conv2d_kernel":
            return config
        return replace(config, buckets=True)

    with patch.object(triton, "choose", chosen):
        yield


def packed(widths: tuple[int, ...]) -> Callable[[Layer, int, str], GpuPrepared]:
    """Packed in, packed out with a ReLU, samples taking turns at these widths."""

    def make(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
        device = machine().device
        bits = repeated_bits(widths, batch, device)
        work = roofline.convolution(layer, bits.tolist())
        run = bind(run_packed(layer, device), implementation)
        return _ready(run, packed_input(layer, bits), work)

    return make


def from_stream(bits: int) -> Callable[[Layer, int, str], GpuPrepared]:
    """A block's first convolution: reads the 8-bit stream at its own width, writes that width."""

    def make(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
        device = machine().device
        run = run_from_stream(layer, repeated_bits((bits,), batch, device))
        work = roofline.convolution(layer, [bits] * batch, input_bits=8)
        return _ready(bind(run, implementation), stream_input(layer, batch), work)

    return make


def into_stream(bits: int) -> Callable[[Layer, int, str], GpuPrepared]:
    """A block's second convolution: adds into the 8-bit stream in place. 0 bits: all skipped."""

    def make(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
        device = machine().device
        run = bind(run_into_stream(layer, device), implementation)
        x = packed_input(layer, repeated_bits((bits,), batch, device))
        stream = stream_input(layer, batch)
        work = roofline.convolution(layer, [bits] * batch, output="stream")
        copies = copies_for(batch, work.bytes)
        pairs = [(x, stream), *((x.clone(), stream.clone()) for _ in range(copies - 1))]
        return GpuPrepared(
            Prepared(Rotation(run, pairs), lambda: check_in_place(run, x, stream), copies),
            work if bits else None,
        )

    return make


def float_at_8(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
    """Float32 in and out at 8 bits, no ReLU."""
    device = machine().device
    run = bind(run_float_at_8(layer, batch, device), implementation)
    # Beside the convolution of the codes, its input has to be read as floats.
    work = roofline.convolution(layer, [8] * batch, input_bits=32, output="float")
    return _ready(run, layer_input(layer, batch, device), work)


def at_32(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
    """Float32 in and out at 32 bits, channels last, products in full float32, no ReLU."""
    device = machine().device
    inner = bind(run_plain_float(layer, batch, device), implementation)

    def run(x: Any, **backend: str) -> Any:
        with tf32(False):
            return inner(x, **backend)

    x = layer_input(layer, batch, device).contiguous(memory_format=torch.channels_last)
    copies = copies_for(batch, float_bytes(layer, batch))
    return GpuPrepared(prepared(run, x, copies, is_float_sum=True))


def gradients(allows_tf32: bool) -> Callable[[Layer, int, str], GpuPrepared]:
    """All gradients of training, of samples at 2, 4, 8 and 32 bits in turn."""

    def make(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
        device = machine().device
        inner = bind(run_gradients(layer, batch, device), implementation)

        def run(x: tuple[torch.Tensor, torch.Tensor], **backend: str) -> Any:
            with tf32(allows_tf32):
                return inner(x, **backend)

        x = layer_input(layer, batch, device)
        out = torch.randn(batch, layer.out_channels, layer.out_side, layer.out_side, device=device)
        copies = copies_for(batch, 2 * float_bytes(layer, batch))
        pairs = [(x, out), *((x.clone(), out.clone()) for _ in range(copies - 1))]

        def check() -> None:
            run((x, out))
            few = x[: len(TRAINED_WIDTHS)], out[: len(TRAINED_WIDTHS)]
            check_gradients(run(few), run(few, backend="reference"), allows_tf32)

        return GpuPrepared(Prepared(Rotation(run, pairs), check, copies))

    return make


def quantize_at_8(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
    device = machine().device
    bits = repeated_bits((8,), batch, device)
    scale, zero_point = steps(layer, device), zero_points(layer, device)

    def run(x: torch.Tensor, backend: str | None = None) -> PackedActivation:
        return quantize_pack(
            x, bits[: len(x)], scale, zero_point, bit_options=(2, 4, 8), backend=backend
        )

    work = roofline.quantize_pack(layer, batch, 8)
    return _ready(bind(run, implementation), layer_input(layer, batch, device), work)


def unpack_at_8(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
    bits = repeated_bits((8,), batch, machine().device)
    work = roofline.unpack_dequantize(layer, batch, 8)
    return _ready(bind(unpack_dequantize, implementation), packed_input(layer, bits), work)


FORMS = {
    "8": Form("8 bits, packed", packed((8,)), in_buckets=True),
    "4": Form("4 bits, packed", packed((4,))),
    "2": Form("2 bits, packed", packed((2,))),
    "mixed": Form("0/2/4/8 bits, packed", packed(MIX), True, smallest_batch=len(MIX)),
    "skipped": Form("skipped, in place", into_stream(0), square_only=True),
    "from_stream_8": Form("8-bit stream in, 8 bits out", from_stream(8)),
    "from_stream_2": Form("8-bit stream in, 2 bits out", from_stream(2)),
    "into_stream_8": Form("8 bits in, into the stream", into_stream(8), square_only=True),
    "into_stream_2": Form("2 bits in, into the stream", into_stream(2), square_only=True),
    "8_float": Form("8 bits, float in and out", float_at_8),
    "32": Form("32 bits, channels last", at_32),
    "gradients": Form("gradients, 2/4/8/32 bits", gradients(False), largest_batch_only=True),
    "gradients_tf32": Form(
        "gradients in TF32, 2/4/8/32 bits", gradients(True), largest_batch_only=True
    ),
    "quantize_pack": Form("quantize and pack, 8 bits", quantize_at_8),
    "unpack": Form("unpack and dequantize, 8 bits", unpack_at_8),
}


def stream_input(layer: Layer, batch: int) -> PackedActivation:
    """A residual stream: codes of 8 bits, and no other width in its rows."""
    device = machine().device
    return quantize_pack(
        layer_input(layer, batch, device),
        repeated_bits((8,), batch, device),
        torch.tensor([UNSIGNED_STEPS[8]], device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        bit_options=(8,),
    )


def _ready(run: Run, x: Any, work: Work) -> GpuPrepared:
    return GpuPrepared(prepared(run, x, copies_for(x.shape[0], work.bytes)), work)
