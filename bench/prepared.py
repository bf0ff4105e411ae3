"""What a contestant hands over to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Counted in page faults, the allocator still takes new memory in the second lap, while results
# of the first are given back; in the third it takes none.
_WARM_UP_LAPS = 2
# Who has not gone round by then is too slow for memory to matter.
_WARM_UP_SECONDS = 0.5


class Unavailable(Exception):  # noqa: N818  (a reason to skip, not an error)
    """Why a contestant can't run here."""


@dataclass(frozen=True)
class Prepared:
    """One contestant on one layer and batch.

    Attributes:
        call: one convolution of the batch.
        check: runs ``call`` once and asserts that the result is right.
        copies: sets of buffers that ``call`` goes round; 1 where they stay in the cache.
    """

    call: Callable[[], Any]
    check: Callable[[], None]
    copies: int = 1

    def check_and_warm_up(self) -> None:
        """Check, then go round all buffers, so that none is new memory when time is taken."""
        self.check()
        end = time.perf_counter() + _WARM_UP_SECONDS
        for _ in range(_WARM_UP_LAPS * self.copies):
            self.call()
            if time.perf_counter() > end:
                return
