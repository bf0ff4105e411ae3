"""Where the Triton backend can't run, and what it does with input that nobody could check."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dfs_kernels import available_backends, backends, mixed_conv2d, ops
from dfs_kernels.arguments import is_debugging
from dfs_kernels.backends import triton as backend
from tests.kernels.cases import TRITON_REASON, ConvCase, as_bits, build

needs_triton = pytest.mark.skipif("triton" not in available_backends(), reason=TRITON_REASON)


@pytest.fixture
def trials() -> Iterator[None]:
    """What was tried before, and told, is forgotten before and after."""
    announced = set(backends._announced)
    backends._announced.clear()
    for trial in (backend._gpu_fault, backend._interpreter_fault):
        trial.cache_clear()
    yield
    for trial in (backend._gpu_fault, backend._interpreter_fault):
        trial.cache_clear()
    backends._announced.clear()
    backends._announced.update(announced)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, trials: None) -> SimpleNamespace:
    """A GPU as far as anybody asks; what is set on it is answered."""
    answers = SimpleNamespace(capability=(9, 0), driver=lambda: None)
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(backend, "_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: answers.capability)
    monkeypatch.setattr(backend, "_load_driver", lambda: answers.driver())
    return answers


def fails(message: str) -> Callable[[], None]:
    def fail() -> None:
        raise RuntimeError(message)

    return fail


def chosen() -> str:
    return backends.select_name("mixed_conv2d", None, torch.device("cuda"), (2, 4, 8))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpus_with_int8_tensor_cores_take_it(
    gpu: SimpleNamespace, capability: tuple[int, int]
) -> None:
    gpu.capability = capability
    assert backend.unavailable_reason() is None
    assert chosen() == "triton"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_an_older_gpu_is_named(gpu: SimpleNamespace, capability: tuple[int, int]) -> None:
    gpu.capability = capability
    version = f"{capability[0]}.{capability[1]}"
    with pytest.raises(ValueError, match=f"'triton' can't run here.* capability {version}.* 8.0"):
        backends.use_backend("triton")


@pytest.mark.parametrize(
    "message", ["Failed to find C compiler.", "0 active drivers ([]). There should only be one."]
)
def test_a_missing_compiler_or_driver_is_told_once(gpu: SimpleNamespace, message: str) -> None:
    gpu.driver = fails(message)
    with pytest.warns(RuntimeWarning, match=re.escape(f"Triton can't launch kernels: {message}")):
        assert chosen() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == "reference"


def test_triton_itself_says_that_there_is_no_driver(trials: None) -> None:
    """As it does on a machine without one, where this is what a GPU would be asked."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match="driver"):
        backend._load_driver()


def test_without_triton_or_gpu(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(backend.unavailable_reason())
    monkeypatch.setattr(backend, "_INSTALLED", False)
    assert backend.unavailable_reason() == "triton is not installed"


def test_a_broken_interpreter_is_noticed(monkeypatch: pytest.MonkeyPatch, trials: None) -> None:
    def fail(*args: object) -> None:
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(backend, "_INSTALLED", True)
    monkeypatch.setattr(backend, "_INTERPRETED", True)
    monkeypatch.setattr(backend, "_sum_levels", fail)
    assert "interpreter fails: only 0-dimensional" in str(backend.unavailable_reason())


# Input


@needs_triton
@pytest.mark.parametrize("output", [{}, {"output_scale": {8: 0.1}, "output_bits": 8}])
def test_an_unknown_width_spoils_its_own_sample_or_raises_when_debugging(
    monkeypatch: pytest.MonkeyPatch, output: dict[str, object]
) -> None:
    """Where values may not be read, as on a GPU."""
    arguments = build(ConvCase(bits=(8, 2, 4))).arguments()
    expected = mixed_conv2d(**arguments, **output, backend="triton")
    arguments["bits"] = torch.tensor([8, 5, 4], dtype=torch.int32)
    monkeypatch.setattr(ops, "_may_read", lambda tensor: is_debugging())
    got = mixed_conv2d(**arguments, **output, backend="triton")
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        assert bool(got[1].isnan().all())
        pairs = [(as_bits(got), as_bits(expected))]
    else:
        assert not isinstance(got, Tensor)
        assert not isinstance(expected, Tensor)
        assert bool((got.data[1] == 0xFF).all())
        pairs = [(got.data, expected.data)]
    for a, b in pairs:
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    monkeypatch.setenv("DFS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"bits\[1\] is 5"):
        mixed_conv2d(**arguments, **output, backend="triton")


@needs_triton
def test_float64_is_refused_by_name_and_left_to_the_reference() -> None:
    x, weight = torch.randn(1, 2, 4, 4).double(), torch.randn(3, 2, 3, 3).double()
    with pytest.raises(TypeError, match="'triton' does not take float64"):
        mixed_conv2d(x, weight, 32, backend="triton")
    y = mixed_conv2d(x, weight, 32)
    assert isinstance(y, Tensor)
    assert y.dtype == torch.float64


@needs_triton
@pytest.mark.parametrize(("device", "options"), [("cuda", (2, 8)), ("meta", (2, 8)), ("cpu", (3,))])
def test_other_devices_and_widths_are_refused(device: str, options: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"'triton' does not take .* bits on {device} tensors"):
        backends.select_name("mixed_conv2d", "triton", torch.device(device), options)
