"""The backend "cuda" but for samples of 2 bits, multiplied as bit planes on 1-bit tensor cores.

csrc/cuda/bit_planes.h says how. These samples have a launch of their own, so a convolution that
offers other widths too takes one more.

A candidate: calls that ask for no backend take it only where the table of what measured faster on
their GPU names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfs_kernels.backends import cuda
from dfs_kernels.backends.cuda import (
    mixed_conv2d_backward,
    pack_bits,
    quantize_pack,
    quantize_weight,
    rnn_gate,
    supports,
    unpack_bits,
    unpack_dequantize,
)
from dfs_kernels.call import ConvCall
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import PackedActivation, PackedConvWeight

__all__ = [
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

# Compilers for these and later ones make a function of the instruction, which multiplies bytes.
_LEAST_WITHOUT = (10, 0)


@torch.compiler.assume_constant_result
def unavailable_reason() -> str | None:
    reason = cuda.unavailable_reason()
    if reason is not None or cuda.is_emulated():
        return reason
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if max(found) >= _LEAST_WITHOUT:
        major, minor = max(found)
        return f"a GPU of compute capability {major}.{minor} has no 1-bit tensor cores"
    return None


def info() -> dict[str, Any]:
    about = {**cuda.info(), "tiles": tile_variant()}
    if "kernels" in about:
        about["kernels"] = "1-bit tensor cores (mma.sync) at 2 bits, int8 at 4 and 8, float32 at 32"
    return about


def tile_variant() -> str:
    return cuda.tile_variant(planes=True)


def tile_bytes(geometry: ConvGeometry, options: Sequence[int], centred: Sequence[bool]) -> int:
    return cuda.tile_bytes(geometry, options, centred, planes=True)


def retile_weight(weight: PackedConvWeight, geometry: ConvGeometry) -> Tensor:
    return cuda.retile_weight(weight, geometry, planes=True)


def mixed_conv2d(call: ConvCall, out: Tensor | PackedActivation) -> None:
    cuda.mixed_conv2d(call, out, planes=True)
