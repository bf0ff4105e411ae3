"""The reference as a backend: any device, any width, no speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfs_kernels import reference
from dfs_kernels.geometry import ConvGeometry, laid_out_like
from dfs_kernels.packing import PackedConvWeight
from dfs_kernels.reference import (
    fake_quantize,
    mixed_conv2d,
    mixed_conv2d_backward,
    pack_bits,
    quantize_pack,
    rnn_gate,
    unpack_bits,
    unpack_dequantize,
)

__all__ = [
    "fake_quantize",
    "fake_quantize_backward",
    "info",
    "mixed_conv2d",
    "mixed_conv2d_backward",
    "pack_bits",
    "quantize_pack",
    "quantize_weight",
    "retile_weight",
    "rnn_gate",
    "supports",
    "tile_bytes",
    "tile_variant",
    "unavailable_reason",
    "unpack_bits",
    "unpack_dequantize",
]


def unavailable_reason() -> str | None:
    return None


def supports(device_type: str, options: Sequence[int]) -> bool:
    return True


def info() -> dict[str, Any]:
    return {"torch": torch.__version__}


def fake_quantize_backward(
    grad_output: Tensor, x: Tensor, bits: int, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, grad_scale = reference.input_gradient(grad_output, x, bits, scale, zero_point)
    return laid_out_like(grad_x, torch.empty_like(x)), grad_scale


def quantize_weight(weight: Tensor, scale: Tensor, bits: int, centred: bool, out: Tensor) -> None:
    codes = reference.quantize_weight(weight, bits, scale, centred)
    out.copy_(pack_bits(codes.permute(0, 2, 3, 1), bits))


def tile_variant() -> str | None:
    return None


def tile_bytes(geometry: ConvGeometry, options: Sequence[int], centred: Sequence[bool]) -> int:
    """0: the canonical layout is read as it is."""
    return 0


def retile_weight(weight: PackedConvWeight, geometry: ConvGeometry) -> Tensor:
    return weight.buffer.new_empty(0)
