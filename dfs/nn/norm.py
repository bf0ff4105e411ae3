"""Batch normalization with statistics and an affine of its own for every bitwidth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.nn import replicas
from dfs.nn.sample_order import SampleOrder
from dfs_kernels.widths import check_options


class PerWidthBatchNorm2d(nn.Module):
    """One BatchNorm per width: in training each sees the samples evaluated at its width.

    A width with fewer than ``min_samples`` samples in the batch is normalized by its running
    statistics, which that batch does not change. Samples at 0 bits pass through as they are.

    Args:
        channels: C.
        bit_options: ascending widths, 32 included if it is on offer.
        momentum: weight of a new batch in the running statistics.
        shared: have one BatchNorm for all widths, as the authors of the paper do.

    Attributes:
        entries: the widths that each row of parameters and statistics serves.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        bit_options: Sequence[int],
        eps: float = 1e-5,
        momentum: float = 0.1,
        min_samples: int = 8,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.bit_options = check_options(bit_options)
        self.eps = eps
        self.momentum = momentum
        self.min_samples = min_samples
        self.entries = (self.bit_options,) if shared else tuple((b,) for b in self.bit_options)
        count = len(self.entries)
        self.weight = nn.Parameter(torch.ones(count, channels))
        self.bias = nn.Parameter(torch.zeros(count, channels))
        self.register_buffer("running_mean", torch.zeros(count, channels))
        self.register_buffer("running_var", torch.ones(count, channels))

    def forward(self, x: Tensor, bits: int | Tensor | None) -> Tensor:
        """Normalize (N, C, H, W) by the statistics of each sample's width.

        Args:
            bits: an int, a tensor (N,), or None for the widest option.
        """
        if bits is None:
            return self._normalize(x, len(self.entries) - 1)
        if isinstance(bits, int):
            if bits not in (0, *self.bit_options):
                raise ValueError(f"bits must be 0 or one of {self.bit_options}, got {bits}")
            return x if bits == 0 else self._normalize(x, self._entry_of(bits))
        if bits.is_cuda and not replicas.active():
            return self._normalize_by_mask(x, bits)
        if self.training and replicas.active():
            return self._normalize_together(x, bits)
        return self._normalize_runs(x, bits)

    def _normalize_runs(self, x: Tensor, bits: Tensor) -> Tensor:
        """The samples of each entry as a slice of the batch in the order of the entries."""
        entry = torch.full_like(bits, -1)
        for i in range(len(self.entries)):
            entry.masked_fill_(self._holds(i, bits), i)
        order = SampleOrder.of(entry)
        counts = torch.bincount(entry + 1, minlength=len(self.entries) + 1).tolist()
        skipped, *parts = order.sort(x).split(counts)
        parts = [self._normalize(part, i) for i, part in enumerate(parts) if len(part)]
        if len(skipped):
            parts.insert(0, skipped)
        return order.restore(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _normalize_together(self, x: Tensor, bits: Tensor) -> Tensor:
        """The same where every process takes part in the statistics of every entry."""
        result = x
        for i in range(len(self.entries)):
            rows = self.rows_of(i, bits)
            result = result.index_copy(0, rows, self._normalize(x[rows], i))
        return result

    def rows_of(self, entry: int, bits: Tensor) -> Tensor:
        """Indices of the samples that an entry normalizes."""
        return self._holds(entry, bits).nonzero().squeeze(1)

    def _holds(self, entry: int, bits: Tensor) -> Tensor:
        """Whether an entry normalizes each sample, (N,)."""
        chosen = bits == self.entries[entry][0]
        for width in self.entries[entry][1:]:
            chosen |= bits == width
        return chosen

    def _normalize_by_mask(self, x: Tensor, bits: Tensor) -> Tensor:
        """The same without looking at the values of ``bits``, which a GPU would be waited for.

        Sums of every sample are added up over the samples of each entry.
        """
        member = torch.stack([self._holds(i, bits) for i in range(len(self.entries))])
        shares = member.double()
        mean, var = self.running_mean.double(), self.running_var.double()
        if self.training:
            count = shares.sum(1, keepdim=True)
            elements = (count * (x.shape[2] * x.shape[3])).clamp_min(1)
            # About the running mean, so that little is lost in the difference.
            shift = (shares.T @ mean)[:, :, None, None].to(x)
            centred = x - shift
            sums = shares @ centred.sum((2, 3), dtype=torch.float64) / elements
            squares = shares @ centred.square().sum((2, 3), dtype=torch.float64) / elements
            own_mean, own_var = mean + sums, (squares - sums.square()).clamp_min(0)
            enough = count >= self.min_samples
            self._follow(own_mean, own_var * elements / (elements - 1).clamp_min(1), enough)
            mean = torch.where(enough, own_mean, mean)
            var = torch.where(enough, own_var, var)
        gain = self.weight.double() * (var + self.eps).rsqrt()
        offset = self.bias.double() - mean * gain
        # A sample that is skipped stays as it is.
        skipped = (1 - shares.sum(0))[:, None]
        gain, offset = shares.T @ gain + skipped, shares.T @ offset
        return x * gain[:, :, None, None].to(x) + offset[:, :, None, None].to(x)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, enough: Tensor) -> None:
        """Move the running statistics of the entries that have enough samples."""
        for running, seen in ((self.running_mean, mean), (self.running_var, var)):
            moved = running.lerp(seen.to(running), self.momentum)
            running.copy_(torch.where(enough, moved, running))

    def _entry_of(self, bits: int) -> int:
        return next(i for i, widths in enumerate(self.entries) if bits in widths)

    def _normalize(self, x: Tensor, index: int) -> Tensor:
        statistics = (self.running_mean[index], self.running_var[index])
        affine = (self.weight[index], self.bias[index])
        if self.training and self._samples(x) >= self.min_samples:
            return replicas.batch_norm(x, *statistics, *affine, self.momentum, self.eps)
        return F.batch_norm(x, *statistics, *affine, False, self.momentum, self.eps)

    @staticmethod
    def _samples(x: Tensor) -> int:
        if not replicas.active():
            return x.shape[0]
        return int(replicas.total(torch.tensor(x.shape[0])))

    def folded(self) -> tuple[Tensor, Tensor]:
        """(mul, add) in float32, (len(bit_options), C): evaluation is y * mul + add."""
        gain = self.weight.detach().double() / (self.running_var.double() + self.eps).sqrt()
        offset = self.bias.detach().double() - self.running_mean.double() * gain
        rows = [self._entry_of(bits) for bits in self.bit_options]
        return gain.float()[rows], offset.float()[rows]

    @torch.no_grad()
    def copy_from(self, norm: nn.BatchNorm2d) -> None:
        """Give every width the parameters and statistics of one plain BatchNorm."""
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("norm must track running statistics")
        self.weight.copy_(norm.weight.expand_as(self.weight))
        self.bias.copy_(norm.bias.expand_as(self.bias))
        self.running_mean.copy_(norm.running_mean.expand_as(self.running_mean))
        self.running_var.copy_(norm.running_var.expand_as(self.running_var))

    def extra_repr(self) -> str:
        return f"{self.channels}, bit_options={self.bit_options}"
