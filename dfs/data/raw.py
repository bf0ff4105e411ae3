"""A small data set as its files hold it: uint8 pixels, split into training and test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfs.data.files import DataError


@dataclass(frozen=True, eq=False)
class RawImages:
    """Pixels uint8 (N, C, H, W) and labels int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def check(self, path: Path, classes: int) -> None:
        """DataError if labels are missing or out of range."""
        if len(self.pixels) != len(self.labels) or not len(self.labels):
            raise DataError(f"{path}: {len(self.pixels)} images, {len(self.labels)} labels")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise DataError(f"{path}: label {wrong} is none of 0 to {classes - 1}")


@dataclass(frozen=True)
class RawSet:
    """Training and test images, and the classes' names in the order of the labels."""

    train: RawImages
    test: RawImages
    class_names: tuple[str, ...]


# Held fixed, so that figures can be compared: only what gates learn on varies with a run's seed.
SPLIT_SEED = 20200107
_LARGEST_VALIDATION = 5000


def fixed_order(count: int) -> Tensor:
    """The one shuffle of a data set that decides what is held out."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


def hold_out(count: int) -> tuple[Tensor, Tensor]:
    """(learned from, validation): a tenth of the training images, at most 5,000, for choices.

    Raises:
        DataError: too few images to hold any out.
    """
    order = fixed_order(count)
    held = min(_LARGEST_VALIDATION, count // 10)
    if held < 1:
        raise DataError(f"{count} training images are too few to hold any out for validation")
    return order[held:], order[:held]


def share_with_gates(learned: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(weights, gates): a tenth of the indices, by the run's seed, is for the gates alone.

    Raises:
        DataError: too few to share.
    """
    gates = len(learned) // 10
    if gates < 1:
        raise DataError(f"{len(learned)} training images are too few to share with the gates")
    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed))
    shuffled = learned[order]
    return shuffled[gates:], shuffled[:gates]
