"""Quantize and dequantize in float, with the straight-through gradients of learned steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfs_kernels import reference
from dfs_kernels.widths import activation_max

_MIN_STEP = 1e-8


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, step, zero_point)
        ctx.bits = bits
        codes = reference.quantize_activation(x, bits, step, zero_point)
        return reference.dequantize_activation(codes, step, zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step, zero_point = ctx.saved_tensors
        grad_x, grad_step = reference.input_gradient(grads[0], x, ctx.bits, step, zero_point)
        return grad_x, grad_step, None, None


def fake_quantize(x: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The float32 values that ``x`` becomes when it is stored at ``bits`` bits.

    Args:
        x: float32, any shape.
        step: 0-dimensional; gets the gradient of Esser et al. (ICLR 2020), section 2.1.
        zero_point: 0-dimensional int32.
    """
    result: Tensor = _FakeQuantize.apply(x, step, zero_point, bits)
    return result


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
