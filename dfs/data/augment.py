"""Random changes of training images, drawn per image from an explicit generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[float, float, float, float]

# Share of the picture's area, and ratio of width to height, of a random cut (Szegedy et al., CVPR
# 2015, section 6; the ranges everybody trains ImageNet with).
_CUT_AREA = (0.08, 1.0)
_CUT_RATIO = (3 / 4, 4 / 3)
_CUT_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """Translation and mirroring of a batch (He et al., CVPR 2016, section 4.2).

    Args:
        shift: largest translation, in pixels; the same as padding by it and cutting at random.
        flip: mirror every other image, left to right.
        border: what comes in at the edge: "replicate" it, or "constant", black.
    """

    shift: int
    flip: bool
    border: str = "replicate"

    def __post_init__(self) -> None:
        if self.border not in ("replicate", "constant"):
            raise ValueError(f"border must be 'replicate' or 'constant', got {self.border!r}")

    def apply(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment (N, C, H, W) of any type on any device.

        Args:
            generator: of the CPU, so that every device gets the same images.
        """
        count, _, height, width = images.shape
        offsets = torch.zeros((count, 2), dtype=torch.int64)
        if self.shift:
            offsets = torch.randint(2 * self.shift + 1, (count, 2), generator=generator)
            offsets -= self.shift
        rows = offsets[:, :1] + torch.arange(height)
        columns = offsets[:, 1:] + torch.arange(width)
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        return _gather(images, rows, columns, self.border)


def _gather(images: Tensor, rows: Tensor, columns: Tensor, border: str) -> Tensor:
    """Pixels (rows[n, i], columns[n, j]) of every image n."""
    count, channels, height, width = images.shape
    rows = rows.to(images.device, non_blocking=True)
    columns = columns.to(images.device, non_blocking=True)
    inside_rows, inside_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    index = inside_rows[:, :, None] * width + inside_columns[:, None]
    every_channel = index.view(count, 1, -1).expand(-1, channels, -1)
    picked = images.flatten(2).gather(2, every_channel).view(images.shape)
    if border == "constant":
        inside = (rows == inside_rows)[:, :, None] & (columns == inside_columns)[:, None]
        picked = picked * inside[:, None]
    return picked


def random_cut(width: int, height: int, generator: torch.Generator) -> Box:
    """A random part of a picture, as (left, upper, right, lower) in pixels.

    Area and shape are drawn until they fit; after that, the largest middle part whose shape is
    within bounds.
    """
    for _ in range(_CUT_TRIES):
        draw = torch.rand(4, generator=generator).tolist()
        area = width * height * _between(*_CUT_AREA, draw[0])
        ratio = math.exp(_between(math.log(_CUT_RATIO[0]), math.log(_CUT_RATIO[1]), draw[1]))
        cut_width, cut_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if cut_width <= width and cut_height <= height:
            left, upper = draw[2] * (width - cut_width), draw[3] * (height - cut_height)
            return _within(left, upper, cut_width, cut_height, width, height)
    cut_width = min(width, height * _CUT_RATIO[1])
    cut_height = min(height, width / _CUT_RATIO[0])
    left, upper = (width - cut_width) / 2, (height - cut_height) / 2
    return _within(left, upper, cut_width, cut_height, width, height)


def middle_cut(width: int, height: int, resize: int, size: int) -> Box:
    """The middle square that has ``size`` pixels once the shorter side has ``resize``."""
    side = min(width, height) * size / resize
    return _within((width - side) / 2, (height - side) / 2, side, side, width, height)


def _within(
    left: float, upper: float, cut_width: float, cut_height: float, width: int, height: int
) -> Box:
    """The box, not a rounding error beyond the picture."""
    return left, upper, min(left + cut_width, width), min(upper + cut_height, height)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
