"""Shape arithmetic of a two-dimensional convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IntPair = int | Sequence[int]


def _pair(value: IntPair, name: str, minimum: int) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ValueError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(values) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}")
    return values[0], values[1]


@dataclass(frozen=True)
class ConvGeometry:
    """Everything about a convolution's shape but the size of its input."""

    in_channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    pad_left: int = 0
    pad_right: int = 0
    pad_top: int = 0
    pad_bottom: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @staticmethod
    def create(
        in_channels: int,
        weight_shape: Sequence[int],
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
    ) -> ConvGeometry:
        """Check the arguments of a convolution and gather them.

        Args:
            in_channels: C of the input.
            weight_shape: (O, C/groups, KH, KW).
            padding: an int, a pair (vertical, horizontal), or (left, right, top, bottom) as in
                :func:`torch.nn.functional.pad`.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        out_channels, group_channels, kernel_h, kernel_w = weight_shape
        stride_h, stride_w = _pair(stride, "stride", 1)
        dilation_h, dilation_w = _pair(dilation, "dilation", 1)
        if not isinstance(padding, int) and len(padding) == 4:
            if any(isinstance(p, bool) or not isinstance(p, int) or p < 0 for p in padding):
                raise ValueError(f"padding must hold ints of at least 0, got {padding!r}")
            left, right, top, bottom = padding
        else:
            vertical, horizontal = _pair(padding, "padding", 0)
            left = right = horizontal
            top = bottom = vertical
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups must be a positive int, got {groups!r}")
        if out_channels % groups:
            raise ValueError(f"groups={groups} does not divide the {out_channels} output channels")
        if in_channels != group_channels * groups:
            raise ValueError(
                f"input has {in_channels} channels, but weight with {group_channels} channels "
                f"a group and groups={groups} takes {group_channels * groups}"
            )
        return ConvGeometry(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_h=kernel_h,
            kernel_w=kernel_w,
            stride_h=stride_h,
            stride_w=stride_w,
            pad_left=left,
            pad_right=right,
            pad_top=top,
            pad_bottom=bottom,
            dilation_h=dilation_h,
            dilation_w=dilation_w,
            groups=groups,
        )

    @property
    def group_channels(self) -> int:
        return self.in_channels // self.groups

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, C/groups, KH, KW)."""
        return self.out_channels, self.group_channels, self.kernel_h, self.kernel_w

    @property
    def taps(self) -> int:
        """K, the products that are summed for one output."""
        return self.group_channels * self.kernel_h * self.kernel_w

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(OH, OW) for an input of ``height`` x ``width``; ValueError if the kernel can't fit."""
        span_h = self.dilation_h * (self.kernel_h - 1) + 1
        span_w = self.dilation_w * (self.kernel_w - 1) + 1
        room_h = height + self.pad_top + self.pad_bottom - span_h
        room_w = width + self.pad_left + self.pad_right - span_w
        if room_h < 0 or room_w < 0:
            raise ValueError(
                f"input of {height}x{width} with its padding is smaller than the kernel's "
                f"{span_h}x{span_w}"
            )
        return room_h // self.stride_h + 1, room_w // self.stride_w + 1

    def pad(self, x: Tensor) -> Tensor:
        """``x`` (..., H, W) with the padding added as zeros."""
        return F.pad(x, (self.pad_left, self.pad_right, self.pad_top, self.pad_bottom))

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pad`: the inner part of ``x``."""
        height, width = x.shape[-2:]
        return x[
            ...,
            self.pad_top : height - self.pad_bottom,
            self.pad_left : width - self.pad_right,
        ]

    def fields(self) -> dict[str, int]:
        # Not asdict(), which copies deeply and took a fifth of a small convolution's time.
        return {name: getattr(self, name) for name in ConvGeometry.__annotations__}


def wants_channels_last(input: Tensor) -> bool:
    """Whether a result should be channels_last: the input is that and not contiguous."""
    return input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()


def laid_out_like(x: Tensor, dense: Tensor) -> Tensor:
    """``x``, or a copy of it, with its values in the order that ``dense`` has them in memory.

    Args:
        dense: of x's shape, without gaps, as :func:`torch.empty_like` gives it.
    """
    return x if x.stride() == dense.stride() else torch.empty_like(dense).copy_(x)
