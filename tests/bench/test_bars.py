"""How bars are judged, and where they apply; nothing is timed."""

from __future__ import annotations

from collections import Counter

import pytest

from bench import bars
from bench.bars import BARS, Case, Result, cases
from bench.interleaved import Spread
from bench.layers import LAYERS


def case(result: Result, limit: float = 1.0) -> Case:
    return Case(bars.INT8, limit, LAYERS[0], 64, lambda layer, batch, threads: result)


@pytest.mark.parametrize(
    ("median", "enough_of_the_peak", "held"),
    [(0.99, False, True), (1.0, False, True), (1.01, False, False), (1.01, True, True)],
)
def test_a_bar_holds_up_to_its_limit_or_near_the_peak(
    median: float, enough_of_the_peak: bool, held: bool
) -> None:
    verdict = case(Result(Spread(median, 0.5, 1.5), {}, enough_of_the_peak)).measure(threads=1)
    assert verdict.held == held
    assert (verdict.ratio.median, verdict.limit) == (median, 1.0)


def test_the_cost_of_a_skipped_sample_is_what_it_adds() -> None:
    # 4 samples in 8 ms; 60 skipped ones add 1.2 ms, so each 0.02 ms, 1 % of 2 ms.
    statistic = bars._marginal(64)
    assert statistic([9.2, 8.0]) == pytest.approx(0.01)


def test_every_bar_has_cases_and_no_case_comes_twice() -> None:
    found = Counter((c.bar.name, c.layer.name, c.batch) for c in cases())
    assert {name for name, _, _ in found} == {bar.name for bar in BARS}
    assert set(found.values()) == {1}


def test_two_bits_are_held_to_half_the_time_from_64x56x56_on() -> None:
    limits = {c.layer.name: c.limit for c in cases() if c.bar is bars.TWO_BITS}
    assert limits["16x32x32"] == limits["64x8x8"] == 0.62
    assert limits["64x56x56"] == limits["512x7x7"] == 0.5
    assert "96x28x28-depthwise" not in limits


def test_int8_is_compared_up_to_256x14x14() -> None:
    names = {c.layer.name for c in cases() if c.bar is bars.INT8}
    assert names == {"16x32x32", "32x16x16", "64x8x8", "64x56x56", "128x28x28", "256x14x14"}
