"""The compiled CPU kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfs_kernels.backends import reference
from dfs_kernels.call import ConvCall, ConvGradients, ConvWeight, GradientsWanted
from dfs_kernels.gate import GateCall, GateStep, RNNGateWeights
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import PackedActivation, PackedConvWeight, Quantizer, WeightLayout
from dfs_kernels.widths import KERNEL_WIDTHS

try:
    import dfs_kernels._cpu as _cpu

    _IMPORT_ERROR: str | None = None
except ImportError as error:
    _IMPORT_ERROR = f"the compiled module is missing ({error})"

_TILE_ALIGNMENT = 64


def unavailable_reason() -> str | None:
    return _IMPORT_ERROR


def supports(device_type: str, options: Sequence[int]) -> bool:
    return device_type == "cpu" and all(bits in KERNEL_WIDTHS for bits in options)


def info() -> dict[str, Any]:
    return {
        "isa": _cpu.isa(),
        "supported_isas": _cpu.supported_isas(),
        "threads": torch.get_num_threads(),
    }


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    codes = codes.contiguous()
    channels = codes.shape[-1]
    out = codes.new_empty((*codes.shape[:-1], (channels * bits + 7) // 8), dtype=torch.uint8)
    if out.numel():
        rows = codes.numel() // channels
        _cpu.pack_bits(codes.data_ptr(), rows, channels, bits, out.data_ptr(), _threads())
    return out


def unpack_bits(packed: Tensor, bits: int, channels: int, signed: bool) -> Tensor:
    packed = packed.contiguous()
    dtype = torch.int8 if signed else torch.uint8
    out = packed.new_empty((*packed.shape[:-1], channels), dtype=dtype)
    if out.numel():
        rows = out.numel() // channels
        _cpu.unpack_bits(
            packed.data_ptr(), rows, channels, bits, signed, out.data_ptr(), _threads()
        )
    return out


def quantize_pack(x: Tensor, out: PackedActivation) -> None:
    _cpu.quantize_pack(_feature_map(x), _feature_map(out), out.shape[0], _threads())


def unpack_dequantize(packed: PackedActivation) -> Tensor:
    out = torch.empty(packed.shape, dtype=torch.float32)
    _cpu.unpack_dequantize(_feature_map(packed), _feature_map(out), packed.shape[0], _threads())
    return out


def quantize_weight(weight: Tensor, scale: Tensor, bits: int, centred: bool, out: Tensor) -> None:
    weight, scale = weight.contiguous(), scale.contiguous()
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    _cpu.quantize_weight(
        weight.data_ptr(),
        out_channels,
        kernel_h,
        kernel_w,
        group_channels,
        scale.data_ptr(),
        bits,
        centred,
        out.data_ptr(),
        _threads(),
    )


@torch.compiler.assume_constant_result
def tile_variant() -> str:
    """The instruction set that the tiles are made for, and the version of their layout."""
    variant: str = _cpu.tile_variant()
    return variant


@torch.compiler.assume_constant_result
def has_slow_backward() -> bool:
    """Whether the reference, whose convolutions are PyTorch's, is faster at gradients.

    The vectorized kernels took 0.5 to 0.85 of its time, the portable ones 1.1 to 1.6 times as long
    (bench/bench_mixed_conv2d.py, the backward group).
    """
    return _IMPORT_ERROR is None and bool(_cpu.isa() == "scalar")


def tile_bytes(geometry: ConvGeometry, options: Sequence[int], centred: Sequence[bool]) -> int:
    return _tile_offsets(_geometry(geometry), options, centred)[-1]


def retile_weight(weight: PackedConvWeight, geometry: ConvGeometry) -> Tensor:
    native = _geometry(geometry)
    offsets = _tile_offsets(native, weight.bit_options, weight.centred)
    # Zeros, so that the gaps between the widths are the same every time.
    tiles = torch.zeros(offsets[-1], dtype=torch.uint8)
    for i, bits in enumerate(weight.bit_options):
        _retile(native, weight.packed(bits), bits, weight.centred[i], tiles[offsets[i] :])
    return tiles


def native_parts(
    geometry: ConvGeometry, options: Sequence[int], centred: Sequence[bool], tiles: Tensor
) -> tuple[Any, Any]:
    """A geometry, and a weight without its steps, as the compiled module takes them."""
    native = _geometry(geometry)
    offsets = _tile_offsets(native, options, centred)
    return native, _native_weight(options, centred, tiles, offsets)


def mixed_conv2d(call: ConvCall, out: Tensor | PackedActivation) -> None:
    geometry = _geometry(call.geometry)
    args = _cpu.MixedConv2dArgs()
    args.batch = call.batch
    args.bits = call.bits.data_ptr()
    args.geometry = geometry
    args.input = _feature_map(call.input)
    if call.input_quantizer is not None:
        args.input_quantizer = _quantizer(call.input_quantizer)
    weight, tiles = _tiled_weight(call, geometry)
    args.weight = weight
    args.bias, args.mul, args.add = _pointer(call.bias), _pointer(call.mul), _pointer(call.add)
    if call.residual is not None:
        args.has_residual = True
        args.residual = _feature_map(call.residual)
    args.relu = call.relu
    args.output = _feature_map(out)
    _cpu.mixed_conv2d(args, _threads())
    del tiles


def mixed_conv2d_backward(
    call: ConvCall, grad_output: Tensor, wanted: GradientsWanted
) -> ConvGradients:
    x, weight = call.input, call.weight
    if weight.is_packed or not isinstance(x, Tensor):
        # The compiled form serves training, where weights are float; this one is for input
        # gradients through a packed network, which is rare.
        return reference.mixed_conv2d_backward(call, grad_output, wanted)
    count, out_channels = len(weight.options), weight.shape[0]
    values = weight.data.contiguous()
    gradients = ConvGradients(
        torch.empty(x.shape) if wanted.input else None,
        torch.empty(weight.shape) if wanted.weight else None,
        torch.empty(count) if wanted.input_scale else None,
        torch.empty(count, out_channels) if wanted.weight_scale else None,
        torch.empty(count, out_channels) if wanted.mul else None,
        torch.empty(count, out_channels) if wanted.add else None,
    )
    args = _cpu.MixedConv2dBackwardArgs()
    args.batch = call.batch
    args.bits = call.bits.data_ptr()
    args.geometry = _geometry(call.geometry)
    args.widths = list(weight.options)
    args.centred = list(weight.centred)
    args.input = _feature_map(x)
    if call.input_quantizer is not None:
        args.input_quantizer = _quantizer(call.input_quantizer)
    args.weight = values.data_ptr()
    args.weight_scale = _pointer(weight.scale)
    args.mul, args.bias = _pointer(call.mul), _pointer(call.bias)
    args.grad_output = _feature_map(grad_output)
    args.grad_input = _pointer(gradients.input)
    args.grad_weight = _pointer(gradients.weight)
    args.grad_input_scale = _pointer(gradients.input_scale)
    args.grad_weight_scale = _pointer(gradients.weight_scale)
    args.grad_mul = _pointer(gradients.mul)
    args.grad_add = _pointer(gradients.add)
    _cpu.mixed_conv2d_backward(args, _threads())
    return gradients


def rnn_gate(call: GateCall, out: GateStep) -> None:
    weights = [value.contiguous() for value in call.weights]
    args = gate_arguments(_feature_map(call.input), weights, call.choices, call.state, out)
    _cpu.rnn_gate(args, _threads())


def gate_arguments(
    features: Any,
    weights: Sequence[Tensor],
    choices: tuple[int, ...],
    state: Tensor | None,
    out: GateStep,
) -> Any:
    """A gate's call as the compiled module takes it; every tensor is contiguous."""
    return _cpu.RnnGateArgs(
        batch=out.bits.shape[0],
        input=features,
        hidden=out.state.shape[2],
        choices=choices,
        state=_pointer(state),
        out_bits=out.bits.data_ptr(),
        out_logits=out.logits.data_ptr(),
        out_state=out.state.data_ptr(),
        **{
            name: value.data_ptr()
            for name, value in zip(RNNGateWeights._fields, weights, strict=True)
        },
    )


