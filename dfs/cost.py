"""What a decision costs, as a fraction of the full-precision network.

Every cost is a fixed part plus a table entry per gated block and choice, so that the mean over a
batch of one-hot masks is exact and differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfs.models import DynamicResNet

# Bits that count as full precision, in both the weights and the activations.
FULL_BITS = 32


class Cost:
    """Base of the costs.

    Attributes:
        fixed: the part that no decision changes.
        table: float64 (gated blocks, choices).
    """

    name = ""

    def __init__(self, fixed: float, table: Tensor) -> None:
        self.fixed = fixed
        self.table = table

    def __call__(self, mask: Tensor) -> Tensor:
        """Cost per sample (N,) of one-hot decisions (N, gated blocks, choices)."""
        return self.fixed + (mask * self.table.to(mask)).sum((1, 2))

    def of_choices(self) -> Tensor:
        """The cost of taking each choice in every block, float64 (choices,)."""
        return self.fixed + self.table.sum(0)


class PaperCost(Cost):
    """Mean over gated blocks of (bits/32)^2 (Shen et al., AAAI 2020, section 4.1)."""

    name = "paper"

    def __init__(self, model: DynamicResNet) -> None:
        widths = torch.tensor(model.choices, dtype=torch.float64)
        share = (widths / FULL_BITS) ** 2 / model.gated_blocks
        super().__init__(0.0, share.repeat(model.gated_blocks, 1))


class BitOps(Cost):
    """Multiply-accumulates weighted by bits^2, everything counted, relative to 32 bits throughout.

    Stem, first block, shortcuts and classifier count at 8 bits, the gates at 32.

    Args:
        image_size: (H, W) of the images.
    """

    name = "bitops"

    def __init__(self, model: DynamicResNet, image_size: tuple[int, int]) -> None:
        from dfs.models.cifar_resnet import UNGATED_BITS

        macs = model.macs(*image_size)
        widths = torch.tensor(model.choices, dtype=torch.float64)
        gated = torch.tensor(macs.gated, dtype=torch.float64)
        table = gated[:, None] * (widths / FULL_BITS) ** 2 / macs.total
        ungated = macs.ungated * (UNGATED_BITS / FULL_BITS) ** 2
        super().__init__((ungated + macs.gates) / macs.total, table)


def make_cost(name: str, model: DynamicResNet, image_size: tuple[int, int]) -> Cost:
    """A cost by name: "paper" or "bitops"."""
    if name == PaperCost.name:
        return PaperCost(model)
    if name == BitOps.name:
        return BitOps(model, image_size)
    raise ValueError(f"cost must be 'paper' or 'bitops', got {name!r}")
