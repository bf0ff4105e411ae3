"""The GPU that calls are recorded and timed on, and what stands in for it in a rehearsal.

With ``DFS_GPU_REHEARSAL=1`` (and ``TRITON_INTERPRET=1``) GPU tests and benchmarks run on CPU
tensors in Triton's interpreter, at tiny shapes: their own mistakes show where there is no GPU.
Times of a rehearsal mean nothing.

Importing this imports no kernels: who does decides first whether they are interpreted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

# Calls beside the ones recorded: what allocates, compiles or chooses does so before the recording.
_WARM_UP_CALLS = 3
# The GPU is kept busy for so long that the host has queued all of a turn before it starts.
_QUEUE_CYCLES = 400_000


class Machine(Protocol):
    """What calls are recorded on, and timed."""

    device: torch.device

    def record(self, call: Callable[[], Any], count: int) -> Callable[[], None]:
        """``count`` calls as one thing that can be run again and again without their host code."""

    def seconds(self, replay: Callable[[], None], repeats: int) -> float:
        """How long ``repeats`` replays take."""

    def release(self) -> None:
        """Give back memory that nothing uses any more."""


class Gpu:
    """Records into CUDA graphs and times with events."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def record(self, call: Callable[[], Any], count: int) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        # The bound method keeps the graph alive, and the graph its memory.
        replay: Callable[[], None] = graph.replay
        return replay

    def seconds(self, replay: Callable[[], None], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Without something to wait for, the GPU would wait for the host between start and work.
        torch.cuda._sleep(_QUEUE_CYCLES)
        start.record()
        for _ in range(repeats):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def release(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class StandIn:
    """The same on a CPU, for rehearsals: a recording is the calls themselves."""

    device = torch.device("cpu")

    def record(self, call: Callable[[], Any], count: int) -> Callable[[], None]:
        def replay() -> None:
            for _ in range(count):
                call()

        return replay

    def seconds(self, replay: Callable[[], None], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            replay()
        return time.perf_counter() - start

    def release(self) -> None:
        pass


def is_rehearsal() -> bool:
    return os.environ.get("DFS_GPU_REHEARSAL", "0") == "1"


def missing_reason() -> str | None:
    """Why nothing can run here, or None."""
    if is_rehearsal() or torch.cuda.is_available():
        return None
    return "there is no CUDA device"


def lost_reason() -> str | None:
    """Why nothing works on the GPU any more in this process, or None.

    After an illegal access every call fails, whoever makes it.
    """
    if is_rehearsal():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return None


@cache
def machine() -> Machine:
    """The current GPU, or its stand-in in a rehearsal."""
    return StandIn() if is_rehearsal() else Gpu()


def facts() -> dict[str, Any]:
    """What a results file says of the GPU and of the software that runs it."""
    # Here, since importing the kernels decides whether they are interpreted.
    import triton

    from dfs_kernels.triton.tuning import slug

    software = {"torch": torch.__version__, "triton": triton.__version__}
    if is_rehearsal():
        return {"name": "rehearsal", "slug": "rehearsal", **software}
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": device.name,
        "slug": slug(device.name),
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **software,
    }