def _threads() -> int:
    return torch.get_num_threads()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _quantizer(quantizer: Quantizer) -> Any:
    native = _cpu.Quantizer()
    native.widths = list(quantizer.options)
    native.scale = quantizer.scale.data_ptr()
    native.zero_point = quantizer.zero_point.data_ptr()
    return native


def _feature_map(x: Tensor | PackedActivation) -> Any:
    _, channels, height, width = x.shape
    if isinstance(x, Tensor):
        return _cpu.FeatureMap.of_values(x.data_ptr(), channels, height, width, x.stride())
    return _cpu.FeatureMap.of_codes(
        x.data.data_ptr(),
        channels,
        height,
        width,
        x.data.shape[1],
        x.bits.data_ptr(),
        x.bit_options,
        x.scale.data_ptr(),
        x.zero_point.data_ptr(),
    )


def _geometry(geometry: ConvGeometry) -> Any:
    native = _cpu.ConvGeometry()
    for name, value in geometry.fields().items():
        setattr(native, name, value)
    return native


def _tile_offsets(geometry: Any, options: Sequence[int], centred: Sequence[bool]) -> list[int]:
    offsets = [0]
    for bits, is_centred in zip(options, centred, strict=True):
        end = offsets[-1] + _cpu.tile_bytes(geometry, bits, is_centred)
        offsets.append(-(-end // _TILE_ALIGNMENT) * _TILE_ALIGNMENT)
    return offsets


def _retile(geometry: Any, canonical: Tensor, bits: int, centred: bool, out: Tensor) -> None:
    _cpu.retile_weight(geometry, canonical.data_ptr(), bits, centred, out.data_ptr(), _threads())


def _tiled_weight(call: ConvCall, geometry: Any) -> tuple[Any, Tensor]:
    """The native weight of a call, and the tensor that holds its tiles."""
    weight = call.weight
    tiles = weight.tiles
    offsets = _tile_offsets(geometry, weight.options, weight.centred)
    if tiles is None:
        tiles = _make_tiles(weight, geometry, offsets, set(call.bits.tolist()))
    native = _native_weight(weight.options, weight.centred, tiles, offsets)
    native.scale = _pointer(weight.scale)
    return native, tiles


def _native_weight(
    options: Sequence[int], centred: Sequence[bool], tiles: Tensor, offsets: Sequence[int]
) -> Any:
    native = _cpu.ConvWeight()
    native.widths = list(options)
    native.centred = list(centred)
    native.tiles = [tiles.data_ptr() + offset for offset in offsets[:-1]]
    return native


def _make_tiles(
    weight: ConvWeight, geometry: Any, offsets: Sequence[int], used: set[int]
) -> Tensor:
    """Tiles of a weight that has none yet, for the widths that the batch uses."""
    tiles = torch.empty(offsets[-1], dtype=torch.uint8)
    layout = WeightLayout(weight.shape, weight.options)
    for i, bits in enumerate(weight.options):
        if bits not in used:
            continue
        if weight.is_packed:
            canonical = layout.segment(weight.data, bits)
        elif bits == 32:
            canonical = weight.data.permute(0, 2, 3, 1).contiguous()
        else:
            canonical = torch.empty(layout.segment_shape(bits), dtype=torch.uint8)
            quantize_weight(weight.data, weight.step(bits), bits, weight.centred[i], canonical)
        _retile(geometry, canonical, bits, weight.centred[i], tiles[offsets[i] :])
    return tiles
