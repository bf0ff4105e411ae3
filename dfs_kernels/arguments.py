"""Bringing the arguments of the public functions to what the kernels take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfs_kernels.packing import Quantizer, per_width
from dfs_kernels.widths import check_options

PerWidth = Tensor | Mapping[int, "Tensor | float"] | Sequence[float] | float
PerWidthInt = Tensor | Mapping[int, "Tensor | int"] | Sequence[int] | int

_MAX_INT32 = 2**31 - 1
# What a tensor of per-width values stands for when only its length says so.
_OPTIONS_BY_LENGTH = {3: (2, 4, 8), 4: (2, 4, 8, 32)}


def is_debugging() -> bool:
    """Whether values on a GPU are to be checked, at the price of waiting for it."""
    return os.environ.get("DFS_DEBUG", "0") == "1"


def infer_options(
    scale: PerWidth | None,
    bit_options: Sequence[int] | None,
    single: tuple[int, ...] | None,
    name: str,
) -> tuple[int, ...]:
    if bit_options is not None:
        return check_options(bit_options)
    if isinstance(scale, Mapping):
        return check_options(sorted(scale), name)
    length = len(scale) if isinstance(scale, Tensor) and scale.dim() else None
    if length is None and isinstance(scale, Sequence):
        length = len(scale)
    if length in (None, 1) and single is not None:
        return check_options(single, "bits")
    if length in _OPTIONS_BY_LENGTH:
        return _OPTIONS_BY_LENGTH[length]
    raise ValueError(f"{name} does not tell its widths; give a dict keyed by width, or bit_options")


def widths_of(bits: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """``bits`` as an int32 (N,) tensor."""
    if isinstance(bits, Tensor):
        if bits.is_floating_point() or bits.is_complex() or bits.dtype == torch.bool:
            raise TypeError(f"bits must be an integer tensor, got {bits.dtype}")
        if bits.dim() != 1 or bits.shape[0] != batch:
            raise ValueError(f"bits must have shape ({batch},), got {tuple(bits.shape)}")
        if bits.device != device:
            raise ValueError(f"bits is on {bits.device}, but the input is on {device}")
        if bits.dtype in (torch.int64, torch.uint32, torch.uint64):
            # What would wrap around to a valid width must stay an invalid one.
            bits = bits.to(torch.int64).clamp(-1, _MAX_INT32)
        return bits.to(torch.int32).contiguous()
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int or an integer tensor, got {bits!r}")
    value = min(max(bits, -1), _MAX_INT32)
    return torch.full((batch,), value, dtype=torch.int32, device=device)


def quantizer_of(
    scale: PerWidth,
    zero_point: PerWidthInt | None,
    options: tuple[int, ...],
    scale_name: str,
    zero_point_name: str,
    device: torch.device,
) -> Quantizer:
    steps = per_width(scale, options, scale_name, torch.float32, device, fill=1.0)
    if zero_point is None:
        zeros = torch.zeros(len(options), dtype=torch.int32, device=device)
    else:
        zeros = per_width(zero_point, options, zero_point_name, torch.int32, device, fill=0)
    return Quantizer(options, steps, zeros)


def bias_of(bias: Tensor, out_channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``bias`` checked, as a contiguous (O,) tensor of ``dtype``."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    if tuple(bias.shape) != (out_channels,):
        raise ValueError(f"bias must have shape {(out_channels,)}, got {tuple(bias.shape)}")
    if bias.device != device:
        raise ValueError(f"bias is on {bias.device}, but the input is on {device}")
    return bias.to(dtype).contiguous()


def only_entry(values: Any, bits: int, options: tuple[int, ...]) -> Any:
    """The one entry of per-width values that a fixed output width needs."""
    if isinstance(values, Mapping):
        return {bits: values[bits]} if bits in values else values
    if isinstance(values, Tensor) and values.dim() == 1 and len(values) == len(options) > 1:
        if bits in options:
            return values[options.index(bits)]
    return values
