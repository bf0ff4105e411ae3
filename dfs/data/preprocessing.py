"""What is done to an image before a network sees it: a record that travels with checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

# A file that asks for more is not to be believed.
_LARGEST_SIDE = 1 << 14


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a network's input, and what its outputs are called.

    A picture is scaled so that its shorter side has ``resize`` pixels, the middle square of
    ``size`` pixels is cut out, and channel c becomes (value / 255 - mean[c]) / std[c].

    Attributes:
        size: side of the input in pixels.
        resize: shorter side before cutting, at least ``size``.
        mean, std: per channel, of values in [0, 1]; one entry is grey, three are RGB.
        class_names: in the order of the logits.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize <= _LARGEST_SIDE:
            raise ValueError(
                f"preprocessing: size must be positive and at most resize, and that at most "
                f"{_LARGEST_SIDE}, got {self.size} and {str(self.resize)[:20]}"
            )
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(
                f"preprocessing: mean and std must have one entry or three, "
                f"got {self.mean} and {self.std}"
            )
        finite = all(math.isfinite(v) for v in (*self.mean, *self.std))
        if not finite or min(self.std) <= 0:
            raise ValueError(f"preprocessing: std must be positive, got {self.std}")
        if not self.class_names:
            raise ValueError("preprocessing: class_names must not be empty")

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, H, W) as a network's input, float32 of the same shape and device."""
        statistics = torch.tensor([self.mean, self.std]).to(pixels.device, non_blocking=True)
        mean, std = statistics[:, :, None, None]
        return pixels.float().div_(255).sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: object) -> Preprocessing:
        """Rebuild from plain values; ValueError says what is wrong with them."""
        known = {f.name for f in fields(Preprocessing)}
        if not isinstance(values, Mapping) or set(values) != known:
            raise ValueError(f"preprocessing must have the entries {sorted(known)}, got {values!r}")
        kinds = {"mean": float, "std": float, "class_names": str}
        plain: dict[str, Any] = {}
        for name, value in values.items():
            if name in kinds:
                right = isinstance(value, (list, tuple))
                right = right and all(isinstance(v, kinds[name]) for v in value)
                value = tuple(value) if right else value
            else:
                right = type(value) is int
            if not right:
                raise ValueError(f"preprocessing: {name} can't be {value!r}")
            plain[name] = value
        return Preprocessing(**plain)


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of values in [0, 1].

    Exact integer sums, so that every machine finds the same.

    Args:
        pixels: uint8 (N, C, H, W).
    """
    levels = torch.arange(256)
    means, deviations = [], []
    for channel in pixels.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256)
        total, count = int((counts * levels).sum()), int(counts.sum())
        squares = int((counts * levels * levels).sum())
        mean = total / count
        means.append(mean / 255)
        # A set of one flat colour is divided by one level, not by nothing.
        deviations.append(max(math.sqrt(max(squares / count - mean * mean, 0.0)), 1.0) / 255)
    return tuple(means), tuple(deviations)
