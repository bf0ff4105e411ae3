"""Quantize and dequantize in float, with the straight-through gradients of learned steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfs_kernels import reference


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
