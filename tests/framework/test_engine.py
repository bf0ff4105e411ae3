"""The engine: equal to the network it was frozen from, whatever the batch, threads and callers."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfs import Engine, freeze, load_engine
from dfs.data import Preprocessing
from dfs.models import PAPER, DynamicResNet
from dfs_kernels import backend_info, use_backend
from tests.framework.engine_networks import lively_network, small_bottlenecks

SIZE = (12, 10)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fast": {},
    "feedforward": {"gate": "feedforward"},
    "deviation": {"gate": "feedforward", "gate_options": {"deviation": True}},
    "constant": {"gate": "constant"},
    "two choices": {"choices": (0, 8)},
    "never skipped": {"choices": (2, 8)},
    "minmax": {"quantizer": "minmax"},
    "float stream": {"stream": "float32"},
    "bottlenecks": {"architecture": "bottlenecks"},
}


def make_model(architecture: Any = 14, **options: Any) -> DynamicResNet:
    """A network in evaluation mode whose decisions differ between images and blocks."""
    torch.manual_seed(5)
    shape = small_bottlenecks(3) if architecture == "bottlenecks" else architecture
    return lively_network(shape, 3, **options)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(9, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return freeze(make_model(), SIZE)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equals_the_eager_network_on_the_reference(name: str, images: Tensor) -> None:
    model = make_model(**CONFIGURATIONS[name])
    engine = freeze(model, SIZE)
    with use_backend("reference"):
        expected = model.run(images)
    found = engine(images)
    assert torch.equal(found.bits, expected.bits)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.bits.unique()) > 1
    for policy in model.choices:
        with use_backend("reference"):
            logits = model(images, policy)
        forced = engine(images, policy)
        assert torch.equal(forced.logits, logits), policy
        assert bool((forced.bits == policy).all())
    mixed = torch.randint(len(model.choices), (len(images), model.gated_blocks))
    policy = torch.tensor(model.choices)[mixed]
    with use_backend("reference"):
        assert torch.equal(engine(images, policy).logits, model(images, policy))


def test_equals_the_eager_network_at_32_bits_on_the_same_kernels(images: Tensor) -> None:
    """Float sums differ between backends; on one backend they don't."""
    model = make_model(choices=(0, 4, 32), stream="float32", ungated_bits=32)
    engine = freeze(model, SIZE)
    with use_backend("cpu"):
        expected = model.run(images)
        logits = model(images, 32)
    found = engine(images)
    assert torch.equal(found.bits, expected.bits)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(engine(images, 32).logits, logits, rtol=1e-5, atol=1e-5)


def test_cost_is_the_papers(engine: Engine, images: Tensor) -> None:
    found = engine(images)
    expected = (found.bits.double() / 32).square().mean(1)
    assert torch.equal(found.cost, expected)
    assert float(engine(images, 8).cost[0]) == (8 / 32) ** 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_sample_depends_on_neither_batch_nor_threads(
    engine: Engine, images: Tensor, count: int, threads: None
) -> None:
    expected = engine(images)
    torch.set_num_threads(count)
    order = torch.randperm(len(images))
    shuffled = engine(images[order])
    assert torch.equal(shuffled.logits, expected.logits[order])
    assert torch.equal(shuffled.bits, expected.bits[order])
    for n in range(3):
        alone = engine(images[n : n + 1])
        assert torch.equal(alone.logits[0], expected.logits[n])
        assert torch.equal(alone.bits[0], expected.bits[n])


def test_images_of_any_strides(engine: Engine, images: Tensor) -> None:
    expected = engine(images).logits
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(engine(last).logits, expected)
    wide = torch.randn(len(images), 3, SIZE[0], 2 * SIZE[1])
    wide[..., ::2] = images
    assert torch.equal(engine(wide[..., ::2]).logits, expected)


PREPROCESSING = Preprocessing(12, 13, (0.49, 0.48, 0.44), (0.2, 0.1, 0.3), tuple("abcdefg"))
PIXELS = torch.randint(256, (5, 3, 12, 12), dtype=torch.uint8)
PIXELS.view(5, 3, -1)[:2, :, :128] = torch.arange(256, dtype=torch.uint8).view(2, 1, 128)


