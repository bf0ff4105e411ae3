"""The bars that the engine is held to, and how each is measured.

They were set for ResNet-38 and ResNet-74 for CIFAR on processors with AVX-512 VNNI and VBMI.
Contestants take turns (bench/interleaved.py); what is judged is the median of a ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.bars import Bar, Result, Verdict
from bench.engine_contestants import TURN_SECONDS, Measured, engine, images, measure
from bench.interleaved import Spread, interleave, per_round, spread, take_turns
from bench.prepared import Unavailable
from dfs import Engine

DEPTHS = (38, 74)
BATCHES = (1, 64)
THREADS = (1, 2)
_ROUNDS = 15
_CALLS_OF_A_TURN = 3
_BATCHES_OF_LINEARITY = (1, 2, 4, 16, 64, 256, 1024)
_DEPTHS_OF_LINEARITY = (20, 32, 38, 44, 56, 74, 110)
_ROUNDS_OF_LINEARITY = 7
_CALL_SECONDS = 20e-6
_SHARE_FOR_SKIPPING = 0.01

INT8 = Bar("engine_int8", "8 bits / OpenVINO int8")
TWO_BITS = Bar("engine_two_bits", "2 bits / 8 bits")
SPREAD = Bar("engine_spread", "0/2/4/8 spread evenly / OpenVINO int8")
SPREAD_EAGER = Bar("engine_spread_eager", "0/2/4/8 spread evenly / PyTorch eager float32")
SKIPPED = Bar("engine_skipped", "all skipped by the gates / ungated work, gates, 1 % of 8 bits")
GATES = Bar("engine_gates", "gates / 8 bits")
OVERHEAD = Bar("engine_overhead", "a call beyond the sum of its blocks / 20 microseconds")
MEMORY = Bar("engine_memory", "weights as held / packed bytes of their widths")
LINEAR_BATCH = Bar("engine_linear_batch", "largest / smallest time per image, batch 1 to 1024")
LINEAR_DEPTH = Bar("engine_linear_depth", "off a straight line, depth 20 to 110 / 10 %")


@dataclass(frozen=True)
class EngineCase:
    """A bar for one network, batch and number of threads.

    Attributes:
        network: what a report calls it.
        run: raises Unavailable if a contestant can't run here.
    """

    bar: Bar
    limit: float
    network: str
    batch: int
    threads: int
    run: Callable[[], Result]

    def measure(self) -> Verdict:
        result = self.run()
        held = result.ratio.median <= self.limit
        return Verdict(result.ratio, self.limit, held, result.details)


def engine_cases() -> Iterator[EngineCase]:
    """Every bar where it is judged."""
    for depth in DEPTHS:
        name = f"ResNet-{depth}"
        for batch in BATCHES:
            for threads in THREADS:
                at = (depth, batch, threads)
                for bar, limit, one, other in (
                    (INT8, 0.95, "dfs_8", "openvino_int8"),
                    (TWO_BITS, 0.70, "dfs_2", "dfs_8"),
                    (SPREAD, 0.68, "dfs_spread", "openvino_int8"),
                ):
                    run = partial(_compare, one, other, *at)
                    yield EngineCase(bar, limit, name, batch, threads, run)
                if batch == 1:
                    run = partial(_compare, "dfs_spread", "torch_eager", *at)
                    yield EngineCase(SPREAD_EAGER, 1 / 12, name, batch, threads, run)
            # What a profile is part of runs on one thread.
            yield EngineCase(SKIPPED, 1.0, name, batch, 1, partial(_skipped, depth, batch))
            yield EngineCase(GATES, 0.03, name, batch, 1, partial(_gates, depth, batch))
        yield EngineCase(OVERHEAD, 1.0, name, 1, 1, partial(_overhead, depth))
        yield EngineCase(MEMORY, 1.0, name, 1, 1, partial(_memory, depth))
        run = partial(_linear_in_batch, depth)
        yield EngineCase(LINEAR_BATCH, 1.1, name, max(_BATCHES_OF_LINEARITY), 1, run)
    for batch in BATCHES:
        run = partial(_linear_in_depth, batch)
        yield EngineCase(LINEAR_DEPTH, 1.0, "ResNet-20 to -110", batch, 1, run)


def times_of(measured: Measured, name: str) -> list[float]:
    """A contestant's seconds in each round; OpenVINO's int8 by the hint that is faster here.

    Raises:
        Unavailable: it could not run.
    """
    if name in measured.missing:
        raise Unavailable(measured.missing[name])
    variants = [measured.times[name]]
    streams = f"{name}_streams"
    if streams in measured.times:
        variants.append(measured.times[streams])
    return min(variants, key=statistics.median)


def _compare(one: str, other: str, depth: int, batch: int, threads: int) -> Result:
    measured = measure(depth, batch, threads)
    times = [times_of(measured, name) for name in (one, other)]
    seconds = {n: statistics.median(t) for n, t in zip((one, other), times, strict=True)}
    return Result(spread(per_round(times, lambda t: t[0] / t[1])), {"seconds": seconds})


def _skipped(depth: int, batch: int) -> Result:
    """The gates themselves decide to skip, since a forced decision would not run them."""
    skipping, at_8, x = engine(depth, favoured=0), engine(depth), images(batch)
    assert not bool(skipping(x).bits.any())
    turns: list[Callable[[], float]] = [
        partial(_seconds, lambda: skipping(x)),
        partial(_unavoidable_seconds, skipping, x),
        partial(_seconds, lambda: at_8(x, 8)),
    ]
    times = take_turns([partial(_best_of, turn) for turn in turns], _ROUNDS)
    ratios = per_round(times, lambda t: t[0] / (t[1] + _SHARE_FOR_SKIPPING * t[2]))
    return Result(spread(ratios), {"seconds": {"skipped": statistics.median(times[0])}})


def _unavoidable_seconds(run: Engine, x: torch.Tensor) -> float:
    """Stem, first block, blocks with a shortcut, classifier and gates."""
    found = run.timed(x)
    blocks = run.graph.architecture.blocks
    counted = [True, *(i == 0 or b.shortcut is not None for i, b in enumerate(blocks)), True]
    ungated = found.block_nanoseconds[torch.tensor(counted)].sum()
    return 1e-9 * float(ungated + found.gate_nanoseconds.sum())


def _gates(depth: int, batch: int) -> Result:
    run, x = engine(depth, favoured=8), images(batch)
    assert bool((run(x).bits == 8).all())

    def share() -> float:
        found = run.timed(x)
        return float(found.gate_nanoseconds.sum() / found.block_nanoseconds.sum())

    return Result(spread(take_turns([share], _ROUNDS)[0]), {})


def _overhead(depth: int) -> Result:
    """Both sides come from the same call, whose own clock readings are part of the overhead."""
    run, x = engine(depth, favoured=8), images(1)

    def beyond() -> float:
        start = time.perf_counter()
        found = run.timed(x)
        seconds = time.perf_counter() - start
        parts = float(found.block_nanoseconds.sum() + found.gate_nanoseconds.sum())
        return (seconds - 1e-9 * parts) / _CALL_SECONDS

    for _ in range(3):
        beyond()
    ratios = take_turns([beyond], 10 * _ROUNDS)[0]
    return Result(spread(ratios), {"microseconds": 1e6 * _CALL_SECONDS * statistics.median(ratios)})


def _memory(depth: int) -> Result:
    run = engine(depth)
    packed = sum(layer.layout.offsets()[-1] for layer in run.graph.layers())
    ratio = run.weight_bytes() / packed
    details = {"held_bytes": run.weight_bytes(), "packed_bytes": packed}
    return Result(Spread(ratio, ratio, ratio), details)


def _linear_in_batch(depth: int) -> Result:
    run, x = engine(depth), images(max(_BATCHES_OF_LINEARITY))
    calls = [partial(run, x[:batch], 8) for batch in _BATCHES_OF_LINEARITY]
    times = interleave(calls, threads=1, rounds=_ROUNDS_OF_LINEARITY, turn_seconds=TURN_SECONDS)
    medians = [
        statistics.median(t) / batch for t, batch in zip(times, _BATCHES_OF_LINEARITY, strict=True)
    ]

    def largest_to_smallest(seconds: Any) -> float:
        single = [t / batch for t, batch in zip(seconds, _BATCHES_OF_LINEARITY, strict=True)]
        return max(single) / min(single)

    ratio = spread(per_round(times, largest_to_smallest))
    per_image = dict(zip(map(str, _BATCHES_OF_LINEARITY), medians, strict=True))
    return Result(ratio, {"seconds_per_image": per_image})


def _linear_in_depth(batch: int) -> Result:
    x = images(batch)
    calls = [partial(engine(depth), x, 8) for depth in _DEPTHS_OF_LINEARITY]
    times = interleave(calls, threads=1, rounds=_ROUNDS_OF_LINEARITY, turn_seconds=TURN_SECONDS)
    medians = dict(zip(map(str, _DEPTHS_OF_LINEARITY), map(statistics.median, times), strict=True))
    return Result(spread(per_round(times, _off_the_line)), {"seconds": medians})


def _off_the_line(seconds: Any) -> float:
    """The largest distance from the line that fits best, as a fraction of it, over a tenth."""
    line = np.polyval(np.polyfit(_DEPTHS_OF_LINEARITY, seconds, 1), _DEPTHS_OF_LINEARITY)
    return float(np.max(np.abs(np.array(seconds) / line - 1))) / 0.1


def _best_of(turn: Callable[[], float]) -> float:
    """Of a few calls: the first finds the caches as others left them."""
    return min(turn() for _ in range(_CALLS_OF_A_TURN))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
