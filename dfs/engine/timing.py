"""How long a frozen network takes for an image, at every width and beside other runtimes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from dfs.engine.engine import Engine, EngineOutput
from dfs.engine.peers import PEERS, Call, PeerUnavailableError, StaticNetwork
from dfs.latency import describe_machine, thread_count

BATCHES = (1, 8, 64, 256)
GATES = "gates"
# Images that take turns at batch 1, where what the gates decide makes the difference.
_DIFFERENT_IMAGES = 256
_ROUNDS = 10
_PASS_ROUNDS = 15
# Of all calls of a contestant at one batch size, about.
_SECONDS = 0.5
_FEWEST_CALLS, _MOST_CALLS_PER_ROUND = 1, 50
# Until PyTorch's threads have stopped spinning, which would take a core from whoever is next.
_PAUSE_SECONDS = 0.015

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EngineTime:
    """What one contestant took at one batch size.

    Attributes:
        name: "gates" for the engine's own decisions, "8" and so on for a forced width, or a peer's.
        p50, p99: milliseconds per image, over the calls.
        cost: mean of (bits/32)^2 over images and gated blocks; None of a peer.
    """

    name: str
    label: str
    batch: int
    p50: float
    p99: float
    calls: int
    cost: float | None = None


@dataclass(frozen=True)
class EngineTimes:
    """A comparison.

    Attributes:
        missing: why a peer could not run, by its label.
        machine: what times depend on.
        device: where the engine ran; a GPU by its name.
    """

    times: tuple[EngineTime, ...]
    threads: int
    missing: dict[str, str]
    machine: dict[str, str]
    device: str = "cpu"

    @property
    def batches(self) -> list[int]:
        return sorted({found.batch for found in self.times})

    def rows(self) -> dict[str, dict[int, EngineTime]]:
        """By label, then batch, in the order in which they were timed."""
        rows: dict[str, dict[int, EngineTime]] = {}
        for found in self.times:
            rows.setdefault(found.label, {})[found.batch] = found
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "times": [asdict(found) for found in self.times]}


def time_engine(
    engine: Engine,
    images: Tensor | None = None,
    batches: Sequence[int] = BATCHES,
    threads: int | None = None,
    peers: bool = True,
    progress: Progress | None = None,
) -> EngineTimes:
    """Time an engine as its gates decide and at every width, and static networks of its shape.

    All contestants at a batch size take turns, so that what disturbs the machine disturbs all.
    Every call takes other images while there are any. Peers have random weights: times do not
    depend on them.

    Args:
        images: float32 or uint8 as the engine takes them and on its device, on which the gates
            decide; random floats by default.
        batches: numbers of images in a call.
        threads: of all contestants; None leaves the number as it is.
        peers: whether to time PyTorch, ONNX Runtime and OpenVINO too, where they are installed.
            They run on the CPU: beside an engine on a GPU none is timed.
        progress: told of each batch size before it is timed.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if not batches or min(batches) < 1:
        raise ValueError(f"batches must be positive, got {tuple(batches)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be positive, got {threads}")
    shape = (engine.graph.architecture.in_channels, *engine.graph.image_size)
    if images is None:
        images = torch.randn(_DIFFERENT_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
        images = images.to(engine.device)
    if len(images) == 0:
        raise ValueError("images must not be empty")
    times: list[EngineTime] = []
    missing: dict[str, str] = {}
    network = None
    if peers and engine.device.type == "cpu":
        network = StaticNetwork(engine.graph.architecture, engine.graph.image_size)
    elif peers:
        missing = {peer.label: "it is timed on the CPU only" for peer in PEERS}
    with thread_count(threads), torch.no_grad():
        used = torch.get_num_threads()
        for batch in batches:
            if progress is not None:
                progress(f"batch {batch}")
            times += _time_batch(engine, network, images, batch, used, missing)
    return EngineTimes(tuple(times), used, missing, describe_machine(), _device_name(engine.device))


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _time_batch(
    engine: Engine,
    network: StaticNetwork | None,
    images: Tensor,
    batch: int,
    threads: int,
    missing: dict[str, str],
) -> Iterator[EngineTime]:
    calls: dict[tuple[str, str], Call] = {
        (GATES, "DFS, as its gates decide"): _engine_call(engine, images, batch, None)
    }
    costs = {GATES: float(engine(_repeated(images, max(batch, len(images)))).cost.mean())}
    for width in reversed(engine.choices):
        label = f"DFS, all {width} bits" if width else "DFS, all skipped"
        calls[str(width), label] = _engine_call(engine, images, batch, width)
        costs[str(width)] = (width / 32) ** 2
    if network is not None:
        fixed = network.images(batch)
        for peer in PEERS:
            if peer.many_only and min(batch, threads) == 1:
                continue
            try:
                calls[peer.name, peer.label] = peer.prepare(network, fixed, threads)
            except PeerUnavailableError as reason:
                missing[peer.label] = str(reason)
    for (name, label), seconds in zip(calls, _take_turns(list(calls.values())), strict=True):
        quantiles = torch.tensor([0.5, 0.99], dtype=torch.float64)
        each = torch.tensor(seconds, dtype=torch.float64) * 1e3 / batch
        p50, p99 = each.quantile(quantiles).tolist()
        yield EngineTime(name, label, batch, p50, p99, len(seconds), costs.get(name))


def _engine_call(engine: Engine, images: Tensor, batch: int, policy: int | None) -> Call:
    parts = cycle(_repeated(images, max(batch, len(images) // batch * batch)).split(batch))

    def call() -> EngineOutput:
        found = engine(next(parts), policy)
        if engine.device.type == "cuda":
            # A call only launches its work.
            torch.cuda.synchronize(engine.device)
        return found

    return call


def _repeated(images: Tensor, count: int) -> Tensor:
    """So many images, from the beginning again where there are fewer."""
    return images[torch.arange(count) % len(images)]


def _take_turns(calls: Sequence[Call]) -> list[list[float]]:
    """Seconds of every call of each contestant, a round of some calls at a time."""
    counts = []
    for call in calls:
        call()
        wanted = _SECONDS / _ROUNDS / max(_seconds(call), 1e-6)
        counts.append(min(max(round(wanted), _FEWEST_CALLS), _MOST_CALLS_PER_ROUND))
    return _rounds(calls, counts, _ROUNDS)


def _rounds(calls: Sequence[Call], counts: Sequence[int], rounds: int) -> list[list[float]]:
    """Seconds of every contestant's calls, so many in a round, each turn after an untimed one."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, seconds in zip(calls, counts, times, strict=True):
            time.sleep(_PAUSE_SECONDS)
            call()
            seconds += [_seconds(call) for _ in range(count)]
    return times


def milliseconds_in_turns(
    passes: Sequence[Call], images: int, rounds: int = _PASS_ROUNDS
) -> list[float]:
    """Milliseconds per image of every contestant, the median over rounds in which all take turns.

    Args:
        passes: each runs the same images, which may take different times; they count as a whole.
        images: how many.
    """
    times = _rounds(passes, [1] * len(passes), rounds)
    return [statistics.median(seconds) * 1e3 / images for seconds in times]


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
