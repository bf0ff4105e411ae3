"""The engine on a GPU: recorded, replayed, from several threads and streams, without waiting.

In a rehearsal its executor runs on CPU tensors, and nothing is recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

# A machine with a GPU may have what the kernels need, and no more.
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from bench.gpu.device import is_rehearsal
from dfs import Engine, freeze, load_engine
from dfs.data import Preprocessing
from dfs.engine import EngineOutput
from dfs.engine.gpu import CudaGraphs, GpuExecutor, PlainCalls, Run
from tests.framework.test_engine import CONFIGURATIONS, SIZE, make_model
from tests.kernels.host_reads import HostReads

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(is_rehearsal(), reason="there is nothing like it on a CPU")
PIXELS = Preprocessing(12, 12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), tuple("abcdefg"))
# Long enough for a call that does not wait for another stream to be caught.
_DELAY_CYCLES = 20_000_000


def random_images(count: int) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def executor_of(engine: Engine, device: torch.device) -> GpuExecutor:
    recorder = PlainCalls() if is_rehearsal() else None
    return GpuExecutor(engine.graph, engine._tensors, None, device, recorder)


def assert_same(found: EngineOutput, expected: EngineOutput) -> None:
    assert torch.equal(found.bits.cpu(), expected.bits)
    assert torch.equal(found.cost.cpu(), expected.cost)
    assert torch.equal(found.logits.isnan().cpu(), expected.logits.isnan())
    assert torch.equal(found.logits.cpu().nan_to_num(), expected.logits.nan_to_num())


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_executor_gives_what_the_engine_gives_on_a_cpu_dry_run(device: torch.device) -> None:
    engine = freeze(make_model(8), SIZE)
    images = random_images(5)
    found = executor_of(engine, device).run(images.to(device), None, None)
    assert found.cost is not None
    assert_same(EngineOutput(found.logits, found.bits, found.cost), engine(images))


def test_the_network_reads_nothing_on_the_host_dry_run(device: torch.device) -> None:
    """Between the ops; what is in them has tests of its own."""
    engine = freeze(make_model(8, gate="feedforward"), SIZE)
    executor, images = executor_of(engine, device), random_images(5).to(device)
    bias = torch.zeros(len(engine.choices), dtype=torch.float64)
    executor.run(images, None, None)
    with HostReads():
        executor.run(images, None, bias)


@needs_cuda
@pytest.mark.parametrize(
    "name", ["fast", "feedforward", "deviation", "constant", "float stream", "bottlenecks"]
)
def test_equals_the_engine_on_a_cpu(name: str, device: torch.device) -> None:
    model = make_model(**CONFIGURATIONS[name])
    expected, engine = freeze(model, SIZE), freeze(model, SIZE).to(device)
    assert engine.device.type == "cuda"
    images = random_images(9)
    mixed = torch.randint(len(model.choices), (9, model.gated_blocks))
    for policy in (None, *model.choices, torch.tensor(model.choices)[mixed]):
        wanted = expected(images, policy)
        on_device = policy.to(device) if isinstance(policy, Tensor) else policy
        for _ in range(2):
            assert_same(engine(images.to(device), on_device), wanted)
        assert_same(engine(images.to(device), policy), wanted)
    last = images.to(device).contiguous(memory_format=torch.channels_last)
    assert_same(engine(last), expected(images))


@needs_cuda
def test_batches_of_every_size(device: torch.device) -> None:
    model = make_model()
    expected, engine = freeze(model, SIZE), freeze(model, SIZE).to(device)
    for count in (0, 1, 2, 3, 5, 8, 1024, 1030):
        images = random_images(count)
        assert_same(engine(images.to(device)), expected(images))


@needs_cuda
def test_pixels(device: torch.device) -> None:
    model = make_model()
    expected = freeze(model, (12, 12), PIXELS)
    engine = freeze(model, (12, 12), PIXELS).to(device)
    pixels = torch.randint(256, (7, 3, 12, 12), dtype=torch.uint8)
    assert_same(engine(pixels.to(device)), expected(pixels))


@needs_cuda
def test_what_is_not_finite_or_no_choice_spoils_only_itself(device: torch.device) -> None:
    model = make_model()
    expected, engine = freeze(model, SIZE), freeze(model, SIZE).to(device)
    images = random_images(4)
    images[1, 0, 2, 3] = torch.nan
    assert_same(engine(images.to(device)), expected(images))
    policy = torch.full((4, model.gated_blocks), 8, device=device)
    policy[2, 1] = 2**32 + 8
    found = engine(images.to(device), policy)
    assert found.logits.isnan().all(1).tolist() == [False, True, True, False]
    assert found.bits[2].tolist() == [0] * model.gated_blocks
    rest = [0, 3]
    assert torch.equal(found.logits[rest].cpu(), expected(images, 8).logits[rest])


@needs_cuda
def test_inference_mode_may_come_and_go(device: torch.device) -> None:
    model, images = make_model(), random_images(5)
    expected = freeze(model, SIZE)(images)
    with torch.inference_mode():
        engine = freeze(model, SIZE).to(device)
        engine(images.to(device))
    assert_same(engine(images.to(device)), expected)


@needs_cuda
def test_a_call_does_not_wait(device: torch.device) -> None:
    images = random_images(6)
    engine = freeze(make_model(), SIZE)
    engine.calibrate_budget(images)
    assert engine.budget_curve is not None
    engine.to(device)
    there = images.to(device)
    policy = torch.full((6, engine.gated_blocks), 4, device=device)
    for given in (None, 8, policy):
        engine(there, given)
    with no_synchronization():
        for given in (None, 8, policy):
            engine(there, given)
        engine.set_budget(engine.budget_curve.points[0].cost)
        engine(there)


@needs_cuda
def test_a_budget_needs_no_new_recording(device: torch.device) -> None:
    images, made = random_images(6), []

    class Counting(CudaGraphs):
        def record(self, run: Run) -> Run:
            made.append(run)
            return super().record(run)

    engine = freeze(make_model(), SIZE)
    engine.calibrate_budget(images)
    assert engine.budget_curve is not None
    executor = GpuExecutor(engine.graph, engine._tensors, None, device, Counting())
    executor.run(images.to(device), None, None)
    points = engine.budget_curve.points
    for cost in (points[0].cost, points[-1].cost, None):
        engine.set_budget(cost)
        found = executor.run(images.to(device), None, engine._choice_bias)
        assert found.cost is not None
        assert_same(EngineOutput(found.logits, found.bits, found.cost), engine(images))
    assert len(made) == 1


@needs_cuda
def test_a_budget_is_calibrated_on_the_gpu_as_on_the_cpu(device: torch.device) -> None:
    images, model = random_images(24), make_model()
    expected = freeze(model, SIZE).calibrate_budget(images, points=4)
    found = freeze(model, SIZE).to(device).calibrate_budget(images.to(device), points=4)
    assert [(p.tilt, p.cost) for p in found.points] == [(p.tilt, p.cost) for p in expected.points]


@needs_cuda
def test_a_later_call_leaves_earlier_results_alone(device: torch.device) -> None:
    model = make_model()
    expected, engine = freeze(model, SIZE), freeze(model, SIZE).to(device)
    images = random_images(16)
    found = [engine(images[n : n + 4].to(device)) for n in (0, 4, 8, 12)]
    for n, output in zip((0, 4, 8, 12), found, strict=True):
        assert_same(output, expected(images[n : n + 4]))


@needs_cuda
def test_threads_and_streams_may_call_at_once(device: torch.device) -> None:
    model = make_model()
    expected, engine = freeze(model, SIZE), freeze(model, SIZE).to(device)
    images, wrong = random_images(16), []
    wanted = expected(images)
    there = images.to(device)

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for count in (1, 3, 4, 8) * 5:
                part = slice(first, first + count)
                found = engine(there[part])
                if not torch.equal(found.logits.cpu(), wanted.logits[part]):
                    wrong.append((first, count))

    torch.cuda.synchronize()
    workers = [threading.Thread(target=work, args=(n,)) for n in range(0, 8, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_cuda
def test_a_call_waits_for_one_on_another_stream(device: torch.device) -> None:
    """Both use the same inputs and memory."""
    model = make_model()
    expected, engine = freeze(model, SIZE), freeze(model, SIZE).to(device)
    first, second = random_images(8).split(4)
    there = first.to(device), second.to(device)
    engine(there[0])
    torch.cuda.synchronize()
    slow = torch.cuda.Stream()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(_DELAY_CYCLES)
        found = engine(there[0])
    other = engine(there[1])
    torch.cuda.synchronize()
    assert_same(found, expected(first))
    assert_same(other, expected(second))


@needs_cuda
def test_recordings_come_and_go(device: torch.device) -> None:
    engine = freeze(make_model(), SIZE)
    executor = GpuExecutor(
        engine.graph, engine._tensors, None, device, batches=(1, 2, 4), most_recordings=2
    )
    for count in (1, 2, 3, 4, 1, 2, 3, 4):
        images = random_images(count)
        found = executor.run(images.to(device), None, None)
        assert found.cost is not None
        assert_same(EngineOutput(found.logits, found.bits, found.cost), engine(images))


@needs_cuda
def test_without_graphs_results_are_the_same(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    model, images = make_model(), random_images(5)
    expected = freeze(model, SIZE)(images)
    monkeypatch.setenv("DFS_NO_GRAPHS", "1")
    assert_same(freeze(model, SIZE).to(device)(images.to(device)), expected)
    monkeypatch.setenv("DFS_NO_GRAPHS", "0")
    monkeypatch.setenv("DFS_DEBUG", "1")
    engine = freeze(model, SIZE).to(device)
    assert_same(engine(images.to(device)), expected)
    with pytest.raises(ValueError, match=r"policy\[0, 0\] is 3"):
        engine(images.to(device), torch.full((5, engine.gated_blocks), 3, device=device))


@needs_cuda
def test_there_and_back_and_from_a_file(device: torch.device, tmp_path: Path) -> None:
    images = random_images(5)
    engine = freeze(make_model(), SIZE)
    expected = engine(images)
    assert_same(engine.to(device)(images.to(device)), expected)
    with pytest.raises(ValueError, match="images must be on cuda"):
        engine(images)
    engine.save(tmp_path / "network.dfs")
    assert_same(engine.to("cpu")(images), expected)
    with pytest.raises(ValueError, match="images must be on the CPU"):
        engine(images.to(device))
    loaded = load_engine(tmp_path / "network.dfs", device=device)
    assert_same(loaded(images.to(device)), expected)


@needs_cuda
def test_a_profile_covers_every_block(device: torch.device) -> None:
    engine = freeze(make_model(), SIZE).to(device)
    profile = engine.profile(random_images(4).to(device), rounds=3)
    assert len(profile) == len(engine.graph.architecture.blocks) + 2
    assert all(line.milliseconds > 0 for line in profile)
    assert sum(line.share for line in profile) == pytest.approx(1)