@pytest.fixture(scope="module", params=[8, 32], ids=["8bits", "32bits"])
def pixel_engine(request: pytest.FixtureRequest) -> Engine:
    """With a stem that multiplies codes, or floats."""
    return freeze(make_model(ungated_bits=request.param), (12, 12), PREPROCESSING)


def test_pixels_give_what_their_normalized_floats_give(pixel_engine: Engine) -> None:
    expected = pixel_engine(PREPROCESSING.normalize(PIXELS))
    assert len(expected.bits.unique()) > 1
    last = PIXELS.contiguous(memory_format=torch.channels_last)
    wide = torch.zeros(5, 3, 24, 12, dtype=torch.uint8)
    wide[:, :, ::2] = PIXELS
    for given in (PIXELS, last, wide[:, :, ::2], PIXELS.flip(0).flip(0)):
        found = pixel_engine(given)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.bits, expected.bits)
    grey = PIXELS[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(
        pixel_engine(grey).logits, pixel_engine(PREPROCESSING.normalize(grey)).logits
    )


def test_pixels_make_no_float_image(pixel_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pixel_engine(PIXELS).logits
    monkeypatch.setattr(Preprocessing, "normalize", None)
    assert torch.equal(pixel_engine(PIXELS).logits, expected)
    with torch.profiler.profile(profile_memory=True) as record:
        pixel_engine(PIXELS)
    largest = max(event.self_cpu_memory_usage for event in record.events())
    assert 0 < largest < PIXELS.numel()


def test_pixels_survive_a_file(pixel_engine: Engine, tmp_path: Path) -> None:
    pixel_engine.save(tmp_path / "network.dfs")
    loaded = load_engine(tmp_path / "network.dfs")
    assert torch.equal(loaded(PIXELS).logits, pixel_engine(PIXELS).logits)


def test_pixels_without_a_preprocessing_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="frozen without a preprocessing"):
        engine(torch.zeros(1, 3, *SIZE, dtype=torch.uint8))


def test_a_preprocessing_that_overflows_is_refused() -> None:
    odd = replace(PREPROCESSING, mean=(0.5, 1e39, 0.5))
    with pytest.raises(ValueError, match="preprocessing makes pixels into values that are not"):
        freeze(make_model(), (12, 12), odd)


@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_threads_is_pytorchs(
    engine: Engine, images: Tensor, count: int, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    native = engine._executor._engine

    class Spy:
        def run(self, *arguments: Any) -> None:
            given.append(arguments[-1])
            native.run(*arguments)

    monkeypatch.setattr(engine._executor, "_engine", Spy())
    torch.set_num_threads(count)
    engine(images)
    engine.timed(images)
    assert given == [count, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_several_threads_may_call_at_once(
    engine: Engine, images: Tensor, count: int, threads: None
) -> None:
    """Batches of several sizes at once, each caller's on ``count`` threads."""
    expected = engine(images).logits
    results: list[Tensor] = []

    def work(size: int) -> None:
        torch.set_num_threads(count)
        for _ in range(20):
            results.append(torch.cat([engine(part).logits for part in images.split(size)]))

    workers = [threading.Thread(target=work, args=(size,)) for size in (1, 2, 4, len(images))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_can_go_on(engine: Engine, images: Tensor, threads: None) -> None:
    torch.set_num_threads(2)
    expected = engine(images).logits
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(engine(images).logits, expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_image_that_is_not_finite_spoils_only_itself(
    engine: Engine, images: Tensor, value: float
) -> None:
    expected = engine(images)
    broken = images.clone()
    broken[2, 1, 3, 4] = value
    found = engine(broken)
    assert bool(found.logits[2].isnan().all())
    assert found.bits[2].tolist() == [0] * engine.gated_blocks
    rest = [n for n in range(len(images)) if n != 2]
    assert torch.equal(found.logits[rest], expected.logits[rest])
    assert torch.equal(found.bits[rest], expected.bits[rest])


def test_an_empty_batch(engine: Engine) -> None:
    found = engine(torch.empty(0, 3, *SIZE))
    assert found.logits.shape == (0, 7)
    assert found.bits.shape == (0, engine.gated_blocks)
    assert found.cost.shape == (0,)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([1.0], TypeError, "images must be a tensor"),
        (torch.zeros(1, 3, *SIZE, dtype=torch.float64), TypeError, "images must be float32"),
        (torch.zeros(1, 4, *SIZE), ValueError, "images must be"),
        (torch.zeros(1, 3, 12, 11), ValueError, "images must be"),
        (torch.zeros(3, *SIZE), ValueError, "images must be"),
        (torch.zeros(1, 3, *SIZE, device="meta"), ValueError, "images must be on the CPU"),
    ],
)
def test_wrong_images_are_refused(
    engine: Engine, images: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine(images)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (3, ValueError, "policy is 3, which is not one of"),
        (True, TypeError, "policy must be None, an int or a tensor"),
        (torch.zeros(9, 5), TypeError, "policy must be an integer tensor"),
        (torch.zeros(9, 4, dtype=torch.int32), ValueError, "policy must have shape"),
        (torch.full((9, 5), 2**32 + 8), ValueError, r"policy\[0, 0\] is 4294967304"),
    ],
)
def test_wrong_policies_are_refused(
    engine: Engine, images: Tensor, policy: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine(images, policy)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: make_model().train(), ValueError, "training mode"),
        (lambda: make_model(choices=(0, 3, 8)), ValueError, r"choices \(3,\) only simulate"),
        (lambda: make_model(**PAPER), ValueError, "only simulate"),
        (lambda: torch.nn.Linear(1, 1), TypeError, "model must be a DynamicResNet"),
    ],
)
def test_what_cannot_be_frozen_is_named(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        freeze(model(), SIZE)


def test_images_that_shrink_to_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size"):
        freeze(make_model("bottlenecks"), (0, 8))
    with pytest.raises(ValueError, match="image_size must be"):
        freeze(make_model(), (8,))


@pytest.mark.parametrize("name", ["fast", "feedforward", "constant", "bottlenecks"])
def test_a_file_gives_the_same_engine_back(name: str, images: Tensor, tmp_path: Path) -> None:
    engine = freeze(make_model(**CONFIGURATIONS[name]), SIZE)
    engine.save(tmp_path / "network.dfs")
    loaded = load_engine(tmp_path / "network.dfs")
    assert loaded.graph == engine.graph
    for got, expected in zip(loaded(images), engine(images), strict=True):
        assert torch.equal(got, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["network.dfs"]


@pytest.mark.parametrize("choices", [(0, 2, 4, 8), (0, 8), (0, 2, 32)])
def test_weights_take_what_their_widths_take(choices: tuple[int, ...]) -> None:
    """A float copy is kept for 32 bits, and for nothing else."""
    engine = freeze(make_model(choices=choices), SIZE)
    sizes = [(layer.widths, math.prod(layer.weight_shape)) for layer in engine.graph.layers()]
    float_copy = 4 * sum(count for _, count in sizes)
    floats = 4 * sum(count for widths, count in sizes if 32 in widths)
    assert (floats > 0) == (32 in choices)
    packed = sum(layer.layout.offsets()[-1] for layer in engine.graph.layers())
    # Channels begin at whole bytes.
    assert packed < 1.01 * sum(count * sum(widths) / 8 for widths, count in sizes)
    assert packed < engine.nbytes < packed + 0.1 * float_copy
    # As they are held for running, but for vectors of floats that have lanes to spare, and without
    # VNNI two bytes for each integer width of a layer.
    isa = backend_info()["cpu"]["isa"]
    spare = 4 * 16 * 64 if floats else 0
    if isa == "avx2":
        spare += sum(2 * len(set(widths) - {32}) for widths, _ in sizes)
    if isa != "scalar":
        assert engine.weight_bytes() <= packed + spare


def test_a_profile_covers_every_block(engine: Engine, images: Tensor) -> None:
    profile = engine.profile(images[:2], rounds=3)
    assert [line.name for line in profile][:2] == ["stem", "block 0"]
    assert profile[-1].name == "classifier"
    assert len(profile) == len(engine.graph.architecture.blocks) + 2
    assert all(line.milliseconds > 0 for line in profile)
    assert sum(line.share for line in profile) == pytest.approx(1)
    with pytest.raises(ValueError, match="rounds must be positive"):
        engine.profile(images, rounds=0)
