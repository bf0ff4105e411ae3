"""Which test images networks get right, and whether one network is better than another.

Networks are compared image by image: what is hard for one is mostly hard for the other too, so
that the difference of two accuracies is known far better than either of them.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 2000
_CONFIDENCE = 0.95
# A rival may take this much more and still counts as taking no longer: costs are measured.
_TOLERANCE = 0.02
_OWN = "dfs"


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


@dataclass(frozen=True)
class Comparison:
    """A dynamic network beside the most accurate rival that costs no more.

    Attributes:
        name, rival: with their targets.
        measure: of the cost, a name of :class:`dfs.report.summary.SummaryRow`.
        cost, rival_cost: means over the seeds.
    """

    name: str
    rival: str
    measure: str
    cost: float
    rival_cost: float
    difference: Difference


def compare_with_rivals(
    results: Sequence[dict[str, Any]], measures: Sequence[str]
) -> list[Comparison]:
    """Every dynamic network beside its best rival by each measure of cost.

    Args:
        results: of :meth:`dfs.train.sweep.Sweep.results`; those without recorded outcomes or a
            cost are left out.
        measures: names of costs.
    """
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for result in results:
        if "outcomes" in result:
            groups.setdefault((result["label"], result["target"]), []).append(result)
    own = {key: group for key, group in groups.items() if group[0]["method"] == _OWN}
    others = {key: group for key, group in groups.items() if key not in own}
    found = []
    for measure in measures:
        for key, group in own.items():
            cost = _mean(group, measure)
            seeds = _outcomes_by_seed(group)
            rivals = [
                (accuracy, rival)
                for rival, theirs in others.items()
                if (accuracy := _mean(theirs, "accuracy")) is not None
                and _outcomes_by_seed(theirs).keys() == seeds.keys()
                and _within(_mean(theirs, measure), cost)
            ]
            if cost is None or not rivals:
                continue
            rival = max(rivals, key=lambda r: r[0])[1]
            theirs = _outcomes_by_seed(others[rival])
            difference = paired_difference(
                [seeds[seed] for seed in sorted(seeds)], [theirs[seed] for seed in sorted(seeds)]
            )
            rival_cost = _mean(others[rival], measure)
            assert rival_cost is not None
            found.append(
                Comparison(_name(key), _name(rival), measure, cost, rival_cost, difference)
            )
    return found


def _within(cost: float | None, limit: float | None) -> bool:
    return cost is not None and limit is not None and cost <= limit * (1 + _TOLERANCE)


def _mean(group: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [result.get(name) for result in group]
    return None if None in values else float(np.mean(values))  # type: ignore[arg-type]


def _outcomes_by_seed(group: Sequence[dict[str, Any]]) -> dict[int, Tensor]:
    return {r["seed"]: decode_outcomes(r["outcomes"], r["images"]) for r in group}


def _name(key: tuple[str, float | None]) -> str:
    label, target = key
    return label if target is None else f"{label}, {target:.2%}"
