"""Dynamic networks beside the best of all others that cost no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dfs.report.summary import SummaryRow, grouped, summarise
from dfs.train.outcomes import Difference, decode_outcomes, paired_difference

MEASURES = ("paper_cost", "bitops", "engine_1", "engine_64")
# A rival may cost this much more and still counts as costing no more: times are measured.
_TOLERANCE = 0.02
_OWN = "dfs"


@dataclass(frozen=True)
class Comparison:
    """A dynamic network beside the most accurate rival that costs no more.

    Attributes:
        name, rival: with their targets.
        measure: of the cost, out of ``MEASURES``.
        cost, rival_cost: means over the seeds.
    """

    name: str
    rival: str
    measure: str
    cost: float
    rival_cost: float
    difference: Difference


def compare_with_rivals(
    results: Sequence[dict[str, Any]], measures: Sequence[str] = MEASURES
) -> list[Comparison]:
    """Every dynamic network beside its best rival of the same seeds, by each measure of cost.

    Args:
        results: of :meth:`dfs.train.sweep.Sweep.results`; those without recorded outcomes or a
            cost are left out.
    """
    known = [result for result in results if "outcomes" in result]
    networks = list(zip(summarise(known), map(_by_seed, grouped(known).values()), strict=True))
    found = []
    for measure in measures:
        for row, own in networks:
            cost = getattr(row, measure)
            if row.method != _OWN or cost is None:
                continue
            rivals = [
                (rival, theirs)
                for rival, theirs in networks
                if rival.method != _OWN
                and theirs.keys() == own.keys()
                and _costs_at_most(rival, measure, cost)
            ]
            if rivals:
                rival, theirs = max(rivals, key=lambda one: one[0].accuracy or 0.0)
                difference = paired_difference(
                    [own[seed] for seed in sorted(own)], [theirs[seed] for seed in sorted(own)]
                )
                costs = (cost, getattr(rival, measure))
                found.append(Comparison(row.name, rival.name, measure, *costs, difference))
    return found


def _costs_at_most(row: SummaryRow, measure: str, limit: float) -> bool:
    cost = getattr(row, measure)
    return cost is not None and cost <= limit * (1 + _TOLERANCE)


def _by_seed(group: Sequence[dict[str, Any]]) -> dict[int, Tensor]:
    """Which images each seed's network got right."""
    return {r["seed"]: decode_outcomes(r["outcomes"], r["images"]) for r in group}
