"""This project's own contestants: the public functions on the default backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.layers import (
    INTEGER_WIDTHS,
    UNSIGNED_STEPS,
    Device,
    Layer,
    layer_input,
    layer_weights,
)
from bench.prepared import Prepared
from bench.rotation import Rotation, copies_to_rotate
from dfs_kernels import (
    PackedActivation,
    PackedConvWeight,
    mixed_conv2d,
    mixed_conv2d_,
    quantize_pack,
)
from dfs_kernels.backends import load
from dfs_kernels.call import ConvCall, ConvGradients, ConvWeight, GradientsWanted
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import Quantizer
from dfs_kernels.widths import default_levels

MIX = (0, 2, 4, 8)
TRAINED_WIDTHS = (2, 4, 8, 32)

# From a batch, and the name of a backend other than the default, to the result.
Run = Callable[..., Any]
# From layer, batch and threads.
Maker = Callable[[Layer, int, int], Prepared]


def steps(layer: Layer, device: Device = "cpu") -> Tensor:
    """Of the input, indexed like the widths."""
    return torch.tensor([layer.steps[bits] for bits in INTEGER_WIDTHS], device=device)


def zero_points(layer: Layer, device: Device = "cpu") -> Tensor:
    values = [layer.zero_points[bits] for bits in INTEGER_WIDTHS]
    return torch.tensor(values, dtype=torch.int32, device=device)


def output_steps(device: Device = "cpu") -> Tensor:
    """Of the output, which has been through a ReLU."""
    return torch.tensor([UNSIGNED_STEPS[bits] for bits in INTEGER_WIDTHS], device=device)


def output_zero_points(device: Device = "cpu") -> Tensor:
    """Zeros, ready made: a call that is given none makes them anew."""
    return torch.zeros(len(INTEGER_WIDTHS), dtype=torch.int32, device=device)


def repeated_bits(widths: Sequence[int], batch: int, device: Device = "cpu") -> Tensor:
    """``widths`` over and over: int32 (batch,)."""
    values = [widths[n % len(widths)] for n in range(batch)]
    return torch.tensor(values, dtype=torch.int32, device=device)


def packed_input(layer: Layer, bits: Tensor) -> PackedActivation:
    """A batch with each sample at its own integer width; rows have room for 8 bits."""
    return quantize_pack(
        layer_input(layer, len(bits), bits.device),
        bits,
        steps(layer, bits.device),
        zero_points(layer, bits.device),
        bit_options=INTEGER_WIDTHS,
    )


def packed_float_input(layer: Layer, batch: int) -> PackedActivation:
    return quantize_pack(layer_input(layer, batch), 32, 1.0, bit_options=(32,))


def run_packed(layer: Layer, device: Device = "cpu") -> Run:
    """Packed in, packed out with a ReLU, at the samples' own integer widths."""
    weight = layer_weights(layer, device).packed
    return _run_packed(layer, weight, output_steps(device), output_zero_points(device))


def run_packed_float(layer: Layer, device: Device = "cpu") -> Run:
    """The same where all samples are at 32 bits."""
    weight = layer_weights(layer, device).packed_float
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return _run_packed(layer, weight, torch.ones(1, device=device), zero)


def run_float_at_8(layer: Layer, batch: int, device: Device = "cpu") -> Run:
    """Float32 in, quantized inside, float32 out, no ReLU; for at most ``batch`` samples."""
    weight = layer_weights(layer, device).packed
    scale, zero_point = steps(layer, device), zero_points(layer, device)
    bits = repeated_bits((8,), batch, device)

    def run(x: Tensor, backend: str | None = None) -> Any:
        return mixed_conv2d(
            x,
            weight,
            bits[: len(x)],
            scale,
            zero_point,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
            backend=backend,
        )

    return run


def packed_batch(layer: Layer, bits: Tensor, rotate: bool = True) -> Prepared:
    """:func:`run_packed` on samples of the given widths."""
    touched = int(bits.sum()) / 8 * (layer.in_values + layer.out_values) if rotate else 0
    return _prepare_rotated(run_packed(layer), packed_input(layer, bits), touched)


