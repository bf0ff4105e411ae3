"""A convolution and its BatchNorm as one call of the kernels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dfs.nn.conv import DFSConv2d
from dfs.nn.norm import PerWidthBatchNorm2d
from dfs.nn.shapes import PoolShape
from dfs.nn.stream import StreamQuantizer, max_pool_codes
from dfs_kernels import PackedActivation, PackedConvWeight, mixed_conv2d, mixed_conv2d_

Stream = Tensor | PackedActivation
Bits = int | Tensor


class FoldedConv:
    """A convolution and its BatchNorm as the kernels take them in evaluation: packed and folded."""

    def __init__(self, conv: DFSConv2d, norm: PerWidthBatchNorm2d) -> None:
        options = norm.bit_options
        pick = [conv.bit_options.index(b) for b in options if b != 32]
        steps = conv.quantizer.weight_scale(conv.weight).detach()[pick]
        self.weight = PackedConvWeight.from_float(conv.weight, steps, options)
        self.input_scale = conv.quantizer.input_scale().detach()[pick]
        self.input_zero_point = conv.quantizer.input_zero_point()[pick]
        self.mul, self.add = norm.folded()
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.stride: tuple[int, int] = conv.stride  # type: ignore[assignment]
        self.padding: tuple[int, int] = conv.padding  # type: ignore[assignment]
        self.dilation: tuple[int, int] = conv.dilation  # type: ignore[assignment]
        self.groups = conv.groups

    def __call__(self, x: Stream, bits: Bits, *, as_codes: bool = False, **epilogue: Any) -> Stream:
        """Convolve with what :func:`dfs_kernels.mixed_conv2d` offers after the sum.

        Args:
            as_codes: use the codes of a packed ``x`` as they are, instead of quantizing it at
                each sample's width.
        """
        return mixed_conv2d(x, self.weight, bits, **self._arguments(as_codes), **epilogue)

    def add_into(self, x: Stream, bits: Bits, residual: Stream, *, as_codes: bool = False) -> None:
        """Convolve, add to ``residual`` in place and rectify."""
        arguments = self._arguments(as_codes)
        mixed_conv2d_(x, self.weight, bits, residual=residual, activation="relu", **arguments)

    def _arguments(self, as_codes: bool) -> dict[str, Any]:
        return {
            "input_scale": None if as_codes else self.input_scale,
            "input_zero_point": None if as_codes else self.input_zero_point,
            "mul": self.mul,
            "add": self.add,
            "bias": self.bias,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }


def run_packed_stem(
    folded: FoldedConv, x: Stream, bits: Bits, stream: StreamQuantizer, pool: PoolShape | None
) -> Stream:
    """Stem convolution, ReLU and max pool as they are deployed: what the first block is given."""
    written = folded(x, bits, activation="relu", **stream.output_arguments())
    if pool is None:
        return written
    if isinstance(written, Tensor):
        return F.max_pool2d(written, pool.kernel, pool.stride, pool.padding)
    return max_pool_codes(written, pool)
