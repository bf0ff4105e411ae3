"""Times contestants in turns, so that a noisy machine is noisy for all of them.

A ratio is taken within each round, between neighbours in time, and the median of the rounds is
what counts: drifts of the clock cancel, and a round that was disturbed is one outlier.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDS = 15
# A contestant's turn in a round lasts about this long by default, however short its calls are.
_TURN_SECONDS = 1e-3
# The worker threads of PyTorch's OpenMP spin for up to 10 ms after a call (measured: the process's
# time on the processor while it sleeps). Whoever came next would share the cores with them.
_PAUSE_SECONDS = 0.015


@dataclass(frozen=True)
class Spread:
    """The median of some rounds and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def per_round(
    times: Sequence[Sequence[float]], statistic: Callable[[Sequence[float]], float]
) -> list[float]:
    """A statistic of the contestants' times in each round.

    Args:
        times: of each contestant in each round, as :func:`interleave` gives them.
        statistic: of one round's times, in the order of the contestants.
    """
    return [statistic(values) for values in zip(*times, strict=True)]


def interleave(
    calls: Sequence[Callable[[], Any]],
    *,
    threads: int,
    rounds: int = ROUNDS,
    turn_seconds: float = _TURN_SECONDS,
) -> list[list[float]]:
    """Seconds per call of each contestant in each round: A B A B and so on.

    Args:
        threads: with more than one, every turn starts with a pause and an untimed call, which
            wakes the contestant's own threads.
        turn_seconds: how long a turn lasts about, of one call at least.
    """
    turns = [_turn(call, _calls_per_turn(call, turn_seconds), threads) for call in calls]
    return take_turns(turns, rounds)


def take_turns(turns: Sequence[Callable[[], float]], rounds: int = ROUNDS) -> list[list[float]]:
    """What each turn gives in each round, such as the seconds of a call."""
    times: list[list[float]] = [[] for _ in turns]
    for _ in range(rounds):
        for turn, seconds in zip(turns, times, strict=True):
            seconds.append(turn())
    return times


def _turn(call: Callable[[], Any], count: int, threads: int) -> Callable[[], float]:
    def turn() -> float:
        if threads > 1:
            time.sleep(_PAUSE_SECONDS)
            call()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    return turn


def _calls_per_turn(call: Callable[[], Any], turn_seconds: float) -> int:
    call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return max(1, round(turn_seconds / max(seconds, 1e-7)))
