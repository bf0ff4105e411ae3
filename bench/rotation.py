"""Calls that go round more buffers than the last-level cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from bench.machine import last_level_cache

_MARGIN = 1.25


def copies_to_rotate(batch: int, touched_bytes: float, cache_bytes: float | None = None) -> int:
    """How many sets of buffers a contestant goes round.

    A single image stays in the cache on its way through a network, so at batch 1 nobody rotates.
    A batch streams through memory: there everybody does, by the bytes that their own call reads
    and writes.

    Args:
        cache_bytes: what they exceed together; by default this processor's last-level cache.
    """
    if batch == 1 or touched_bytes == 0:
        return 1
    cache = last_level_cache() if cache_bytes is None else cache_bytes
    return max(2, math.ceil(_MARGIN * cache / touched_bytes))


class Rotation:
    """Runs a function on each of its inputs in turn.

    The last result for every input is kept, so that the allocator cannot hand out memory that is
    still in the cache.
    """

    def __init__(self, run: Callable[[Any], Any], inputs: Sequence[Any]) -> None:
        self._run = run
        self._inputs = inputs
        self._results: list[Any] = [None] * len(inputs)
        self._next = 0

    def __call__(self) -> Any:
        index = self._next
        self._next = (index + 1) % len(self._inputs)
        result = self._run(self._inputs[index])
        self._results[index] = result
        return result
