"""How calls are recorded and timed, on a GPU that only writes down what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import device
from bench.gpu.device import Gpu, StandIn, lost_reason, missing_reason


class Cuda:
    """As much of torch.cuda as is used."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.CUDAGraph = lambda: SimpleNamespace(replay=lambda: self.log.append("replay"))
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: self.log.append("side"))
        self.works = True

    def current_device(self) -> int:
        return 0

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("main"))

    @contextmanager
    def _within(self, name: str) -> Iterator[None]:
        self.log.append(f"{name} {{")
        yield
        self.log.append("}")

    def stream(self, stream: Any) -> Any:
        return self._within("stream")

    def graph(self, graph: Any) -> Any:
        return self._within("graph")

    def _sleep(self, cycles: int) -> None:
        self.log.append("sleep")

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.log.append("event"),
            synchronize=lambda: self.log.append("wait"),
            elapsed_time=lambda end: 5.0,  # milliseconds
        )

    def synchronize(self) -> None:
        if not self.works:
            raise RuntimeError("an illegal memory access was encountered")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(device, "torch", SimpleNamespace(cuda=cuda, device=torch.device))
    monkeypatch.delenv("DFS_GPU_REHEARSAL", raising=False)
    return cuda


def test_pytorch_has_all_that_is_asked_of_it(cuda: Cuda) -> None:
    for name in dir(cuda):
        if not name.startswith("__") and name not in ("log", "works", "_within"):
            assert hasattr(torch.cuda, name), name


def test_calls_are_made_before_they_are_recorded(cuda: Cuda) -> None:
    """What compiles or chooses an algorithm can't be recorded."""
    replay = Gpu().record(lambda: cuda.log.append("call"), 2)
    before = ["side", "stream {", "call", "call", "call", "}", "main"]
    assert cuda.log == [*before, "graph {", "call", "call", "}"]
    cuda.log.clear()
    replay()
    assert cuda.log == ["replay"]


def test_time_is_taken_on_the_gpu_while_the_host_is_ahead(cuda: Cuda) -> None:
    seconds = Gpu().seconds(lambda: cuda.log.append("work"), 2)
    assert seconds == pytest.approx(5e-3)
    assert cuda.log == ["sleep", "event", "work", "work", "event", "wait"]


def test_a_broken_context_is_noticed(cuda: Cuda) -> None:
    assert lost_reason() is None
    cuda.works = False
    assert lost_reason() == "an illegal memory access was encountered"


def test_a_rehearsal_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DFS_GPU_REHEARSAL", raising=False)
    assert missing_reason() == "there is no CUDA device"
    monkeypatch.setenv("DFS_GPU_REHEARSAL", "1")
    assert missing_reason() is None
    assert lost_reason() is None


def test_the_stand_in_makes_the_calls_themselves() -> None:
    calls: list[int] = []
    replay = StandIn().record(lambda: calls.append(1), 3)
    assert calls == []
    assert StandIn().seconds(replay, 2) >= 0
    assert len(calls) == 6
