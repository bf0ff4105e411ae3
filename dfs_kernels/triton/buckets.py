"""Samples sorted by width on the device, for one launch per width."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort_samples_kernel(
    bits,  # int32 (N,)
    order,  # int32 (N,)
    starts,  # int32 (6,): where samples at 2, 4, 8 and 32 bits and the rest begin; N
    batch,
    BLOCK: tl.constexpr,
):
    """A counting sort by one program. The rest are skipped samples and unknown widths."""
    begin = 0
    for i in tl.static_range(5):
        tl.store(starts + i, begin)
        count = 0
        for first in range(0, batch, BLOCK):
            n = first + tl.arange(0, BLOCK)
            b = tl.load(bits + n, mask=n < batch, other=0)
            slot = tl.where(b == 2, 0, tl.where(b == 4, 1, tl.where(b == 8, 2, 4)))
            slot = tl.where(b == 32, 3, slot)
            mine = ((slot == i) & (n < batch)).to(tl.int32)
            place = begin + count + tl.cumsum(mine, axis=0) - mine
            tl.store(order + place, n, mask=mine != 0)
            count += tl.sum(mine, axis=0)
        begin += count
    tl.store(starts + 5, begin)
