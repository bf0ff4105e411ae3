"""A frozen network on a GPU: its ops recorded in CUDA graphs, one for each of a few batch sizes.

A batch is copied into the inputs of the smallest graph that holds it, whose other samples are
skipped; a batch beyond the largest is run in parts. Decisions never leave the GPU, and a call
doesn't wait for it. What a graph writes is copied out, so that the next call leaves it alone.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from dfs.engine.graph import EngineGraph
from dfs.engine.native import EngineRun
from dfs.engine.op_network import NetworkOutput, OpNetwork

_LARGEST_BATCH = 1024
# Of the largest feature map of a batch: a quarter of a gigabyte in 8 bits.
_MOST_VALUES = 1 << 28
# All batch sizes with and without padding, for one type of images and gates that decide.
_MOST_RECORDINGS = 22
# What compiles, re-tiles weights or chooses does so before a recording.
_WARM_UP_CALLS = 3
# No GPU's clock is faster; on a slower one a pause is longer than asked for.
_CYCLES_PER_SECOND = 2.5e9

Run = Callable[[], NetworkOutput]

# While a stream is captured nobody may wait for the whole GPU, as each recording does first.
_one_recording = threading.Lock()


class Recorder(Protocol):
    """How calls are recorded."""

    def record(self, run: Run) -> Run:
        """What does the same as ``run`` with what its tensors hold by then.

        It returns the same tensors each time, or new ones.
        """


class PlainCalls:
    """Records nothing: every call is made anew."""

    def record(self, run: Run) -> Run:
        return run


class CudaGraphs:
    """CUDA graphs that share one pool of memory, so that no two may run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Run) -> Run:
        with _one_recording:
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP_CALLS):
                    run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
                output = run()

        def replay() -> NetworkOutput:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True)
class Kind:
    """What there is a recording for.

    Attributes:
        batch: samples.
        pixels: whether images are uint8.
        has_policy: whether decisions are given.
        is_padded: whether there may be fewer samples than ``batch``.
    """

    batch: int
    pixels: bool
    has_policy: bool
    is_padded: bool


