"""The engine's executor for GPUs, without one: its ops on CPU tensors, its graphs imitated."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfs import Engine, freeze, load_engine
from dfs.data import Preprocessing
from dfs.engine import DeviceError
from dfs.engine.gpu import GpuExecutor, PlainCalls, Run, recorded_batches
from dfs.engine.native import EngineRun
from dfs.engine.op_network import NetworkOutput
from dfs_kernels import available_backends, use_backend
from tests.framework.helpers import run_dfs, small_basic
from tests.framework.test_engine import CONFIGURATIONS, SIZE, make_model

CPU = torch.device("cpu")
PIXELS = Preprocessing(12, 12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), tuple("abcdefg"))


class StandInGraphs:
    """Like CUDA graphs: a recording writes the same tensors in each replay.

    Attributes:
        runs: how many recordings were made.
    """

    def __init__(self) -> None:
        self.runs = 0

    def record(self, run: Run) -> Run:
        self.runs += 1
        output = run()

        def replay() -> NetworkOutput:
            for target, value in zip(output, run(), strict=True):
                target.copy_(value)
            return output

        return replay


def executor_of(
    engine: Engine,
    recorder: Any = None,
    batches: Sequence[int] | None = (1, 4, 8),
    pixel_values: Tensor | None = None,
    **options: Any,
) -> GpuExecutor:
    graphs = StandInGraphs() if recorder is None else recorder
    return GpuExecutor(engine.graph, engine._tensors, pixel_values, CPU, graphs, batches, **options)


def assert_same(found: EngineRun, expected: Any) -> None:
    assert torch.equal(found.bits, expected.bits)
    assert found.cost is not None
    assert torch.equal(found.cost, expected.cost)
    assert torch.equal(found.logits.isnan(), expected.logits.isnan())
    assert torch.equal(found.logits.nan_to_num(), expected.logits.nan_to_num())


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(11, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return freeze(make_model(), SIZE)


# Results


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_gives_what_the_engine_gives_on_a_cpu(name: str, images: Tensor) -> None:
    engine = freeze(make_model(**CONFIGURATIONS[name]), SIZE)
    executor = executor_of(engine)
    mixed = torch.randint(len(engine.choices), (len(images), engine.gated_blocks))
    choices = torch.tensor(engine.choices, dtype=torch.int32)
    forced = [torch.full_like(mixed, width, dtype=torch.int32) for width in engine.choices]
    for policy in (None, *forced, choices[mixed]):
        assert_same(executor.run(images, policy, None), engine(images, policy))
    assert len(engine(images).bits.unique()) > 1


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("gate", ["rnn", "feedforward"])
def test_gives_the_same_on_other_backends(backend: str, gate: str) -> None:
    if backend not in available_backends():
        pytest.skip(f"{backend} is not available")
    images = torch.randn(3, 3, 17, 16)
    engine = freeze(make_model(small_basic(), gate=gate), (17, 16))
    with use_backend(backend):
        found = executor_of(engine, PlainCalls(), (4,)).run(images, None, None)
    assert_same(found, engine(images))


def test_close_where_blocks_run_at_32_bits(images: Tensor) -> None:
    engine = freeze(make_model(choices=(0, 4, 32), stream="float32", ungated_bits=32), SIZE)
    executor = executor_of(engine)
    with use_backend("reference"):
        found = executor.run(images, None, None)
    expected = engine(images)
    assert torch.equal(found.bits, expected.bits)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stream", ["uint8", "float32"])
def test_pixels_are_what_they_are_on_a_cpu(stream: str) -> None:
    engine = freeze(make_model(stream=stream), (12, 12), PIXELS)
    levels = torch.arange(256, dtype=torch.uint8).repeat(1, 3, 1, 1)
    values = PIXELS.normalize(levels)[0, :, 0]
    executor = executor_of(engine, pixel_values=values)
    pixels = torch.randint(256, (6, 3, 12, 12), dtype=torch.uint8)
    expected = engine(pixels)
    assert_same(executor.run(pixels, None, None), expected)
    last = pixels.contiguous(memory_format=torch.channels_last)
    assert_same(executor.run(last, None, None), expected)
    assert_same(executor.run(PIXELS.normalize(pixels), None, None), expected)


def test_images_of_any_strides(engine: Engine, images: Tensor) -> None:
    executor, expected = executor_of(engine), engine(images)
    last = images.contiguous(memory_format=torch.channels_last)
    assert_same(executor.run(last, None, None), expected)
    wide = torch.randn(len(images), 3, SIZE[0], 2 * SIZE[1])
    wide[..., ::2] = images
    assert_same(executor.run(wide[..., ::2], None, None), expected)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_spoils_only_itself(
    engine: Engine, images: Tensor, value: float, forced: bool
) -> None:
    broken = images.clone()
    broken[2, 1, 3, 4] = value
    policy = torch.full((len(images), engine.gated_blocks), 4, dtype=torch.int32)
    found = executor_of(engine).run(broken, policy if forced else None, None)
    assert found.logits.isnan().all(1).tolist() == [n == 2 for n in range(len(images))]
    assert_same(found, engine(broken, policy if forced else None))


def test_a_policy_that_is_no_choice_spoils_only_its_sample(engine: Engine, images: Tensor) -> None:
    """Values on a GPU are not looked at before the call."""
    policy = torch.full((len(images), engine.gated_blocks), 8, dtype=torch.int32)
    expected = engine(images, 8)
    policy[3, 1], policy[5, 0] = 7, -1
    found = executor_of(engine).run(images, policy, None)
    rest = [n for n in range(len(images)) if n not in (3, 5)]
    assert bool(found.logits[[3, 5]].isnan().all())
    assert int(found.bits[[3, 5]].abs().sum()) == 0
    assert torch.equal(found.logits[rest], expected.logits[rest])


def test_inference_mode_may_come_and_go(engine: Engine, images: Tensor) -> None:
    with torch.inference_mode():
        executor = executor_of(engine)
        executor.run(images, None, torch.zeros(len(engine.choices), dtype=torch.float64))
        inside = images.clone()
    assert_same(executor.run(inside, None, None), engine(images))
    with torch.inference_mode():
        assert_same(executor.run(images, None, None), engine(images))


def test_an_empty_batch(engine: Engine) -> None:
    found = executor_of(engine).run(torch.empty(0, 3, *SIZE), None, None)
    assert found.logits.shape == (0, 7)
    assert found.bits.shape == (0, engine.gated_blocks)
    assert found.cost is not None
    assert found.cost.shape == (0,)


@pytest.mark.parametrize("gate", ["rnn", "feedforward", "constant"])
def test_a_choice_bias_needs_no_new_recording(gate: str, images: Tensor) -> None:
    engine, graphs = freeze(make_model(gate=gate), SIZE), StandInGraphs()
    engine.calibrate_budget(images)
    assert engine.budget_curve is not None
    executor = executor_of(engine, graphs)
    executor.run(images, None, None)
    made = graphs.runs
    points = engine.budget_curve.points
    for cost in (points[0].cost, points[-1].cost, None):
        engine.set_budget(cost)
        assert_same(executor.run(images, None, engine._choice_bias), engine(images))
    assert graphs.runs == made


def test_a_profile_covers_every_part(engine: Engine, images: Tensor) -> None:
    found = executor_of(engine).run(images, None, None, timed=True)
    assert_same(found, engine(images))
    assert found.block_times is not None
    assert found.gate_times is not None
    assert found.block_times.shape == (len(engine.graph.architecture.blocks) + 2,)
    assert found.gate_times.shape == (engine.gated_blocks,)
    assert bool((found.block_times > 0).all())
    assert bool((found.gate_times > 0).all())


def test_weights_are_held_packed(engine: Engine, images: Tensor) -> None:
    executor = executor_of(engine)
    held = executor.weight_bytes()
    assert held <= engine.nbytes
    with use_backend("cpu"):
        executor.run(images, None, None)
    assert executor.weight_bytes() > held


# Recordings


def test_batches_take_the_smallest_recording_that_holds_them(
    engine: Engine, images: Tensor
) -> None:
    graphs = StandInGraphs()
    executor = executor_of(engine, graphs, (1, 4, 8))
    many = torch.cat([images, images])
    expected = engine(many)
    # 11 are 8 and 3 of 4; 3 and 2 of 4 are the same; 4 without padding are others, so are 8.
    for count, made in ((1, 1), (3, 2), (2, 2), (4, 3), (8, 4), (11, 4), (22, 5), (22, 5)):
        found = executor.run(many[:count], None, None)
        assert torch.equal(found.logits, expected.logits[:count]), count
        assert torch.equal(found.bits, expected.bits[:count]), count
        assert graphs.runs == made, count


class BlockBits(TorchDispatchMode):
    """Keeps the widths that every block is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.bits: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func.name().startswith("dfs::gated_block"):
            names = [argument.name for argument in func._schema.arguments]
            self.bits.append({**dict(zip(names, args, strict=False)), **given}["bits"].clone())
        return func(*args, **given)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("gate", ["rnn", "feedforward"])
