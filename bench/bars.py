"""The bars that the CPU kernels are held to, and how each is measured.

They were set for processors with AVX-512 VNNI and VBMI. A comparison's contestants take turns
(bench/interleaved.py); what it reports is the median of a ratio, which holds up to a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import memory, ours
from bench.contestants import CONTESTANTS, Prepared, prepare
from bench.interleaved import Spread, interleave, per_round, spread
from bench.layers import LAYERS, Layer, layer_input, layer_weights
from bench.peaks import measured_peaks
from bench.rotation import Rotation, copies_to_rotate
from dfs_kernels import mixed_conv2d

# Samples that run, beside those that are skipped, where the cost of skipping is measured.
_ACTIVE = 4
_MOST_SAMPLES = 64
# Beyond this the allocator maps fresh memory for each result, and page faults are all one sees.
_MOST_OUTPUT_BYTES = 16 << 20
_ENOUGH_OF_THE_PEAK = 0.9
# 64x56x56, and all later stages of that network.
_LARGE_MACS = 64 * 56**2 * 64 * 3**2
# One of many small samples and one of few large ones: a process for each measurement takes time.
_MEMORY_LAYERS = ("16x32x32", "64x56x56")


@dataclass(frozen=True)
class Bar:
    """A limit on a ratio.

    Attributes:
        name: its key in the results.
        label: what is divided by what, for a report.
    """

    name: str
    label: str


INT8 = Bar("int8", "8 bits / PyTorch int8")
FOUR_BITS = Bar("four_bits", "4 bits / 8 bits")
TWO_BITS = Bar("two_bits", "2 bits / 8 bits")
FLOAT = Bar("float32", "32 bits, channels last / PyTorch float32, channels last")
FLOAT_PACKED = Bar("float32_packed", "32 bits, packed / PyTorch float32, channels last")
SKIP_PACKED = Bar("skip_packed", "one more skipped sample, packed / an 8-bit sample")
SKIP_IN_PLACE = Bar("skip_in_place", "one more skipped sample, in place / an 8-bit sample")
SKIP_ZEROS = Bar("skip_zeros", "skipped samples to float zeros / memset")
SKIP_COPY = Bar("skip_copy", "skipped samples to a float residual / copy")
MIXED = Bar("mixed", "equal parts of 0/2/4/8 bits / the parts alone")
FLOAT_IN_OUT = Bar("float_in_out", "8 bits, float in and out / packed in and out")
MEMORY_PACKED = Bar("memory_packed", "extra memory, packed in and out / its allowance")
MEMORY_FLOAT_IN_OUT = Bar("memory_float_in_out", "extra memory, float in and out / its allowance")
MEMORY_FLOAT = Bar("memory_float32", "extra memory at 32 bits, packed / its allowance")
BARS = (
    INT8,
    FOUR_BITS,
    TWO_BITS,
    FLOAT,
    FLOAT_PACKED,
    SKIP_PACKED,
    SKIP_IN_PLACE,
    SKIP_ZEROS,
    SKIP_COPY,
    MIXED,
    FLOAT_IN_OUT,
    MEMORY_PACKED,
    MEMORY_FLOAT_IN_OUT,
    MEMORY_FLOAT,
)


@dataclass(frozen=True)
class Case:
    """A bar at one layer and batch."""

    bar: Bar
    limit: float
    layer: Layer
    batch: int
    run: Callable[[Layer, int, int], Result]

    def measure(self, threads: int) -> Verdict:
        """Check the contestants' results, then compare them.

        Raises:
            Unavailable: a contestant can't run here.
        """
        result = self.run(self.layer, self.batch, threads)
        return Verdict(
            ratio=result.ratio,
            limit=self.limit,
            held=result.ratio.median <= self.limit or result.enough_of_the_peak,
            details=result.details,
        )


@dataclass(frozen=True)
class Result:
    """The measured ratio, with what else is worth keeping.

    Attributes:
        enough_of_the_peak: a second way to hold a bar.
    """

    ratio: Spread
    details: dict[str, Any]
    enough_of_the_peak: bool = False


@dataclass(frozen=True)
class Verdict:
    """A bar, judged."""

    ratio: Spread
    limit: float
    held: bool
    details: dict[str, Any]

    def info(self, bar: Bar, layer: str, batch: int, threads: int) -> dict[str, Any]:
        """What a benchmark keeps of it in ``extra_info``; ``layer`` may name a network too."""
        return {
            "kind": "bar",
            "bar": bar.name,
            "label": bar.label,
            "layer": layer,
            "batch": batch,
            "threads": threads,
            "ratio": self.ratio.median,
            "low": self.ratio.low,
            "high": self.ratio.high,
            "limit": self.limit,
            "held": self.held,
            **self.details,
        }


def cases() -> Iterator[Case]:
    """Every bar at every shape that it was set for, ordered by layer."""
    for layer in LAYERS:
        for batch in layer.batches:
            yield from _cases_of_a_batch(layer, batch)
        if layer.family == "square":
            # The batch of these is their own matter.
            batch = _skip_batch(layer)
            yield Case(SKIP_PACKED, 0.01, layer, batch, _skip_packed)
            yield Case(SKIP_IN_PLACE, 0.01, layer, batch, _skip_in_place)
            yield Case(SKIP_ZEROS, 1.2, layer, batch, partial(_skip_float, with_residual=False))
            yield Case(SKIP_COPY, 1.2, layer, batch, partial(_skip_float, with_residual=True))


def _cases_of_a_batch(layer: Layer, batch: int) -> Iterator[Case]:
    is_square = layer.family == "square"
    if is_square and layer.in_channels <= 256:
        yield Case(INT8, 1.0, layer, batch, partial(_compare, "dfs_8", "torch_int8"))
    yield Case(FOUR_BITS, 1.05, layer, batch, partial(_compare, "dfs_4", "dfs_8"))
    if layer.group_channels >= 16:
        limit = 0.5 if is_square and layer.macs >= _LARGE_MACS else 0.62
        yield Case(TWO_BITS, limit, layer, batch, partial(_compare, "dfs_2", "dfs_8"))
    peer = "torch_float32_channels_last"
    yield Case(FLOAT, 1.05, layer, batch, partial(_compare, "dfs_32_channels_last", peer))
    yield Case(FLOAT_PACKED, 1.05, layer, batch, partial(_compare, "dfs_32_packed", peer))
    if is_square and batch % len(ours.MIX) == 0:
        yield Case(MIXED, 1.1, layer, batch, _mixed)
    yield Case(FLOAT_IN_OUT, 1.3, layer, batch, partial(_compare, "dfs_8_float", "dfs_8"))
    if layer.name in _MEMORY_LAYERS and batch > 1:
        for bar, kind in (
            (MEMORY_PACKED, "packed"),
            (MEMORY_FLOAT_IN_OUT, "float_in_out"),
            (MEMORY_FLOAT, "float32"),
        ):
            yield Case(bar, 1.0, layer, batch, partial(_memory, kind))


def _compare(name: str, other: str, layer: Layer, batch: int, threads: int) -> Result:
    """The time of one contestant over that of another."""
    contestants = [prepare(n, layer, batch, threads) for n in (name, other)]
    times = _check_and_interleave(contestants, threads)
    result = Result(
        spread(per_round(times, lambda t: t[0] / t[1])),
        {"seconds": {n: spread(t).median for n, t in zip((name, other), times, strict=True)}},
    )
    if CONTESTANTS[name].is_integer:
        return result
    rate = batch * layer.macs / spread(times[0]).median
    fraction = rate / measured_peaks(threads).fma
    details = {**result.details, "fraction_of_peak": fraction}
    return Result(result.ratio, details, fraction >= _ENOUGH_OF_THE_PEAK)


def _mixed(layer: Layer, batch: int, threads: int) -> Result:
    """A batch of all widths over the sum of one batch for each."""
    whole = ours.packed_mix(layer, batch, threads)
    part = batch // len(ours.MIX)
    parts = [ours.packed_batch(layer, ours.repeated_bits((bits,), part)) for bits in ours.MIX]
    times = _check_and_interleave([whole, *parts], threads)
    return Result(
        spread(per_round(times, lambda t: t[0] / sum(t[1:]))),
        {"seconds": {"whole": spread(times[0]).median}},
    )


def _skip_batch(layer: Layer) -> int:
    fitting = _MOST_OUTPUT_BYTES // (4 * layer.out_values)
    return min(_MOST_SAMPLES, fitting)


def _skip_bits(batch: int) -> Tensor:
    bits = torch.zeros(batch, dtype=torch.int32)
    bits[:_ACTIVE] = 8
    return bits


def _marginal(batch: int) -> Callable[[Sequence[float]], float]:
    """What a skipped sample adds to a batch, over the time of an active one."""
    skipped = batch - _ACTIVE

    def statistic(times: Sequence[float]) -> float:
        with_skipped, without = times
        return (with_skipped - without) / skipped / (without / _ACTIVE)

    return statistic


def _skip_packed(layer: Layer, batch: int, threads: int) -> Result:
    # No rotation: what is added by samples that touch no memory is the point.
    both = [
        ours.packed_batch(layer, bits, rotate=False)
        for bits in (_skip_bits(batch), _skip_bits(_ACTIVE))
    ]
    times = _check_and_interleave(both, threads)
    return Result(spread(per_round(times, _marginal(batch))), {})


def _skip_in_place(layer: Layer, batch: int, threads: int) -> Result:
    both = [_added_in_place(layer, bits) for bits in (_skip_bits(batch), _skip_bits(_ACTIVE))]
    times = _check_and_interleave(both, threads)
    return Result(spread(per_round(times, _marginal(batch))), {})


def _added_in_place(layer: Layer, bits: Tensor) -> Prepared:
    run = ours.run_into_stream(layer)
    x = ours.packed_input(layer, bits)
    stream = ours.packed_input(layer, torch.full_like(bits, 8))
    return Prepared(lambda: run((x, stream)), lambda: ours.check_in_place(run, x, stream))


def _skip_float(layer: Layer, batch: int, threads: int, with_residual: bool) -> Result:
    """What skipped samples add to a batch with a float result, over writing that much memory."""
    skipped = batch - _ACTIVE
    both = [_float_result(layer, bits, with_residual) for bits in map(_skip_bits, (batch, _ACTIVE))]
    write = _written(layer, skipped, with_residual)
    times = _check_and_interleave([*both, write], threads)
    return Result(spread(per_round(times, lambda t: (t[0] - t[1]) / t[2])), {})


def _float_result(layer: Layer, bits: Tensor, with_residual: bool) -> Prepared:
    weight = layer_weights(layer).packed
    x = ours.packed_input(layer, bits)
    residual = layer_input(layer, len(bits)) if with_residual else None

    def run(residual: Tensor | None, backend: str | None = None) -> Any:
        return mixed_conv2d(
            x, weight, x.bits, padding=layer.padding, residual=residual, backend=backend
        )

    copies = copies_to_rotate(len(bits), _written_bytes(layer, len(bits), with_residual))
    call = Rotation(run, _clones(residual, copies))

    def check() -> None:
        ours.assert_same(call(), run(residual, "reference"))

    return Prepared(call, check, copies)


def _written(layer: Layer, samples: int, with_residual: bool) -> Prepared:
    """The memset or copy that skipped samples need, into a result of its own as for ours."""
    shape = (samples, layer.out_channels, layer.out_side, layer.out_side)
    residual = layer_input(layer, samples) if with_residual else None

    def run(residual: Tensor | None) -> Tensor:
        return torch.empty(shape).zero_() if residual is None else residual.clone()

    copies = copies_to_rotate(samples, _written_bytes(layer, samples, with_residual))
    call = Rotation(run, _clones(residual, copies))

    def check() -> None:
        assert torch.equal(call(), torch.zeros(shape) if residual is None else residual)

    return Prepared(call, check, copies)


def _written_bytes(layer: Layer, samples: int, with_residual: bool) -> int:
    return 4 * samples * layer.out_values * (2 if with_residual else 1)


def _clones(residual: Tensor | None, copies: int) -> list[Tensor | None]:
    return [None if residual is None else residual.clone() for _ in range(copies)]


def _memory(kind: str, layer: Layer, batch: int, threads: int) -> Result:
    extra, allowed = memory.measure(kind, layer, batch, threads)
    ratio = extra / allowed
    return Result(Spread(ratio, ratio, ratio), {"extra_bytes": extra, "allowed_bytes": allowed})


def _check_and_interleave(contestants: Sequence[Prepared], threads: int) -> list[list[float]]:
    for contestant in contestants:
        contestant.check_and_warm_up()
    return interleave([contestant.call for contestant in contestants], threads=threads)