class _Recording:
    """Calls of one kind, with the inputs that they read."""

    def __init__(
        self,
        kind: Kind,
        network: OpNetwork,
        graph: EngineGraph,
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        shape = (graph.architecture.in_channels, *graph.image_size)
        dtype = torch.uint8 if kind.pixels else torch.float32
        self._images = torch.zeros(kind.batch, *shape, dtype=dtype, device=device)
        self._policy = self._count = None
        if kind.has_policy:
            size = (graph.gated_blocks, kind.batch)
            self._policy = torch.zeros(size, dtype=torch.int32, device=device)
        if kind.is_padded:
            self._count = torch.zeros((), dtype=torch.int64, device=device)
        inputs = self._images, self._policy, self._count
        self._replay = recorder.record(lambda: network.run(*inputs))

    def __call__(self, images: Tensor, policy: Tensor | None) -> NetworkOutput:
        """Of ``kind.batch`` samples, the first ones being these; valid until the next call."""
        count = len(images)
        self._images[:count].copy_(images)
        if policy is not None:
            assert self._policy is not None
            self._policy[:, :count].copy_(policy.T)
        if self._count is not None:
            self._count.fill_(count)
        return self._replay()


class GpuExecutor:
    """Runs a graph by the library's ops.

    Calls may come from several threads and on several streams. A lock and an event have them run
    one after the other, since all recordings share their memory.

    Args:
        pixel_values: float32 (C, 256), what uint8 pixels stand for, or None to take none.
        device: whose backends run; a CPU too, with a recorder of its own.
        recorder: CUDA graphs by default.
        batches: ascending sizes that are recorded; by default powers of two.
        most_recordings: how many are kept; the one not used for longest goes first.
    """

    # What is kept has to be written by later calls, in inference mode or not.
    @torch.inference_mode(False)
    def __init__(
        self,
        graph: EngineGraph,
        tensors: dict[str, Tensor],
        pixel_values: Tensor | None,
        device: torch.device,
        recorder: Recorder | None = None,
        batches: Sequence[int] | None = None,
        most_recordings: int = _MOST_RECORDINGS,
    ) -> None:
        self.device = device
        self.batches = tuple(batches) if batches is not None else recorded_batches(graph)
        self._graph = graph
        self._network = OpNetwork(graph, tensors, pixel_values, device)
        self._choice_bias: Tensor | None = None
        self._recordings: OrderedDict[Kind, _Recording] = OrderedDict()
        self._most_recordings = most_recordings
        self._lock = threading.Lock()
        with self._on_device():
            self._recorder = CudaGraphs() if recorder is None else recorder
            self._done = torch.cuda.Event() if device.type == "cuda" else None

    def weight_bytes(self) -> int:
        """Of all weights as they are held for running."""
        return self._network.weight_bytes()

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(
        self,
        images: Tensor,
        policy: Tensor | None,
        choice_bias: Tensor | None,
        timed: bool = False,
    ) -> EngineRun:
        """As :class:`dfs.engine.executor.Executor` says; ``timed`` runs op by op, and waits."""
        with self._lock, self._on_device(), self._in_order():
            if choice_bias is not self._choice_bias:
                self._network.set_choice_bias(choice_bias)
                self._choice_bias = choice_bias
            if timed:
                return self._run_timed(images, policy)
            out = self._empty(len(images))
            for start in range(0, len(images), self.batches[-1]):
                part = slice(start, min(start + self.batches[-1], len(images)))
                self._run_part(
                    images[part],
                    None if policy is None else policy[part],
                    NetworkOutput(*(value[part] for value in out)),
                )
        return EngineRun(out.logits, out.bits, out.cost)

    def _run_part(self, images: Tensor, policy: Tensor | None, out: NetworkOutput) -> None:
        count = len(images)
        batch = next(size for size in self.batches if size >= count)
        kind = Kind(batch, images.dtype == torch.uint8, policy is not None, count < batch)
        found = self._recording(kind)(images, policy)
        for target, value in zip(out, found, strict=True):
            target.copy_(value[:count])

    def _recording(self, kind: Kind) -> _Recording:
        if kind not in self._recordings:
            self._recordings[kind] = _Recording(
                kind, self._network, self._graph, self.device, self._recorder
            )
            # Not before: without any graph the pool of memory would be gone. The GPU has done what
            # came before the recording, so nothing reads the inputs that are dropped.
            if len(self._recordings) > self._most_recordings:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(kind)
        return self._recordings[kind]

    def _empty(self, batch: int) -> NetworkOutput:
        gates, classes = self._graph.gated_blocks, self._graph.architecture.num_classes
        return NetworkOutput(
            torch.empty(batch, classes, device=self.device),
            torch.empty(batch, gates, dtype=torch.int32, device=self.device),
            torch.empty(batch, dtype=torch.float64, device=self.device),
        )

    def _run_timed(self, images: Tensor, policy: Tensor | None) -> EngineRun:
        images = images.contiguous()
        decisions = None if policy is None else policy.T.contiguous()
        laps = _make_laps(lambda: self._network.run(images, decisions), self.device)
        laps()
        found = self._network.run(images, decisions, lap=laps)
        times = laps.nanoseconds()
        # Behind the stem, blocks and gates take turns.
        blocks = torch.cat([times[:1], times[1:-1:2], times[-1:]])
        return EngineRun(found.logits, found.bits, found.cost, blocks, times[2:-1:2])

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            yield

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Behind the calls before it, whatever their streams."""
        if self._done is None:
            yield
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)


class _HostLaps:
    """Times between calls, by the host's clock."""

    def __init__(self) -> None:
        self._times: list[int] = []

    def __call__(self) -> None:
        self._times.append(time.perf_counter_ns())

    def nanoseconds(self) -> Tensor:
        """float64, one less than there were calls."""
        return torch.tensor(self._times, dtype=torch.float64).diff()


class _CudaLaps:
    """Times between calls, by the GPU's clock."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def __call__(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def nanoseconds(self) -> Tensor:
        """float64, one less than there were calls."""
        self._events[-1].synchronize()
        times = [1e6 * start.elapsed_time(end) for start, end in pairwise(self._events)]
        return torch.tensor(times, dtype=torch.float64)


def _make_laps(run: Callable[[], object], device: torch.device) -> _HostLaps | _CudaLaps:
    """For a call like ``run``, which is made to compile what it needs."""
    run()
    if device.type != "cuda":
        return _HostLaps()
    start = time.perf_counter()
    run()
    # While the GPU does nothing else, the host queues all of the call: otherwise what is measured
    # would be the host.
    seconds = 2 * (time.perf_counter() - start)
    torch.cuda._sleep(int(seconds * _CYCLES_PER_SECOND))
    return _CudaLaps()


def recorded_batches(graph: EngineGraph) -> tuple[int, ...]:
    """Powers of two up to what a GPU's memory holds with ease."""
    shape = graph.architecture
    stem = shape.stem.output_size(graph.image_size)
    sizes = [shape.stem.out_channels * stem[0] * stem[1]]
    for block, at in shape.block_sizes(graph.image_size):
        for conv in block.convs:
            at = conv.output_size(at)
            sizes.append(conv.out_channels * at[0] * at[1])
    batches = [1]
    while 2 * batches[-1] <= min(_LARGEST_BATCH, _MOST_VALUES // max(sizes)):
        batches.append(2 * batches[-1])
    return tuple(batches)