def test_samples_that_only_fill_a_recording_are_skipped(
    gate: str, forced: bool, images: Tensor
) -> None:
    """And what an earlier call has left in its inputs has no effect."""
    engine = freeze(make_model(gate=gate), SIZE)
    executor = executor_of(engine, PlainCalls(), (8,))
    policy = torch.full((7, engine.gated_blocks), 4, dtype=torch.int32) if forced else None
    executor.run(images[:7], policy, None)
    few = None if policy is None else policy[:2]
    with BlockBits() as watched:
        found = executor.run(images[8:10], few, None)
    assert_same(found, engine(images[8:10], few))
    assert len(watched.bits) == engine.gated_blocks + 1
    for bits in watched.bits:
        assert bits[2:].tolist() == [0] * 6
    assert int(torch.stack(watched.bits)[:, :2].sum()) > 0


def test_a_later_call_leaves_earlier_results_alone(engine: Engine, images: Tensor) -> None:
    executor = executor_of(engine)
    first = executor.run(images[:4], None, None)
    kept = [first.logits.clone(), first.bits.clone()]
    second = executor.run(images[4:8], None, None)
    assert torch.equal(first.logits, kept[0])
    assert torch.equal(first.bits, kept[1])
    assert not torch.equal(first.logits, second.logits)


