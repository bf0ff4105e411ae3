"""A contestant on a GPU: what it computes, and how its turns are timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu.device import is_rehearsal, machine
from bench.gpu.roofline import Work
from bench.interleaved import ROUNDS, take_turns
from bench.layers import Layer
from bench.prepared import Prepared
from bench.rotation import copies_to_rotate

# What a contestant goes round at least: four times the largest cache of a GPU today.
_ROTATED_BYTES = 200e6
_ROTATED_IN_REHEARSAL = 4096
# A recording is about this long if its calls are as slow as when the host launches each, and
# shorter if not; of so many calls that the gap between two recordings does not matter.
_RECORDED_SECONDS = 8e-3
_FEWEST_CALLS, _MOST_CALLS = 2, 64
# A turn repeats its recording for at least as long.
_TURN_SECONDS = 0.5e-3
# In a rehearsal.
_SMALL_SIDE = 4
_FEW_CHANNELS = 16
_SMALL_BATCH = 4
_ROUNDS_IN_REHEARSAL = 2


@dataclass(frozen=True)
class GpuPrepared:
    """One contestant on one layer and batch.

    Attributes:
        work: what it has to do, or None where a roofline would say nothing.
    """

    prepared: Prepared
    work: Work | None = None

    def turn(self) -> Callable[[], float]:
        """Gives the seconds of a call. The result has been checked before."""
        gpu = machine()
        call, copies = self.prepared.call, self.prepared.copies
        call()
        seconds = gpu.seconds(_unrecorded(call), 2) / 2
        count = calls_to_record(seconds, copies)
        replay = gpu.record(call, count)
        repeats = max(1, math.ceil(_TURN_SECONDS / gpu.seconds(replay, 1)))
        return lambda: gpu.seconds(replay, repeats) / (repeats * count)


def _unrecorded(call: Callable[[], Any]) -> Callable[[], None]:
    def replay() -> None:
        call()

    return replay


def calls_to_record(seconds: float, copies: int) -> int:
    """How many calls of about so long one recording holds: whole laps round the buffers."""
    if is_rehearsal():
        return 1
    wanted = min(max(math.ceil(_RECORDED_SECONDS / seconds), _FEWEST_CALLS), _MOST_CALLS)
    return copies * math.ceil(wanted / copies)


def take_gpu_turns(contestants: Sequence[GpuPrepared]) -> list[list[float]]:
    """Seconds per call of each contestant in each round; their results have been checked."""
    rounds = _ROUNDS_IN_REHEARSAL if is_rehearsal() else ROUNDS
    return take_turns([contestant.turn() for contestant in contestants], rounds)


def copies_for(batch: int, touched_bytes: float) -> int:
    """Sets of buffers to go round; a single image stays in the cache, as in a network."""
    rotated = _ROTATED_IN_REHEARSAL if is_rehearsal() else _ROTATED_BYTES
    return copies_to_rotate(batch, touched_bytes, rotated)


def to_run(layer: Layer, batch: int) -> tuple[Layer, int]:
    """The shape itself, or in a rehearsal a tiny one of its kind."""
    if not is_rehearsal():
        return layer, batch
    divisor = max(1, layer.in_channels // _FEW_CHANNELS)
    small = replace(
        layer,
        in_channels=layer.in_channels // divisor,
        out_channels=max(1, layer.out_channels // divisor),
        groups=max(1, layer.groups // divisor),
        side=min(layer.side, max(_SMALL_SIDE, layer.kernel)),
    )
    return small, min(batch, _SMALL_BATCH)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's convolutions, and our 32 bits, may round float32 to TF32, or not."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allowed):
        yield
