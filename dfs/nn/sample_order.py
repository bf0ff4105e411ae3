"""Samples of one width side by side: what works width by width then works on slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Reorder(torch.autograd.Function):
    # Indexing would do, but its backward adds rows to zeros one by one.
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return reorder(grads[0], back, there), None, None


def reorder(x: Tensor, there: Tensor, back: Tensor) -> Tensor:
    """``x[there]`` of x (N, ...), for a permutation and its inverse, int64 (N,)."""
    result: Tensor = _Reorder.apply(x, there, back)
    return result


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """A batch ordered by width, samples of one width in the order that they had.

    Attributes:
        order: int64 (N,), where each sample comes from; None if it is ordered already.
        inverse: int64 (N,), where each sample goes to.
    """

    order: Tensor | None
    inverse: Tensor | None

    @classmethod
    def of(cls, bits: Tensor) -> SampleOrder:
        """That of the widths of a batch, (N,). Looks at them."""
        if bool((bits[1:] >= bits[:-1]).all()):
            return cls(None, None)
        order = bits.argsort(stable=True)
        return cls(order, order.argsort())

    def sort(self, x: Tensor) -> Tensor:
        """x (N, ...) in this order."""
        if self.order is None or self.inverse is None:
            return x
        return reorder(x, self.order, self.inverse)

    def restore(self, x: Tensor) -> Tensor:
        """What :meth:`sort` ordered, as it was."""
        if self.order is None or self.inverse is None:
            return x
        return reorder(x, self.inverse, self.order)