def test_the_recording_not_used_for_longest_goes_first(engine: Engine, images: Tensor) -> None:
    graphs = StandInGraphs()
    executor = executor_of(engine, graphs, (1, 2, 4), most_recordings=2)
    for count, made in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4)):
        found = executor.run(images[:count], None, None)
        assert torch.equal(found.logits, engine(images[:count]).logits)
        assert graphs.runs == made, count


def test_policies_and_pixels_have_recordings_of_their_own(images: Tensor) -> None:
    engine, graphs = freeze(make_model(), (12, 12), PIXELS), StandInGraphs()
    executor = executor_of(engine, graphs, (4,), torch.rand(3, 256))
    floats = torch.randn(4, 3, 12, 12)
    pixels = torch.zeros(4, 3, 12, 12, dtype=torch.uint8)
    policy = torch.full((4, engine.gated_blocks), 8, dtype=torch.int32)
    for _ in range(2):
        for some in (floats, pixels):
            executor.run(some, None, None)
            executor.run(some, policy, None)
    assert graphs.runs == 4


class OneAtATime(StandInGraphs):
    """Graphs that share their memory: slow, and spoilt by another one that runs meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.running = 0
        self.most_running = 0

    def record(self, run: Run) -> Run:
        replay = super().record(run)

        def slowly() -> NetworkOutput:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            time.sleep(0.005)
            output = replay()
            self.running -= 1
            return output

        return slowly


def test_several_threads_may_call_at_once(engine: Engine, images: Tensor) -> None:
    graphs = OneAtATime()
    executor, expected = executor_of(engine, graphs), engine(images)
    wrong: list[int] = []

    def work(first: int) -> None:
        for count in (1, 3, 4, 7) * 2:
            part = slice(first, first + count)
            found = executor.run(images[part], None, None)
            if not torch.equal(found.logits, expected.logits[part]):
                wrong.append(count)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert graphs.most_running == 1


def test_larger_feature_maps_are_recorded_for_fewer_samples(engine: Engine) -> None:
    assert recorded_batches(engine.graph) == tuple(2**i for i in range(11))
    wide = freeze(make_model(), (1024, 1024))
    assert recorded_batches(wide.graph)[-1] == 16


# Devices


def test_an_engine_is_on_the_cpu_at_first(engine: Engine, images: Tensor) -> None:
    assert engine.device == CPU
    assert engine.to("cpu") is engine
    assert engine(images).logits.device == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(engine: Engine, images: Tensor, tmp_path: Path) -> None:
    engine.save(tmp_path / "network.dfs")
    for ask in (
        lambda: engine.to("cuda"),
        lambda: engine.to(torch.device("cuda", 3)),
        lambda: load_engine(tmp_path / "network.dfs", device="cuda"),
    ):
        with pytest.raises(DeviceError, match="device cuda"):
            ask()
    assert engine.device == CPU
    assert engine(images).logits.shape == (len(images), 7)


@pytest.mark.parametrize("device", ["meta", "gpu"])
def test_devices_that_nothing_runs_on_are_refused(engine: Engine, device: str) -> None:
    with pytest.raises(ValueError, match="device"):
        engine.to(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_predict_says_where_an_engine_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    freeze(make_model(), (12, 12), PIXELS).save(tmp_path / "network.dfs")
    Image.new("RGB", (12, 12), (200, 30, 90)).save(tmp_path / "a.png")
    files = ["predict", str(tmp_path / "a.png"), "--engine", str(tmp_path / "network.dfs")]
    found = []
    for options in ([], ["--device", "cpu"]):
        code, printed, _ = run_dfs([*files, *options, "--json"], monkeypatch, capsys)
        assert code == 0
        found.append(json.loads(printed)["predictions"][0]["confidence"])
    assert found[0] == found[1]
    for device in ("cuda", "tpu"):
        code, _, errors = run_dfs([*files, "--device", device], monkeypatch, capsys)
        assert code == 2
        assert "device" in errors
        assert len(errors.splitlines()) == 1
