"""Batches that several processes share: what must be drawn or averaged over all of them.

Inside :func:`sharded`, every process of the default group holds its slice of one batch, equally
long and in the order of the ranks. Outside of it, and with one process, nothing here differs from
what PyTorch does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_sharded = False


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def active() -> bool:
    """Whether batches are slices of a larger one now."""
    return _sharded and count() > 1


@contextmanager
def sharded(enabled: bool = True) -> Iterator[None]:
    """Within it, batches are slices."""
    global _sharded
    before = _sharded
    _sharded = enabled
    try:
        yield
    finally:
        _sharded = before


def rand(samples: int, *shape: int, **options: Any) -> Tensor:
    """``torch.rand(samples, *shape)``: this process's slice of what one process would draw."""
    return _slice(torch.rand(_whole(samples), *shape, **options), samples)


def randint(high: int, samples: int, *shape: int, **options: Any) -> Tensor:
    """``torch.randint(high, (samples, *shape))``: this process's slice of what one would draw."""
    return _slice(torch.randint(high, (_whole(samples), *shape), **options), samples)


def total(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes; they are changed in place."""
    if not active():
        return values
    if dist.get_backend() == "nccl" and not values.is_cuda:
        # It only takes what is on a GPU.
        moved = values.cuda()
        dist.all_reduce(moved)
        return values.copy_(moved)
    dist.all_reduce(values)
    return values


def batch_mean(values: Tensor) -> Tensor:
    """The mean over the whole batch's samples, of values (N, ...).

    Its gradient is that of the slice's own mean, so that the gradients that the processes then
    average add up to those of one process.
    """
    own = values.mean(0)
    if not active():
        return own
    return own + (total(own.detach().clone()) / count() - own.detach())


def _whole(samples: int) -> int:
    return samples * count() if active() else samples


def _slice(drawn: Tensor, samples: int) -> Tensor:
    return drawn[rank() * samples :][:samples] if active() else drawn


class _SyncedBatchNorm(torch.autograd.Function):
    """Batch normalization by the statistics of all slices (Ioffe and Szegedy, ICML 2015)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.double()
        own = values.new_tensor([x.numel() // x.shape[1]]).expand(x.shape[1])
        sums = torch.stack((values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), own))
        added, squares, samples = total(sums)
        elements = samples.clamp_min(1)
        mean = added / elements
        var = (squares / elements - mean.square()).clamp_min(0)
        inverse = (var + eps).rsqrt()
        normalized = (x - _channels(mean.to(x))) * _channels(inverse.to(x))
        ctx.save_for_backward(normalized, weight, inverse, elements)
        ctx.mark_non_differentiable(mean, var, samples)
        return normalized * _channels(weight) + _channels(bias), mean, var, samples

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normalized, weight, inverse, elements = ctx.saved_tensors
        grad = grads[0]
        own = torch.stack(
            (grad.double().sum((0, 2, 3)), (grad * normalized).double().sum((0, 2, 3)))
        )
        grad_bias, grad_weight = own.to(grad)
        mean, projection = (total(own.clone()) / elements).to(grad)
        centred = grad - _channels(mean) - normalized * _channels(projection)
        return centred * _channels(weight * inverse.to(grad)), grad_weight, grad_bias, None


def _channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` in training, by the statistics of all slices.

    Args:
        x: (N, C, H, W); N may be 0 in some of the processes.
        running_mean, running_var: updated in place, alike in every process.
    """
    if not active():
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    result, mean, var, elements = _SyncedBatchNorm.apply(x, weight, bias, eps)
    unbiased = var * elements / (elements - 1).clamp_min(1)
    # Rows of one buffer: another row may be waiting for its backward, and does not change.
    running_mean.data.lerp_(mean.to(running_mean), momentum)
    running_var.data.lerp_(unbiased.to(running_var), momentum)
    return result


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics, in training, are those of all slices of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and active()):
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        return batch_norm(x, *statistics, self.weight, self.bias, self.momentum or 0.0, self.eps)
