"""The compiled CPU kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfs_kernels.backends import native, reference
from dfs_kernels.call import ConvCall, ConvGradients, ConvWeight, GradientsWanted
from dfs_kernels.gate import GateCall, GateStep
from dfs_kernels.geometry import ConvGeometry, laid_out_like
from dfs_kernels.packing import (
    PackedActivation,
    PackedConvWeight,
    WeightLayout,
    new_codes,
    new_packed_codes,
)
from dfs_kernels.reference import step_share
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
    out = new_packed_codes(codes, bits)
    if out.numel():
        rows = codes.numel() // channels
        _cpu.pack_bits(codes.data_ptr(), rows, channels, bits, out.data_ptr(), _threads())
    return out


def unpack_bits(packed: Tensor, bits: int, channels: int, signed: bool) -> Tensor:
    packed = packed.contiguous()
    out = new_codes(packed, channels, signed)
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


def fake_quantize(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    out = torch.empty_like(x)
    x = laid_out_like(x, out)
    _cpu.fake_quantize(
        x.data_ptr(), x.numel(), bits, scale.item(), zero_point.item(), out.data_ptr(), _threads()
    )
    return out


def fake_quantize_backward(
    grad_output: Tensor, x: Tensor, bits: int, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x)
    grad_output, x = laid_out_like(grad_output, out), laid_out_like(x, out)
    total = _cpu.fake_quantize_backward(
        grad_output.data_ptr(),
        x.data_ptr(),
        x.numel(),
        bits,
        scale.item(),
        zero_point.item(),
        out.data_ptr(),
        _threads(),
    )
    return out, scale.new_tensor(total) * step_share(x.numel(), bits)


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
    return _tile_offsets(native.geometry(_cpu, geometry), options, centred)[-1]


def retile_weight(weight: PackedConvWeight, geometry: ConvGeometry) -> Tensor:
    shape = native.geometry(_cpu, geometry)
    offsets = _tile_offsets(shape, weight.bit_options, weight.centred)
    # Zeros, so that the gaps between the widths are the same every time.
    tiles = torch.zeros(offsets[-1], dtype=torch.uint8)
    for i, bits in enumerate(weight.bit_options):
        _retile(shape, weight.packed(bits), bits, weight.centred[i], tiles[offsets[i] :])
    return tiles


def native_parts(
    geometry: ConvGeometry, options: Sequence[int], centred: Sequence[bool], tiles: Tensor
) -> tuple[Any, Any]:
    """A geometry, and a weight without its steps, as the compiled module takes them."""
    shape = native.geometry(_cpu, geometry)
    offsets = _tile_offsets(shape, options, centred)
    return shape, _native_weight(options, centred, tiles, offsets)


def mixed_conv2d(call: ConvCall, out: Tensor | PackedActivation) -> None:
    geometry = native.geometry(_cpu, call.geometry)
    weight, tiles = _tiled_weight(call, geometry)
    args = native.mixed_conv2d_args(_cpu, call, geometry, weight, out)
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
    values = weight.data.contiguous()
    gradients = ConvGradients.empty(call, wanted)
    args = native.mixed_conv2d_backward_args(_cpu, call, grad_output, gradients)
    args.weight = values.data_ptr()
    _cpu.mixed_conv2d_backward(args, _threads())
    return gradients


def rnn_gate(call: GateCall, out: GateStep) -> None:
    weights = [value.contiguous() for value in call.weights]
    features = _feature_map(call.input)
    args = native.gate_args(_cpu, features, weights, call.choices, call.state, out)
    _cpu.rnn_gate(args, _threads())


def _feature_map(x: Tensor | PackedActivation) -> Any:
    return native.feature_map(_cpu, x)


def _threads() -> int:
    return torch.get_num_threads()


def _tile_offsets(geometry: Any, options: Sequence[int], centred: Sequence[bool]) -> list[int]:
    return native.tile_offsets(_cpu.tile_bytes, geometry, options, centred, _TILE_ALIGNMENT)


def _retile(geometry: Any, canonical: Tensor, bits: int, centred: bool, out: Tensor) -> None:
    _cpu.retile_weight(geometry, canonical.data_ptr(), bits, centred, out.data_ptr(), _threads())


def _tiled_weight(call: ConvCall, geometry: Any) -> tuple[Any, Tensor]:
    """The native weight of a call, and the tensor that holds its tiles."""
    weight = call.weight
    tiles = weight.tiles
    offsets = _tile_offsets(geometry, weight.options, weight.centred)
    if tiles is None:
        tiles = _make_tiles(weight, geometry, offsets, set(call.bits.tolist()))
    tiled = _native_weight(weight.options, weight.centred, tiles, offsets)
    tiled.scale = native.pointer(weight.scale)
    return tiled, tiles


def _native_weight(
    options: Sequence[int], centred: Sequence[bool], tiles: Tensor, offsets: Sequence[int]
) -> Any:
    addresses = [tiles.data_ptr() + offset for offset in offsets[:-1]]
    return native.weight(_cpu, options, centred, addresses)


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
