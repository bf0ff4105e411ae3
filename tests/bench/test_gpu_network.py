"""Whole networks on a GPU: how their bar is judged and reported, and what the static twin is."""

from __future__ import annotations

import pytest
import torch

from bench.engine_contestants import dynamic_network, images, static_network
from bench.gpu import results
from bench.gpu.network import CONTESTANTS, SPREAD, NetworkTimes, _folded, bar_info


def times(batch: int, **seconds: float) -> NetworkTimes:
    return NetworkTimes(batch, {name: [seconds.get(name, 1.0)] * 3 for name in CONTESTANTS})


@pytest.mark.parametrize(
    ("spread", "gates", "ratio", "held"),
    [(0.3, 1.2, 0.5, True), (0.31, 1.2, 0.51, False), (0.5, 0.9, 0.5, True)],
)
def test_the_bar_counts_what_the_gates_take(
    spread: float, gates: float, ratio: float, held: bool
) -> None:
    found = times(1024, engine_spread=spread, engine_gates=gates, engine_8=1.0).verdict()
    assert found is not None
    assert found.ratio.median == pytest.approx(ratio)
    assert found.held == held
    assert times(64).verdict() is None


def test_results_and_table_have_all_contestants() -> None:
    measured = times(1024, engine_spread=0.25)
    verdict = measured.verdict()
    assert verdict is not None
    info = {
        "kind": "gpu_network",
        "points": measured.points(),
        "bars": [bar_info(1024, verdict)],
    }
    run = {"machine_info": {"gpu": {"name": "H1"}}, "benchmarks": [{"extra_info": info}]}
    content = results.of_benchmarks([run])
    assert [point["contestant"] for point in content["networks"]] == list(CONTESTANTS)
    assert content["bars"][0]["bar"] == SPREAD.name
    table = results.table({**content, "commit": {"id": "0123456789", "dirty": False}})
    assert "ResNet-74 batch 1024" in table
    assert "engine_spread 250000" in table
    assert "1 of 1 bars held" in table


def test_the_static_twin_is_the_same_with_its_batchnorms_folded() -> None:
    network, x = static_network(8).model, images(2)
    folded = _folded(network)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)


def test_gates_that_are_timed_choose_one_width() -> None:
    decided = dynamic_network(8, 8).run(images(2)).bits
    assert bool((decided == 8).all())
