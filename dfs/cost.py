"""What a decision costs, as a fraction of the full-precision network.

Every cost is a fixed part plus a table entry per gated block and choice, so that the mean over a
batch of one-hot masks is exact and differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dfs.latency import LatencyTable
from dfs.models import DynamicResNet

# Bits that count as full precision, in both the weights and the activations.
FULL_BITS = 32


class Cost:
    """Base of the costs.

    Args:
        fixed, table: in the unit of ``full``.
        full: what the full-precision network costs: every layer at 32 bits, and no gates.

    Attributes:
        name: what :func:`make_cost` calls it.
        unit: of ``full``.
        fixed: the part that no decision changes, as a fraction of ``full``.
        table: float64 (gated blocks, choices), fractions of ``full``.
    """

    name = ""
    unit = ""

    def __init__(self, fixed: float, table: Tensor, full: float) -> None:
        self.fixed = fixed / full
        self.table = table.double() / full
        self.full = full

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for :meth:`from_dict`."""
        return {"fixed": self.fixed, "table": self.table.tolist(), "full": self.full}

    @staticmethod
    def from_dict(values: object, blocks: int, choices: int) -> Cost:
        """A cost that was saved; ValueError unless it is one for so many blocks and choices."""
        if not isinstance(values, dict) or set(values) != {"fixed", "table", "full"}:
            raise ValueError(f"a cost must have fixed, table and full, got {values!r}")
        if not all(type(values[name]) in (int, float) for name in ("fixed", "full")):
            raise ValueError("a cost must hold numbers: fixed and full")
        try:
            table = torch.tensor(values["table"], dtype=torch.float64)
            fixed, full = float(values["fixed"]), float(values["full"])
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"a cost must hold numbers: {error}") from None
        if tuple(table.shape) != (blocks, choices) or not full > 0:
            raise ValueError(f"a cost needs a table of {blocks} x {choices} and a positive full")
        cost = Cost(fixed * full, table * full, full)
        if not (math.isfinite(cost.fixed) and bool(torch.isfinite(cost.table).all())):
            raise ValueError("a cost must hold finite numbers")
        return cost

    def __call__(self, mask: Tensor) -> Tensor:
        """Cost per sample (N,) of one-hot decisions (N, gated blocks, choices)."""
        return self.fixed + (mask * self.table.to(mask, non_blocking=True)).sum((1, 2))

    def of_choices(self) -> Tensor:
        """The cost of taking each choice in every block, float64 (choices,)."""
        return self.fixed + self.table.sum(0)


class PaperCost(Cost):
    """Mean over gated blocks of (bits/32)^2 (Shen et al., AAAI 2020, section 4.1)."""

    name = "paper"
    unit = "gated blocks"

    def __init__(self, model: DynamicResNet) -> None:
        share = _weights(model.choices)
        super().__init__(0.0, share.repeat(model.gated_blocks, 1), model.gated_blocks)


class BitOps(Cost):
    """Multiply-accumulates weighted by bits^2, everything counted, relative to 32 bits throughout.

    Stem, first block and classifier count at the network's ``ungated_bits``, shortcuts at what they
    run at, the gates at 32.

    Args:
        image_size: (H, W) of the images.
    """

    name = "bitops"
    unit = "MACs at 32 bits"

    def __init__(self, model: DynamicResNet, image_size: tuple[int, int]) -> None:
        macs = model.macs(*image_size)
        table = torch.tensor(macs.gated)[:, None] * _weights(model.choices)
        ungated = macs.ungated
        if model.semantics.paper_skipping:
            # Such a shortcut runs at the block's own width, at full precision if that is skipped.
            widths = [b or FULL_BITS for b in model.choices]
            table = table + torch.tensor(macs.shortcuts)[:, None] * _weights(widths)
            ungated -= sum(macs.shortcuts)
        fixed = ungated * (model.ungated_bits / FULL_BITS) ** 2 + macs.gates
        super().__init__(fixed, table, macs.total)


class Latency(Cost):
    """Milliseconds per image, looked up in a table that was measured on a machine.

    The full-precision network has its shortcuts at the width at which they are deployed.

    Args:
        image_size: (H, W) of the images.

    Raises:
        ValueError: naming what the table lacks; nothing is interpolated.
    """

    name = "latency"
    unit = "ms"

    def __init__(
        self, model: DynamicResNet, image_size: tuple[int, int], table: LatencyTable
    ) -> None:
        found = table.look_up(model, image_size)
        super().__init__(found.fixed, found.blocks, found.full)


def make_cost(
    name: str,
    model: DynamicResNet,
    image_size: tuple[int, int],
    latency_table: LatencyTable | None = None,
) -> Cost:
    """A cost by name: "paper", "bitops" or "latency", which needs the table."""
    if name == PaperCost.name:
        return PaperCost(model)
    if name == BitOps.name:
        return BitOps(model, image_size)
    if name == Latency.name:
        if latency_table is None:
            raise ValueError("cost 'latency' needs latency_table")
        return Latency(model, image_size, latency_table)
    raise ValueError(f"cost must be 'paper', 'bitops' or 'latency', got {name!r}")


def _weights(widths: tuple[int, ...] | list[int]) -> Tensor:
    """(bits/32)^2, float64."""
    return (torch.tensor(widths, dtype=torch.float64) / FULL_BITS) ** 2
