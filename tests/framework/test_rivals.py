from __future__ import annotations

import pytest
import torch

from dfs.report import compare_with_rivals
from dfs.train.outcomes import encode_outcomes


def _result(label: str, wrong: int, cost: float, **more: object) -> dict[str, object]:
    correct = torch.arange(1000) >= wrong
    return {
        "milliseconds_per_image": 0.5,
        "bitops": cost,
        "latency": None,
        "method": "dfs" if label == "DFS" else "static8",
        "label": label,
        "target": 0.02 if label == "DFS" else None,
        "seed": 0,
        "accuracy": 1 - wrong / 1000,
        "paper_cost": cost,
        "images": 1000,
        "outcomes": encode_outcomes(correct),
        **more,
    }


def test_the_best_rival_is_the_most_accurate_that_costs_no_more() -> None:
    results = [
        _result("DFS", 100, 0.02, engine_1=0.3),
        _result("cheap", 150, 0.01, engine_1=0.4),
        _result("near", 120, 0.0203, engine_1=0.2),
        _result("dear", 50, 0.021, engine_1=0.29),
        _result("not timed", 10, 0.5),
    ]
    by_cost, by_time = compare_with_rivals(results, ("paper_cost", "engine_1"))
    assert (by_cost.name, by_cost.rival) == ("DFS, 2.00%", "near")
    assert by_cost.difference.mean == pytest.approx(0.02)
    assert by_cost.difference.low > 0
    assert (by_time.rival, by_time.rival_cost) == ("dear", 0.29)
    assert by_time.difference.mean == pytest.approx(-0.05)
    assert by_time.difference.high < 0


def test_only_the_same_seeds_are_compared() -> None:
    results = [_result("DFS", 100, 0.02), _result("other", 100, 0.01, seed=1)]
    assert compare_with_rivals(results, ("paper_cost",)) == []
    without = [{k: v for k, v in r.items() if k != "outcomes"} for r in results]
    assert compare_with_rivals(without, ("paper_cost",)) == []
