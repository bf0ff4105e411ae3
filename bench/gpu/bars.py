"""The bars that the GPU kernels are held to, set for one H100, and how each is measured.

A comparison's contestants take turns (bench/interleaved.py), each turn a recording of its calls.
What is reported is the median over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.bars import Bar, Verdict
from bench.gpu.backends import gpu_backends
from bench.gpu.block import gated_block
from bench.gpu.contestants import ours, prepare
from bench.gpu.ours import implementations, packed
from bench.gpu.peaks import measured_peaks
from bench.gpu.peers import BF16_PEERS
from bench.gpu.prepared import GpuPrepared, take_gpu_turns, to_run
from bench.interleaved import per_round, spread
from bench.layers import GPU_LAYERS, Layer
from bench.ours import MIX
from bench.prepared import Unavailable

_LARGE_BATCH = 1024
_IMAGENET_BATCH = 64

CUDNN = Bar("cudnn", "8 bits / the best of cuDNN in bf16")
ROOFLINE = Bar("roofline", "8 bits, fraction of the roofline")
BEST_ROOFLINE = Bar("best_roofline", "8 bits, fraction of the roofline, the faster backend")
TWO_BITS = Bar("two_bits", "2 bits / 8 bits")
SKIPPED = Bar("skipped", "all skipped, in place, microseconds")
MIXED = Bar("mixed", "equal parts of 0/2/4/8 bits / the parts alone")
QUANTIZE = Bar("quantize_pack", "quantize and pack, fraction of the copy bandwidth")
BLOCK = Bar("block", "whole gated block, microseconds")
BARS = (CUDNN, ROOFLINE, BEST_ROOFLINE, TWO_BITS, SKIPPED, MIXED, QUANTIZE, BLOCK)


@dataclass(frozen=True)
class Measured:
    """A figure in each round, with what else is worth keeping."""

    rounds: list[float]
    details: dict[str, Any]


# From layer, batch and implementation to what times them, their results checked.
Comparison = Callable[[Layer, int, str], Callable[[], Measured]]


@dataclass(frozen=True)
class GpuCase:
    """A bar at one layer and batch, on one implementation or all of them.

    Attributes:
        at_least: whether the limit is the least that holds; otherwise it is the most.
        comparison: prepares and checks the contestants, and gives what measures them.
    """

    bar: Bar
    limit: float
    at_least: bool
    layer: Layer
    batch: int
    implementation: str
    comparison: Comparison

    @property
    def name(self) -> str:
        return f"{self.bar.name}-{self.layer.name}-batch{self.batch}-{self.implementation}"

    def prepare(self) -> Callable[[], Verdict]:
        """Check the contestants' results; what is returned compares their times.

        Raises:
            Unavailable: a contestant can't run here.
        """
        measure = self.comparison(self.layer, self.batch, self.implementation)
        return lambda: self.judge(measure())

    def judge(self, measured: Measured) -> Verdict:
        figure = spread(measured.rounds)
        held = figure.median >= self.limit if self.at_least else figure.median <= self.limit
        return Verdict(figure, self.limit, held, measured.details)


def cases() -> Iterator[GpuCase]:
    """Every bar at every shape that it was set for."""
    squares = [layer for layer in GPU_LAYERS if layer.family == "square"]
    cifar, imagenet = squares[:3], squares[3:]
    for backend in gpu_backends():
        for layer, limit in zip(cifar, (0.6, 0.6, 0.4), strict=True):
            yield GpuCase(ROOFLINE, limit, True, layer, _LARGE_BATCH, backend, _fraction("8"))
        for layer in imagenet:
            yield GpuCase(ROOFLINE, 0.5, True, layer, _IMAGENET_BATCH, backend, _fraction("8"))
            yield GpuCase(CUDNN, 1.0, False, layer, _IMAGENET_BATCH, backend, _beside_cudnn)
        for layer in cifar[:2]:
            yield GpuCase(CUDNN, 0.6, False, layer, _LARGE_BATCH, backend, _beside_cudnn)
        yield GpuCase(TWO_BITS, 0.8, False, cifar[0], _LARGE_BATCH, backend, _two_bits)
        quantize = _fraction("quantize_pack")
        yield GpuCase(QUANTIZE, 0.85, True, cifar[0], _LARGE_BATCH, backend, quantize)
        for layer in cifar:
            yield GpuCase(SKIPPED, 5.0, False, layer, _LARGE_BATCH, backend, _skipped)
            yield GpuCase(BLOCK, 12.0, False, layer, 1, backend, _block)
    for implementation in implementations():
        for layer in cifar:
            yield GpuCase(MIXED, 1.15, False, layer, _LARGE_BATCH, implementation, _mixed)
    for layer in cifar[:2]:
        yield GpuCase(BEST_ROOFLINE, 0.75, True, layer, _LARGE_BATCH, "any", _best_fraction)


def _beside_cudnn(layer: Layer, batch: int, implementation: str) -> Callable[[], Measured]:
    own = prepare(ours("8", implementation), layer, batch)
    peers = _available([peer.name for peer in BF16_PEERS], layer, batch)
    return _compare([own, *peers], lambda t: t[0] / min(t[1:]))


def _fraction(form: str) -> Comparison:
    """Of the roofline, whose peaks are measured in the same run."""

    def comparison(layer: Layer, batch: int, implementation: str) -> Callable[[], Measured]:
        own = prepare(ours(form, implementation), layer, batch)
        return _compare([own], lambda t: _roofline_seconds(own) / t[0])

    return comparison


def _best_fraction(layer: Layer, batch: int, implementation: str) -> Callable[[], Measured]:
    names = [ours("8", backend) for backend in gpu_backends()]
    contestants = _available(names, layer, batch)
    return _compare(contestants, lambda t: _roofline_seconds(contestants[0]) / min(t))


def _two_bits(layer: Layer, batch: int, implementation: str) -> Callable[[], Measured]:
    both = [prepare(ours(form, implementation), layer, batch) for form in ("2", "8")]
    return _compare(both, lambda t: t[0] / t[1])


def _skipped(layer: Layer, batch: int, implementation: str) -> Callable[[], Measured]:
    return _compare([prepare(ours("skipped", implementation), layer, batch)], _microseconds)


def _block(layer: Layer, batch: int, implementation: str) -> Callable[[], Measured]:
    return _compare([gated_block(*to_run(layer, batch), implementation)], _microseconds)


def _mixed(layer: Layer, batch: int, implementation: str) -> Callable[[], Measured]:
    """A batch of all widths over the sum of one batch for each."""
    layer, batch = to_run(layer, batch)
    whole = packed(MIX)(layer, batch, implementation)
    # The parts have one width: one launch for all is their way, whatever the whole takes.
    backend = implementation.partition("_")[0]
    parts = [packed((bits,))(layer, batch // len(MIX), backend) for bits in MIX]
    return _compare([whole, *parts], lambda t: t[0] / sum(t[1:]))


def _available(names: Sequence[str], layer: Layer, batch: int) -> list[GpuPrepared]:
    """Those that can run here; at least one.

    Raises:
        Unavailable: none can.
    """
    found = []
    for name in names:
        try:
            found.append(prepare(name, layer, batch))
        except Unavailable as reason:
            why = str(reason)
    if not found:
        raise Unavailable(why)
    return found


def _compare(
    contestants: Sequence[GpuPrepared], statistic: Callable[[Sequence[float]], float]
) -> Callable[[], Measured]:
    for contestant in contestants:
        contestant.prepared.check()

    def measure() -> Measured:
        times = take_gpu_turns(contestants)
        seconds = [spread(t).median for t in times]
        return Measured(per_round(times, statistic), {"seconds": seconds})

    return measure


def _roofline_seconds(contestant: GpuPrepared) -> float:
    assert contestant.work is not None
    return contestant.work.seconds(measured_peaks())


def _microseconds(times: Sequence[float]) -> float:
    return 1e6 * times[0]
