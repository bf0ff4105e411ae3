"""Quantizing and dequantizing in float: values, gradients, layouts, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dfs_kernels._cpu as _cpu
import pytest
import torch
from torch import Tensor

from dfs_kernels import fake_quantize, reference
from dfs_kernels.widths import INTEGER_WIDTHS, activation_max
from tests.kernels.exactness import all_work_split
from tests.kernels.op_calls import calls_of, check_op

BACKENDS = ("reference", "cpu")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 0, 2, 1),
    "strided": lambda x: x[:, ::2, :, 1::3],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "empty": lambda x: x[:0],
    "scalar": lambda x: x[0, 0, 0, 0],
}


def drawn(bits: int, scale: float, count: int, seed: int = 0) -> Tensor:
    """Values in and out of range, ties and their neighbours, and what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    span = activation_max(bits)
    values = (torch.rand(count, generator=generator) * 3 - 1.5) * span * scale
    ties = (torch.randint(-span, span + 1, (count,), generator=generator) + 0.5) * scale
    kind = torch.randint(4, (count,), generator=generator)
    values = torch.where(kind == 0, ties, values)
    values = torch.where(kind == 1, torch.nextafter(ties, torch.tensor(0.0)), values)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, 1e-45])
    values[: len(special)] = special
    return values


def zero_points(bits: int) -> tuple[int, ...]:
    return (0, 1 << (bits - 1), activation_max(bits))


@pytest.fixture(params=_cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Any:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def test_values_are_those_of_the_reference(isa: str) -> None:
    for bits in INTEGER_WIDTHS:
        for scale in (0.37, 4 / 255, 2.0**-120, 2.0**100):
            x = drawn(bits, scale, 517, bits)
            for zero in zero_points(bits):
                step, zero_point = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
                expected = reference.fake_quantize(x, bits, step, zero_point)
                got = fake_quantize(x, step, zero_point, bits, backend="cpu")
                assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), (bits, zero)


def test_gradients_are_those_of_the_reference(isa: str) -> None:
    for bits in INTEGER_WIDTHS:
        x = drawn(bits, 0.11, 70_001, bits)[7:]
        grad = torch.randn(len(x), generator=torch.Generator().manual_seed(bits))
        for zero in zero_points(bits):
            zero_point = torch.tensor(zero, dtype=torch.int32)
            found = [gradients(x, grad, 0.11, zero_point, bits, name) for name in BACKENDS]
            (grad_x, grad_step), (own_x, own_step) = found
            assert torch.equal(own_x, grad_x), (bits, zero)
            # The same float32 terms, added up in float64 in another order, then rounded to float32.
            assert own_step.item() == pytest.approx(grad_step.item(), rel=2.0**-22, abs=1e-9)


def gradients(
    x: Tensor, grad: Tensor, scale: float, zero_point: Tensor, bits: int, backend: str
) -> tuple[Tensor, Tensor]:
    x, step = x.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
    fake_quantize(x, step, zero_point, bits, backend=backend).backward(grad)
    assert x.grad is not None
    assert step.grad is not None
    return x.grad, step.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_definition(backend: str) -> None:
    x = torch.tensor([-0.2, 0.0, 0.26, 0.74, 1.5, 1.6, 9.0])
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    got = gradients(x, grad, 0.5, torch.tensor(0, dtype=torch.int32), 2, backend)
    assert got[0].tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0]
    # x / step is -0.4, 0, 0.52, 1.48, 3, 3.2, 18; in range the slope is what rounding adds.
    slope = 3 * (1 - 0.52) + 4 * (1 - 1.48) + 6 * 3 + 7 * 3
    assert got[1].item() == pytest.approx(slope / (7 * 3) ** 0.5, rel=1e-6)


def test_a_value_that_is_not_a_number_is_the_lowest() -> None:
    x, step = torch.tensor([float("nan")], requires_grad=True), torch.tensor(0.5)
    y = fake_quantize(x, step, torch.tensor(3, dtype=torch.int32), 4, backend="cpu")
    y.backward(torch.ones(1))
    assert y.item() == -1.5
    assert x.grad is not None
    assert x.grad.item() == 0.0


