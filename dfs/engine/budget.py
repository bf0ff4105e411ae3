"""Moving the cost of a frozen network at run time, without training it again.

A *tilt* moves the logits of every gate's choices: t > 0 takes t * (bits/widest)^2 from each, in
proportion to its cost, and makes decisions cheaper; t < 0 adds -t * bits/widest and makes them
dearer; 0 leaves them as they were trained. Going down by cost turns 8 bits into 4 and 2 before it
turns anything into skips: for a ResNet-14 trained on digits to a cost of 4 %, it kept 80.7 % of 540
images right at 0.5 %, 88.7 at 1 % and 92.4 at 1.5 %, where going down by bits kept 64.1, 84.1 and
90.6; at 2.5 % it was 96.3 against 95.0, and the same from 3.5 % on. A network trained to 1 % kept
87.6 % instead of 79.4 at 0.25 %, and the same above. Training tilts its gates alike
(:class:`dfs.train.calibrate.CostTilt`).

What a tilt costs depends on the images, so it is measured on some that the network has not been
trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# It moves even 2 bits, of 32, by 4096: a logit of any gate that was trained is drowned.
_LARGEST_TILT = 2.0**20
# Images whose latency is measured one by one.
_TIMED_IMAGES = 200
_BISECTIONS = 20
_FEWEST_POINTS = 2


@dataclass(frozen=True)
class BudgetPoint:
    """One setting of the gates.

    Attributes:
        tilt: see the module.
        cost: mean over images and gated blocks of (bits/32)^2.
        accuracy: share of images classified as labelled; None without labels.
        p50, p99: milliseconds for one image at a time.
    """

    tilt: float
    cost: float
    accuracy: float | None
    p50: float
    p99: float


@dataclass(frozen=True)
class BudgetCurve:
    """Settings in ascending order of cost, their tilts descending."""

    points: tuple[BudgetPoint, ...]

    def __post_init__(self) -> None:
        if len(self.points) < _FEWEST_POINTS:
            raise ValueError(f"a budget curve needs {_FEWEST_POINTS} points, got {self.points}")
        for low, high in pairwise(self.points):
            if not (low.cost < high.cost and low.tilt > high.tilt):
                raise ValueError("a budget curve must ascend in cost and descend in tilt")

    @property
    def attainable(self) -> tuple[float, float]:
        """The least and the largest cost."""
        return self.points[0].cost, self.points[-1].cost

    def tilt_for(self, cost: float) -> float:
        """The tilt for a cost, interpolated between the points measured.

        Raises:
            ValueError: the cost can't be attained; says the range.
        """
        least, most = self.attainable
        if not least <= cost <= most:
            raise ValueError(f"cost must lie in [{least:.5f}, {most:.5f}], got {cost}")
        for low, high in pairwise(self.points):
            if cost <= high.cost:
                share = (cost - low.cost) / (high.cost - low.cost)
                return low.tilt + share * (high.tilt - low.tilt)
        return self.points[-1].tilt

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(point) for point in self.points]

    @staticmethod
    def from_json(data: Any) -> BudgetCurve:
        """Undo :meth:`to_json`; ValueError for anything else."""
        fields = set(BudgetPoint.__annotations__)
        if not isinstance(data, list):
            raise ValueError(f"a budget curve must be a list, got {type(data).__name__}")
        for point in data:
            if not isinstance(point, dict) or set(point) != fields:
                raise ValueError(f"a point of a budget curve must have {sorted(fields)}")
            for name, value in point.items():
                optional = name == "accuracy" and value is None
                if not optional and not _is_finite_number(value):
                    raise ValueError(
                        f"{name} of a budget curve must be a finite number, got {value!s:.20}"
                    )
        return BudgetCurve(tuple(BudgetPoint(**point) for point in data))


def _is_finite_number(value: Any) -> bool:
    """Whether it is an int or float that float64 can hold."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def tilted_bias(bias: Tensor, choices: Sequence[int], tilt: float) -> Tensor:
    """The choices' biases, float64, under a tilt."""
    share = torch.tensor(choices, dtype=torch.float64) / max(choices)
    return bias - tilt * (share.square() if tilt > 0 else share)


# From a tilt and images to logits and cost per image.
Run = Callable[[float, Tensor], tuple[Tensor, Tensor]]


def measure_curve(run: Run, images: Tensor, labels: Tensor | None, points: int) -> BudgetCurve:
    """The curve of a network on some images, of at most ``points`` points evenly spaced in cost.

    Raises:
        ValueError: the cost does not depend on the gates' biases.
    """
    known: dict[float, float] = {}

    def cost_of(tilt: float) -> float:
        if tilt not in known:
            known[tilt] = float(run(tilt, images)[1].mean())
        return known[tilt]

    ends = [_saturated(cost_of, sign) for sign in (1.0, -1.0)]
    least, most = (cost_of(tilt) for tilt in ends)
    if not least < most:
        raise ValueError(f"every budget costs {least:.5f}: the gates' biases change nothing")
    for i in range(1, points - 1):
        wanted = least + (most - least) * i / (points - 1)
        _bisect(cost_of, wanted, ends[0], ends[1])
    chosen = _evenly_spaced(known, points)
    return BudgetCurve(tuple(_measured(run, tilt, images, labels) for tilt in chosen))


def _saturated(cost_of: Callable[[float], float], sign: float) -> float:
    """The smallest tilt of that sign, among powers of two, from which on the cost stays."""
    tilt = _LARGEST_TILT
    while tilt > 1 and cost_of(sign * tilt / 2) == cost_of(sign * tilt):
        tilt /= 2
    return sign * tilt


def _bisect(cost_of: Callable[[float], float], wanted: float, cheap: float, dear: float) -> None:
    """Try tilts between two ends until one is close to the cost wanted."""
    span = abs(cost_of(dear) - cost_of(cheap))
    for _ in range(_BISECTIONS):
        middle = (cheap + dear) / 2
        found = cost_of(middle)
        if abs(found - wanted) < 0.01 * span:
            return
        if found < wanted:
            cheap = middle
        else:
            dear = middle


def _evenly_spaced(known: dict[float, float], points: int) -> list[float]:
    """Tilts whose costs ascend strictly, the nearest to each of ``points`` costs."""
    ascending: list[tuple[float, float]] = []
    for tilt in sorted(known, reverse=True):
        if not ascending or known[tilt] > ascending[-1][1]:
            ascending.append((tilt, known[tilt]))
    least, most = ascending[0][1], ascending[-1][1]
    wanted = [least + (most - least) * i / (points - 1) for i in range(points)]
    nearest: set[float] = set()
    for cost in wanted:
        distances = [(abs(known - cost), tilt) for tilt, known in ascending]
        nearest.add(min(distances)[1])
    return sorted(nearest, reverse=True)


def _measured(run: Run, tilt: float, images: Tensor, labels: Tensor | None) -> BudgetPoint:
    logits, cost = run(tilt, images)
    accuracy = None if labels is None else float((logits.argmax(1) == labels).double().mean())
    times = []
    for n in range(min(len(images), _TIMED_IMAGES)):
        start = time.perf_counter()
        run(tilt, images[n : n + 1])
        times.append(1e3 * (time.perf_counter() - start))
    p50, p99 = torch.tensor(times).quantile(torch.tensor([0.5, 0.99])).tolist()
    return BudgetPoint(tilt, float(cost.mean()), accuracy, p50, p99)
