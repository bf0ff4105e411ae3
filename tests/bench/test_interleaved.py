"""Turns and the statistics of their ratios, on a clock of our own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import interleaved
from bench.interleaved import Spread, interleave, per_round, spread


class Clock:
    """Time that passes only when a contestant works or somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.log.append("pause")

    def contestant(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(interleaved, "time", clock)
    return clock


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0)


def test_one_disturbed_round_does_not_move_the_median_much() -> None:
    assert spread([1.0, 1.0, 1.0, 1.0, 900.0]).median == 1.0


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slows down tenfold half way; the ratio of the medians would be 0.55.
    ours, theirs = [1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0]
    assert per_round([ours, theirs], lambda t: t[0] / t[1]) == [0.5, 0.5, 0.5, 0.5]


def test_rounds_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        per_round([[1.0, 2.0], [1.0]], sum)


def test_contestants_take_turns(clock: Clock) -> None:
    calls = [clock.contestant("a", 0.5), clock.contestant("b", 0.25)]
    times = interleave(calls, threads=1, rounds=3)
    assert times == [[0.5] * 3, [0.25] * 3]
    # Two calls each tell how many make a turn.
    assert clock.log == ["a", "a", "b", "b"] + ["a", "b"] * 3


def test_short_calls_are_repeated_within_a_turn(clock: Clock) -> None:
    (seconds,) = interleave([clock.contestant("a", 1e-4)], threads=1, rounds=2)
    assert seconds == pytest.approx([1e-4, 1e-4])
    assert clock.log == ["a"] * (2 + 2 * 10)


def test_with_threads_each_turn_starts_with_a_pause_and_an_untimed_call(clock: Clock) -> None:
    calls = [clock.contestant("a", 0.5), clock.contestant("b", 0.25)]
    times = interleave(calls, threads=2, rounds=2)
    assert times == [[0.5] * 2, [0.25] * 2]
    assert clock.log[4:] == ["pause", "a", "a", "pause", "b", "b"] * 2