def test_neither_threads_nor_instruction_sets_change_a_bit() -> None:
    x = torch.randn(3, 40, 33, 61)
    grad = torch.randn_like(x)
    step, zero_point = torch.tensor(0.03), torch.tensor(7, dtype=torch.int32)
    found = []
    before = torch.get_num_threads()
    with all_work_split():
        for name in _cpu.supported_isas():
            _cpu.set_isa(name)
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                grads = gradients(x, grad, 0.03, zero_point, 8, "cpu")
                found.append((fake_quantize(x, step, zero_point, 8, backend="cpu"), *grads))
    torch.set_num_threads(before)
    for values in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(values, found[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = LAYOUTS[layout](drawn(4, 0.2, 6 * 8 * 5 * 7).nan_to_num(0.1).view(6, 8, 5, 7))
    step, zero_point = torch.tensor(0.2), torch.tensor(8, dtype=torch.int32)
    expected = reference.fake_quantize(x.contiguous(), 4, step, zero_point)
    x, step = x.detach().requires_grad_(), step.requires_grad_()
    calls = calls_of(lambda: fake_quantize(x, step, zero_point, 4, backend=backend), monkeypatch)
    got = fake_quantize(x, step, zero_point, 4, backend=backend)
    assert got.stride() == torch.empty_like(x).stride()
    assert torch.equal(got, expected)
    # A gradient may be laid out in another way than the values are.
    grad = torch.randn(x.shape).transpose(-1, 0).contiguous().transpose(-1, 0) if x.dim() else None
    grads = torch.autograd.grad(got, (x, step), torch.ones(()) if grad is None else grad)
    wanted = reference.input_gradient(
        torch.ones(()) if grad is None else grad, x.detach(), 4, step.detach(), zero_point
    )
    assert torch.equal(grads[0], wanted[0])
    assert torch.allclose(grads[1], wanted[1], rtol=1e-6, atol=1e-9)
    for call in calls:
        check_op(*call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_gradient(backend: str) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    args = (torch.randn(2, 3, 4, 5), x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32))
    check_op(torch.ops.dfs.fake_quantize_backward.default, args, {"bits": 8, "backend": backend})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(50).to(dtype).requires_grad_()
    step, zero_point = torch.tensor(0.1), torch.tensor(128, dtype=torch.int32)
    y = fake_quantize(x, step, zero_point, 8)
    assert y.dtype == torch.float32
    assert torch.equal(y, reference.fake_quantize(x.detach().float(), 8, step, zero_point))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [
        ({"input": torch.zeros(3, dtype=torch.int32)}, TypeError, "input"),
        ({"input": 1.0}, TypeError, "input"),
        ({"scale": torch.ones(1)}, ValueError, "scale"),
        ({"scale": torch.tensor(0.0)}, ValueError, "scale"),
        ({"scale": torch.tensor(float("nan"))}, ValueError, "scale"),
        ({"zero_point": torch.tensor(0)}, TypeError, "zero_point"),
        ({"zero_point": torch.tensor(-1, dtype=torch.int32)}, ValueError, "zero_point"),
        ({"zero_point": torch.tensor(256, dtype=torch.int32)}, ValueError, "zero_point"),
        ({"bits": 0}, ValueError, "bits"),
        ({"bits": 17}, ValueError, "bits"),
        ({"bits": 32}, ValueError, "bits"),
        ({"bits": True}, ValueError, "bits"),
        ({"backend": "fastest"}, ValueError, "backend"),
    ],
)
def test_errors_name_the_argument(
    changed: dict[str, Any], error: type[Exception], named: str
) -> None:
    arguments: dict[str, Any] = {
        "input": torch.zeros(3),
        "scale": torch.tensor(0.1),
        "zero_point": torch.tensor(0, dtype=torch.int32),
        "bits": 8,
        **changed,
    }
    with pytest.raises(error, match=rf"^{named} "):
        fake_quantize(**arguments)
