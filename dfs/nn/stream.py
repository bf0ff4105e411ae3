"""The residual stream: what the blocks read and add to, kept in 8 bits or in float32."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.nn.shapes import PoolShape
from dfs_kernels import PackedActivation, fake_quantize

STREAM_BITS = 8
_MIN_STEP = 1e-8
# Keeps the gradient of the square root finite where a channel does not vary.
_LEAST_VARIANCE = 1e-10


class StreamQuantizer(nn.Module):
    """The learned step of the uint8 stream of one resolution group; values are never negative.

    Args:
        enabled: False keeps the stream in float32.
    """

    zero_point: Tensor

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled
        self.step = nn.Parameter(torch.tensor(4.0 / 255))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    def scale(self) -> Tensor:
        """The step, 0-dimensional."""
        return self.step.abs().clamp_min(_MIN_STEP)

    def forward(self, x: Tensor) -> Tensor:
        """The values that storing ``x`` (N, C, H, W) leaves, for training."""
        if not self.enabled:
            return x
        return fake_quantize(x, self.scale(), self.zero_point, STREAM_BITS)

    def output_arguments(self) -> dict[str, Any]:
        """What makes a kernel write this stream, as keyword arguments of ``mixed_conv2d``."""
        if not self.enabled:
            return {}
        return {"output_scale": {STREAM_BITS: self.scale().detach()}, "output_bits": STREAM_BITS}

    @torch.no_grad()
    def set_step(self, step: float) -> None:
        self.step.fill_(max(step, _MIN_STEP))


def pooled_mean(stream: Tensor | PackedActivation) -> Tensor:
    """Global average pool in float64, (N, C); of a packed stream from exact integer sums."""
    if isinstance(stream, Tensor):
        return stream.double().mean((2, 3))
    batch, channels, height, width = stream.shape
    codes = stream.data.view(batch, height * width, channels)
    sums = codes.sum(1, dtype=torch.int64) - height * width * stream.zero_point.long()
    return sums.double() * _share(stream)


def _share(stream: PackedActivation) -> Tensor:
    """The step over the number of pixels, float64 (1,)."""
    step = stream.scale.double()
    # By a tensor: a GPU divides by a number by multiplying with its rounded reciprocal.
    return step / torch.full_like(step, stream.height * stream.width)


def pooled_features(stream: Tensor | PackedActivation, deviation: bool) -> Tensor:
    """What a gate sees, float64 (N, C), or (N, 2C) with every channel's deviation behind the means.

    Of a packed stream both come from exact integer sums.
    """
    mean = pooled_mean(stream)
    if not deviation:
        return mean
    if isinstance(stream, Tensor):
        variance = (stream.double() - mean[:, :, None, None]).square().mean((2, 3))
    else:
        batch, channels, height, width = stream.shape
        codes = stream.data.view(batch, height * width, channels)
        sums = codes.sum(1, dtype=torch.int64)
        squares = codes.to(torch.int32).square().sum(1, dtype=torch.int64)
        spread = height * width * squares - sums.square()
        variance = spread.double() * _share(stream).square()
    return torch.cat([mean, (variance + _LEAST_VARIANCE).sqrt()], 1)


def max_pool_codes(stream: PackedActivation, pool: PoolShape) -> PackedActivation:
    """Max-pool a packed uint8 stream: exact, as rounding keeps the order of values.

    Padding counts for nothing: it is code 0, and there is none below it.

    Args:
        stream: every sample at 8 bits.
    """
    batch, channels, height, width = stream.shape
    codes = stream.data.view(batch, height, width, channels)
    codes = F.pad(codes, (0, 0, *[pool.padding] * 4))
    for axis in (1, 2):
        span = codes.shape[axis] - pool.kernel + 1
        taps = [codes.narrow(axis, i, span) for i in range(pool.kernel)]
        step = (slice(None),) * axis + (slice(None, None, pool.stride),)
        codes = reduce(torch.maximum, (tap[step] for tap in taps))
    height, width = codes.shape[1:3]
    return replace(
        stream, data=codes.reshape(batch, height * width * channels), height=height, width=width
    )