def packed_at(bits: int) -> Maker:
    def make(layer: Layer, batch: int, threads: int) -> Prepared:
        return packed_batch(layer, repeated_bits((bits,), batch))

    return make


def packed_mix(layer: Layer, batch: int, threads: int) -> Prepared:
    """Equal parts of the widths, taking turns."""
    return packed_batch(layer, repeated_bits(MIX, batch))


def float_at_8(layer: Layer, batch: int, threads: int) -> Prepared:
    x = layer_input(layer, batch)
    return _prepare_rotated(run_float_at_8(layer, batch), x, float_bytes(layer, batch))


def packed_float(layer: Layer, batch: int, threads: int) -> Prepared:
    x = packed_float_input(layer, batch)
    return _prepare_rotated(run_packed_float(layer), x, float_bytes(layer, batch))


def plain_float(channels_last: bool) -> Maker:
    """Float32 in, float32 out at 32 bits, no ReLU: what PyTorch's convolution computes."""

    def make(layer: Layer, batch: int, threads: int) -> Prepared:
        x = layer_input(layer, batch)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        run = run_plain_float(layer, batch)
        return _prepare_rotated(run, x, float_bytes(layer, batch), is_float_sum=True)

    return make


def run_plain_float(layer: Layer, batch: int, device: Device = "cpu") -> Run:
    """Float32 in and out at 32 bits, no ReLU; for at most ``batch`` samples."""
    weight = layer_weights(layer, device).packed_float
    bits = repeated_bits((32,), batch, device)

    def run(x: Tensor, backend: str | None = None) -> Any:
        return mixed_conv2d(
            x,
            weight,
            bits[: len(x)],
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
            backend=backend,
        )

    return run


def run_gradients(layer: Layer, batch: int, device: Device = "cpu") -> Run:
    """Gradients of input, weight and all steps from a pair of input and gradient of the output.

    For at most ``batch`` samples, at TRAINED_WIDTHS in turn.
    """
    weights = layer_weights(layer, device)
    scale, zero_point = steps(layer, device), zero_points(layer, device)
    # Entries for 32 bits are not read.
    scale, zero_point = torch.cat((scale, scale[:1])), torch.cat((zero_point, zero_point[:1]))
    own = list(weights.scales.values())
    weight_scale = torch.stack([*own, own[0]])
    bits = repeated_bits(TRAINED_WIDTHS, batch, device)
    geometry = ConvGeometry.create(
        layer.in_channels,
        tuple(weights.weight.shape),
        (layer.stride, layer.stride),
        (layer.padding,) * 4,
        (1, 1),
        layer.groups,
    )
    wanted = GradientsWanted(True, True, True, True, mul=False, add=False)
    centred = tuple(default_levels(bits) == "centred" for bits in TRAINED_WIDTHS)

    def run(x: tuple[Tensor, Tensor], backend: str = "reference") -> ConvGradients:
        weight = ConvWeight(
            weights.weight, geometry.weight_shape, TRAINED_WIDTHS, centred, weight_scale
        )
        quantizer = Quantizer(TRAINED_WIDTHS, scale, zero_point)
        call = ConvCall(x[0], weight, bits[: len(x[0])], geometry, quantizer)
        result: ConvGradients = load(backend).mixed_conv2d_backward(call, x[1], wanted)
        return result

    return run


def check_gradients(got: ConvGradients, expected: ConvGradients, tf32: bool = False) -> None:
    """Each about equal to the reference's, element by element."""
    error = 1e-2 if tf32 else 1e-3
    for name in ("input", "weight", "input_scale", "weight_scale"):
        value = getattr(expected, name)
        scale = float(value.abs().max())
        torch.testing.assert_close(
            getattr(got, name), value, rtol=error, atol=error / 10 * scale, msg=name
        )


def run_from_stream(layer: Layer, bits: Tensor) -> Run:
    """A block's first convolution: an 8-bit stream read at own widths, and those written.

    Args:
        bits: the widths; a smaller batch takes those at the beginning.
    """
    device = bits.device
    weight = layer_weights(layer, device).packed
    own = (bits, steps(layer, device), zero_points(layer, device))
    return _run_packed(layer, weight, output_steps(device), output_zero_points(device), own)


