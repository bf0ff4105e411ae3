"""How the engine's bars are computed, and where they apply; nothing that counts is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from bench import engine_bars
from bench.engine_bars import Measured, engine_cases, times_of
from bench.engine_contestants import CHOICES, engine, images, spread_policy
from bench.prepared import Unavailable


def test_no_case_comes_twice_and_each_bar_is_judged_on_both_networks() -> None:
    found = Counter((c.bar.name, c.network, c.batch, c.threads) for c in engine_cases())
    assert set(found.values()) == {1}
    by_network = Counter((name, network) for name, network, _, _ in found)
    for bar, count in (("int8", 4), ("two_bits", 4), ("spread", 4), ("spread_eager", 2)):
        assert by_network[f"engine_{bar}", "ResNet-38"] == count
        assert by_network[f"engine_{bar}", "ResNet-74"] == count
    for bar in ("skipped", "gates", "overhead", "memory", "linear_batch"):
        assert by_network[f"engine_{bar}", "ResNet-74"] >= 1


def test_decisions_are_spread_evenly() -> None:
    policy = spread_policy(16, 17)
    for row in policy:
        counts = [int((row == width).sum()) for width in CHOICES]
        assert sorted(counts) == [4, 4, 4, 5]
    assert {int((policy == width).sum()) for width in CHOICES} == {68}
    assert len(policy.unique(dim=0)) == 16


def test_openvino_counts_by_its_faster_hint_and_a_missing_peer_says_why() -> None:
    times = {"openvino_int8": [3.0, 1.0, 3.0], "openvino_int8_streams": [2.0, 2.0, 2.0]}
    measured = Measured(times, {"torch_compile": "no compiler"})
    assert times_of(measured, "openvino_int8") == [2.0, 2.0, 2.0]
    with pytest.raises(Unavailable, match="no compiler"):
        times_of(measured, "torch_compile")


def test_a_comparison_divides_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured({"dfs_8": [1.0, 2.0, 9.0], "openvino_int8": [2.0, 2.0, 10.0]}, {})
    monkeypatch.setattr(engine_bars, "measure", lambda *at: measured)
    assert engine_bars._compare("dfs_8", "openvino_int8", 38, 1, 1).ratio.median == 0.9


def test_distance_from_a_line_is_in_tenths_of_it() -> None:
    straight = [0.5 + 0.01 * depth for depth in engine_bars._DEPTHS_OF_LINEARITY]
    assert engine_bars._off_the_line(straight) == pytest.approx(0, abs=1e-9)
    bent = [*straight[:-1], 1.5 * straight[-1]]
    assert engine_bars._off_the_line(bent) > 1


@pytest.mark.parametrize(
    "bar", [engine_bars._skipped, engine_bars._gates], ids=["skipped", "gates"]
)
def test_bars_from_a_profile_run(
    bar: Callable[[int, int], engine_bars.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_bars, "_ROUNDS", 2)
    assert bar(8, 1).ratio.median > 0


def test_weights_are_held_to_their_packed_bytes() -> None:
    result = engine_bars._memory(8)
    packed = sum(layer.layout.offsets()[-1] for layer in engine(8).graph.layers())
    assert result.details["packed_bytes"] == packed
    assert result.ratio.median == engine(8).weight_bytes() / packed


def test_favoured_widths_are_what_gates_decide() -> None:
    for width in (0, 8):
        assert bool((engine(8, favoured=width)(images(3)).bits == width).all())
    assert len(torch.unique(engine(38)(images(16)).bits)) == len(CHOICES)
