"""All contestants compute what they claim to, on layers that are small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench import rotation
from bench.contestants import CONTESTANTS, Unavailable, prepare
from bench.layers import Layer
from bench.rotation import Rotation, copies_to_rotate

pytest.importorskip("dfs_kernels._cpu")

LAYERS = (
    Layer("square", "square", 16, 16, 6, (4,)),
    Layer("strided", "strided", 16, 32, 8, (4,), stride=2),
    Layer("pointwise", "pointwise", 16, 24, 5, (4,), kernel=1, stride=2),
    Layer("depthwise", "depthwise", 24, 24, 6, (4,), groups=24),
    Layer("stem", "stem", 3, 16, 17, (4,), kernel=7, stride=2),
)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rotation, "last_level_cache", lambda: 4096)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("layer", LAYERS, ids=[layer.name for layer in LAYERS])
@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestant_passes_its_own_check(name: str, layer: Layer) -> None:
    try:
        prepared = prepare(name, layer, 4, torch.get_num_threads())
    except Unavailable as reason:
        pytest.skip(str(reason))
    prepared.check_and_warm_up()


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import ours

    real = ours.mixed_conv2d

    def off_by_one(*args: object, backend: str | None = None, **kwargs: object) -> object:
        result = real(*args, backend=backend, **kwargs)  # type: ignore[arg-type]
        if backend is None:
            result.data[-1, 0] += 1
        return result

    monkeypatch.setattr(ours, "mixed_conv2d", off_by_one)
    with pytest.raises(AssertionError):
        prepare("dfs_8", LAYERS[0], 4, 1).check()


def test_shape_arithmetic() -> None:
    stem = Layer("stem", "stem", 3, 64, 224, (1,), kernel=7, stride=2)
    assert stem.out_side == 112
    assert stem.macs == 64 * 112 * 112 * 3 * 49
    depthwise = Layer("depthwise", "depthwise", 96, 96, 28, (1,), groups=96)
    assert depthwise.macs == 96 * 28 * 28 * 9


def test_a_rotation_goes_round_and_keeps_one_result_for_each_input() -> None:
    call = Rotation(lambda x: [x], ["a", "b"])
    results = [call() for _ in range(3)]
    assert results == [["a"], ["b"], ["a"]]
    assert call._results[0] is results[2]
    assert call._results[1] is results[1]


def test_batches_rotate_over_more_than_the_cache_and_single_images_do_not() -> None:
    assert copies_to_rotate(1, 100) == 1
    assert copies_to_rotate(8, 0) == 1
    assert copies_to_rotate(8, 100) * 100 > 4096
    assert copies_to_rotate(8, 1e9) == 2
