"""Quantize and dequantize in float on a grid that need not hold 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfs_kernels.widths import activation_max

_MIN_STEP = 1e-8


class _AffineFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int, noise: Tensor | None
    ) -> Tensor:
        top = activation_max(bits)
        step = ((high.double() - low.double()) / top).clamp_min(_MIN_STEP).to(x.dtype)
        codes = (x - low) / step
        if noise is not None:
            codes = codes + noise
        return codes.clamp(0, top).round() * step + low

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grads[0], None, None, None, None


def affine_fake_quantize(
    x: Tensor, low: Tensor, high: Tensor, bits: int, noise: Tensor | None = None
) -> Tensor:
    """``x`` on the grid of 2^bits values from ``low`` to ``high``, neither of which need be 0.

    The gradient passes straight through, outside of the range too.

    Args:
        x: float, any shape.
        low, high: 0-dimensional.
        noise: added to the codes before they are rounded.
    """
    result: Tensor = _AffineFakeQuantize.apply(x, low, high, bits, noise)
    return result
