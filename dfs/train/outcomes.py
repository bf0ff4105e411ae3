"""Which test images networks get right, and whether one network is better than another.

Networks are compared image by image: what is hard for one is mostly hard for the other too, so
that the difference of two accuracies is known far better than either of them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 2000
_CONFIDENCE = 0.95


def encode_outcomes(correct: Tensor) -> str:
    """Bools (N,) as text: eight to a byte, the first in the highest bit, in base 64."""
    return base64.b64encode(np.packbits(correct.cpu().numpy()).tobytes()).decode()


def decode_outcomes(text: str, count: int) -> Tensor:
    """The bools that :func:`encode_outcomes` wrote; ValueError if they are not ``count``."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"count is {count}, the text holds {len(packed)} bytes of outcomes")
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))


@dataclass(frozen=True)
class Difference:
    """How much more accurate one network is than another, in fractions.

    Attributes:
        low, high: of the 95 % interval of the paired bootstrap over seeds and images.
    """

    mean: float
    low: float
    high: float


def paired_difference(
    own: Sequence[Tensor], other: Sequence[Tensor], rounds: int = _ROUNDS, seed: int = 0
) -> Difference:
    """Compare two methods on the same images.

    Every round draws seeds and images with replacement, the same for both methods (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentile intervals).

    Args:
        own, other: per seed, whether each image (N,) was classified rightly.

    Raises:
        ValueError: there is no seed, or their numbers or those of the images differ.
    """
    if not own or len(own) != len(other):
        raise ValueError(f"other must have the {len(own)} seeds of own, at least one")
    if len({len(correct) for correct in (*own, *other)}) != 1:
        raise ValueError("own and other must be of the same images")
    differences = torch.stack(list(own)).double() - torch.stack(list(other)).double()
    seeds, images = differences.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(rounds, dtype=torch.float64)
    for i in range(rounds):
        some = torch.randint(seeds, (seeds,), generator=generator)
        chosen = torch.randint(images, (images,), generator=generator)
        drawn[i] = differences[some].mean(0)[chosen].mean()
    tail = (1 - _CONFIDENCE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference(float(differences.mean()), low, high)