def run_into_stream(layer: Layer, device: Device = "cpu") -> Run:
    """A block's second convolution: from own widths, adding into an 8-bit stream in place."""
    weight = layer_weights(layer, device).packed

    def run(pair: tuple[PackedActivation, PackedActivation], backend: str | None = None) -> Any:
        x, stream = pair
        mixed_conv2d_(
            x,
            weight,
            x.bits,
            residual=stream,
            padding=layer.padding,
            activation="relu",
            backend=backend,
        )
        return stream

    return run


def check_in_place(run: Run, x: PackedActivation, stream: PackedActivation) -> None:
    """:func:`run_into_stream` gives the reference's codes and leaves skipped samples alone."""
    picked = _picked(x)
    got = run((x, stream.clone()))
    few_x, few_stream = select_samples(x, picked), select_samples(stream, picked)
    expected = run((few_x, few_stream.clone()), backend="reference")
    assert_same(select_samples(got, picked), expected)
    assert torch.equal(got.data[x.bits == 0], stream.data[x.bits == 0])


def _run_packed(
    layer: Layer,
    weight: PackedConvWeight,
    out_scale: Tensor,
    out_zero_point: Tensor,
    own: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Run:
    """At the widths that the input is stored at, or at ``own`` widths, steps and zero points."""
    widths, scale, zero_point = (None, None, None) if own is None else own

    def run(x: PackedActivation, backend: str | None = None) -> Any:
        return mixed_conv2d(
            x,
            weight,
            x.bits if widths is None else widths[: x.shape[0]],
            scale,
            zero_point,
            stride=layer.stride,
            padding=layer.padding,
            groups=layer.groups,
            activation="relu",
            output_scale=out_scale,
            output_zero_point=out_zero_point,
            backend=backend,
        )

    return run


def is_mixed(x: Any) -> bool:
    return isinstance(x, PackedActivation) and len(x.bits.unique()) > 1


def select_samples(x: Any, picked: Sequence[int]) -> Any:
    if isinstance(x, PackedActivation):
        return replace(x, data=x.data[list(picked)], bits=x.bits[list(picked)])
    return x[list(picked)]


def assert_same(got: Any, expected: Any, is_float_sum: bool = False) -> None:
    """Integer widths bit for bit; 32 bits within the rounding of a float32 sum.

    Args:
        is_float_sum: whether tensors hold results at 32 bits; packed ones tell by themselves.
    """
    assert type(got) is type(expected)
    assert got.shape == expected.shape
    if isinstance(got, Tensor):
        if is_float_sum:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, expected)
        return
    assert torch.equal(got.bits, expected.bits)
    for n, width in enumerate(expected.bits.tolist()):
        if width == 32:
            a, b = (r.data[n].view(torch.float32) for r in (got, expected))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            # Of a row only what its width takes is specified, of a skipped one nothing.
            used = expected.height * expected.width * ((expected.channels * width + 7) // 8)
            assert torch.equal(got.data[n, :used], expected.data[n, :used])


def _prepare_rotated(run: Run, x: Any, touched: float, is_float_sum: bool = False) -> Prepared:
    return prepared(run, x, copies_to_rotate(x.shape[0], touched), is_float_sum)


def prepared(run: Run, x: Any, copies: int, is_float_sum: bool = False) -> Prepared:
    """``run`` on ``copies`` of ``x`` in turn, checked against the reference."""
    call = Rotation(run, [x, *(x.clone() for _ in range(copies - 1))])
    picked = _picked(x)

    def check() -> None:
        got = select_samples(call(), picked)
        expected = run(select_samples(x, picked), backend="reference")
        assert_same(got, expected, is_float_sum)

    return Prepared(call, check, copies)


def _picked(x: Any) -> list[int]:
    """One sample of each width, and the last one."""
    batch = x.shape[0]
    return sorted({*range(min(batch, len(MIX) if is_mixed(x) else 1)), batch - 1})


def float_bytes(layer: Layer, batch: int) -> int:
    """What a call reads and writes of activations in float32."""
    return 4 * batch * (layer.in_values + layer.out_values)
