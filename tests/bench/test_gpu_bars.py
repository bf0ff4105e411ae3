"""Where the GPU bars apply, how they are judged, and what turns they take; nothing is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.gpu import bars, prepared
from bench.gpu.bars import BARS, GpuCase, Measured, cases
from bench.gpu.prepared import GpuPrepared, calls_to_record
from bench.gpu.roofline import Peaks, Work
from bench.layers import GPU_LAYERS
from bench.prepared import Prepared
from bench.verdicts import verdict_line


def case(figure: float, limit: float, at_least: bool) -> GpuCase:
    measured = Measured([figure] * 3, {"seconds": [1.0]})
    return GpuCase(
        bars.CUDNN, limit, at_least, GPU_LAYERS[0], 64, "triton", lambda *_: lambda: measured
    )


@pytest.mark.parametrize(
    ("figure", "at_least", "held"),
    [(0.6, False, True), (0.61, False, False), (0.6, True, True), (0.59, True, False)],
)
def test_a_limit_is_the_most_or_the_least_that_holds(
    figure: float, at_least: bool, held: bool
) -> None:
    verdict = case(figure, 0.6, at_least).prepare()()
    assert verdict.held == held
    assert (verdict.ratio.median, verdict.details) == (figure, {"seconds": [1.0]})


def test_every_bar_has_cases_and_no_case_comes_twice() -> None:
    names = Counter(c.name for c in cases())
    assert set(names.values()) == {1}
    assert {c.bar for c in cases()} == set(BARS)


def limits(bar: Any) -> dict[tuple[str, int], float]:
    return {(c.layer.name, c.batch): c.limit for c in cases() if c.bar is bar}


def test_limits_are_those_that_were_set() -> None:
    imagenet = ("64x56x56", "128x28x28", "256x14x14", "512x7x7")
    assert limits(bars.CUDNN) == {
        ("16x32x32", 1024): 0.6,
        ("32x16x16", 1024): 0.6,
        **{(name, 64): 1.0 for name in imagenet},
    }
    assert limits(bars.ROOFLINE) == {
        ("16x32x32", 1024): 0.6,
        ("32x16x16", 1024): 0.6,
        ("64x8x8", 1024): 0.4,
        **{(name, 64): 0.5 for name in imagenet},
    }
    assert limits(bars.BEST_ROOFLINE) == {("16x32x32", 1024): 0.75, ("32x16x16", 1024): 0.75}
    assert limits(bars.TWO_BITS) == {("16x32x32", 1024): 0.8}
    assert limits(bars.QUANTIZE) == {("16x32x32", 1024): 0.85}
    assert set(limits(bars.SKIPPED).values()) == {5.0}
    assert set(limits(bars.MIXED).values()) == {1.15}
    assert limits(bars.BLOCK) == {
        ("16x32x32", 1): 12.0,
        ("32x16x16", 1): 12.0,
        ("64x8x8", 1): 12.0,
    }


def test_what_has_to_be_reached_is_a_fraction_or_rate() -> None:
    at_least = {c.bar for c in cases() if c.at_least}
    assert at_least == {bars.ROOFLINE, bars.BEST_ROOFLINE, bars.QUANTIZE}


class Machine:
    """A GPU on which a call takes what it says, as long as it is recorded."""

    device = torch.device("cpu")
    unrecorded_seconds = 1e-3

    def __init__(self) -> None:
        self.recorded: list[int] = []

    def record(self, call: Callable[[], Any], count: int) -> Callable[[], Any]:
        self.recorded.append(count)
        return lambda: sum(call() for _ in range(count))

    def seconds(self, replay: Callable[[], Any], repeats: int) -> float:
        return sum(replay() or self.unrecorded_seconds for _ in range(repeats))

    def release(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    gpu = Machine()
    monkeypatch.setattr(prepared, "machine", lambda: gpu)
    monkeypatch.setattr(bars, "measured_peaks", lambda: Peaks(copy=1e12, int8=1e15))
    return gpu


def contestant(seconds: float, work: Work | None = None, copies: int = 1) -> GpuPrepared:
    return GpuPrepared(Prepared(lambda: seconds, lambda: None, copies), work)


def measure(monkeypatch: pytest.MonkeyPatch, comparison: Any, **found: GpuPrepared) -> float:
    """A comparison's figure, with contestants of our own."""
    monkeypatch.setattr(bars, "prepare", lambda name, layer, batch: found[name])
    return float(comparison(GPU_LAYERS[0], 64, "triton")().rounds[0])


def test_a_turn_gives_the_seconds_of_one_recorded_call(gpu: Machine) -> None:
    turn = contestant(3e-6, copies=3).turn()
    assert turn() == pytest.approx(3e-6)
    assert gpu.recorded == [9]  # 8 ms of calls that take 1 ms unrecorded, in whole laps


@pytest.mark.parametrize(
    ("seconds", "copies", "count"),
    [(1e-6, 1, 64), (1e-3, 1, 8), (1.0, 1, 2), (1e-6, 100, 100), (1e-6, 7, 70), (1.0, 5, 5)],
)
def test_recordings_hold_whole_laps_and_neither_too_few_nor_too_many_calls(
    seconds: float, copies: int, count: int
) -> None:
    assert calls_to_record(seconds, copies) == count


def test_the_best_of_cudnn_is_what_is_beaten(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = measure(
        monkeypatch,
        bars._beside_cudnn,
        triton_8=contestant(6e-6),
        cudnn_bf16=contestant(30e-6),
        cudnn_bf16_channels_last=contestant(10e-6),
        cudnn_bf16_channels_last_fused=contestant(12e-6),
    )
    assert ratio == pytest.approx(0.6)


def test_a_fraction_is_that_of_the_rooflines_time(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 MB at 1 TB/s are 3 us, 1e9 operations at 1e15 a second 1 us.
    own = contestant(4e-6, Work(3_000_000, 1_000_000_000))
    fraction = measure(monkeypatch, bars._fraction("8"), triton_8=own)
    assert fraction == pytest.approx(0.75)


def test_skipping_is_told_in_microseconds(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(monkeypatch, bars._skipped, triton_skipped=contestant(4e-6))
    assert found == pytest.approx(4.0)


def test_a_line_says_whether_the_limit_lies_within_the_rounds() -> None:
    outcome = {
        "ratio": 0.62, "low": 0.55, "high": 0.65, "limit": 0.6, "at_least": True, "held": True,
        "label": "8 bits, fraction of the roofline", "layer": "64x8x8", "batch": 64,
        "implementation": "triton",
    }  # fmt: skip
    assert verdict_line(outcome) == (
        "held  ?   0.620 >= 0.6   [0.550 to 0.650]  "
        "8 bits, fraction of the roofline, 64x8x8 batch 64, triton"
    )
    missed = verdict_line({**outcome, "ratio": 0.5, "low": 0.5, "high": 0.5, "held": False})
    assert missed.startswith("MISSED    0.500 >= 0.6 ")
