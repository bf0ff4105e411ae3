"""The residual stream: what the blocks read and add to, kept in 8 bits or in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfs.nn.fake_quant import fake_quantize
from dfs_kernels import PackedActivation

STREAM_BITS = 8
_MIN_STEP = 1e-8


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
    return sums.double() * (stream.scale.double() / (height * width))
