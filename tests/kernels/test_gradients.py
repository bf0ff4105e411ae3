"""Gradients: gradcheck at 32 bits, and the straight-through formulas at the integer widths.

The formulas are checked against fake quantization written here in float64 and left to autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_kernels import mixed_conv2d, quantize_pack, use_backend
from dfs_kernels.widths import default_levels
from tests.kernels.cases import OTHER_BACKENDS

BACKENDS = ("reference", *OTHER_BACKENDS)
OPTIONS = (2, 4, 8, 32)
CONVS: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "strided": {"padding": 1, "stride": 2},
    "asymmetric": {"padding": (2, 0, 1, 3), "stride": (2, 1)},
    "dilated": {"padding": 2, "dilation": (2, 1)},
    "unused_border": {"stride": 3},
    "grouped": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 4},
    "strided_depthwise": {"padding": 1, "stride": (2, 3), "groups": 4},
}


# All at 32 bits


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradcheck_at_32_bits(conv: dict[str, Any], activation: str | None) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    groups = conv.get("groups", 1)
    x, weight = draw(2, 4, 5, 4), draw(4, 4 // groups, 3, 2)
    bias, mul, add = draw(4), draw(1, 4), draw(1, 4)
    shape = mixed_conv2d(x, weight, 32, **conv).shape
    residual = draw(*shape)

    def run(*tensors: Tensor) -> Tensor:
        x, weight, bias, mul, add, residual = tensors
        result = mixed_conv2d(
            x,
            weight,
            32,
            bias=bias,
            mul=mul,
            add=add,
            residual=residual,
            activation=activation,
            backend="reference",
            **conv,
        )
        assert isinstance(result, Tensor)
        assert result.dtype == torch.float64
        return result

    assert torch.autograd.gradcheck(run, (x, weight, bias, mul, add, residual))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_gradients_do_not_depend_on_the_chosen_backend(backend: str) -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    with use_backend(backend):
        y = mixed_conv2d(x, weight, 32)
    assert isinstance(y, Tensor)
    (got,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(F.conv2d(x, weight).sum(), x)
    torch.testing.assert_close(got, expected)


# An independent construction


def scale_gradient(step: Tensor, factor: float) -> Tensor:
    return step * factor + (step - step * factor).detach()


def fake_quantized_input(x: Tensor, step: Tensor, bits: int, zero_point: int) -> Tensor:
    top = 2**bits - 1
    step = scale_gradient(step, (x.numel() * top) ** -0.5)
    t = (x / step).clamp(-zero_point, top - zero_point)
    return (t + (t.round() - t).detach()) * step


def fake_quantized_weight(weight: Tensor, steps: Tensor, bits: int) -> Tensor:
    reach = 2 ** (bits - 1)
    steps = scale_gradient(steps, (weight[0].numel() * reach) ** -0.5).view(-1, 1, 1, 1)
    if default_levels(bits) == "centred":
        t = (weight / steps - 0.5).clamp(-reach, reach - 1)
        codes = (weight / steps).floor().clamp(-reach, reach - 1)
        return (t + (codes - t).detach() + 0.5) * steps
    t = (weight / steps).clamp(-reach, reach - 1)
    return (t + (t.round() - t).detach()) * steps


@dataclass
class Problem:
    """Tensors of a training call, as float32 leaves that float64 represents exactly."""

    leaves: dict[str, Tensor]
    bits: Tensor
    zero_point: Tensor
    conv: dict[str, Any]
    relu: bool
    grad_output: Tensor

    def doubled(self) -> dict[str, Tensor]:
        return {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves.items()}


def make_problem(conv: dict[str, Any], bits: list[int], relu: bool, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    groups = conv.get("groups", 1)
    steps = uniform(0.1, 0.5, 4)
    zero_point = torch.tensor([1, 5, 100, 0], dtype=torch.int32)
    x = torch.randn(len(bits), 4, 7, 6, generator=generator)
    for n, width in enumerate(bits):
        if width in (0, 32):
            continue
        index, top = OPTIONS.index(width), 2**width - 1
        codes = torch.randint(-2, top + 3, x.shape[1:], generator=generator)
        # Away from ties, where float32 and float64 might round apart.
        x[n] = (codes - zero_point[index] + uniform(-0.4, 0.4, *x.shape[1:])) * steps[index]
    outputs = 8
    weight_steps = uniform(0.2, 0.6, 4, outputs)
    weight = uniform(-3, 3, outputs, 4 // groups, 3, 3)
    for index, width in enumerate(OPTIONS[:-1]):
        fraction = weight / weight_steps[index].view(-1, 1, 1, 1)
        boundary = fraction if width == 2 else fraction - 0.5
        assert (boundary - boundary.round()).abs().min() > 1e-5
    padding = conv.get("padding", 0)
    sides = padding if isinstance(padding, tuple) else (padding,) * 4
    shape = F.conv2d(
        F.pad(x, sides), weight, **{k: v for k, v in conv.items() if k != "padding"}
    ).shape
    leaves = {
        "input": x,
        "weight": weight,
        "input_scale": steps,
        "weight_scale": weight_steps,
        "bias": uniform(-1, 1, outputs),
        "mul": uniform(0.5, 1.5, 4, outputs),
        "add": uniform(-1, 1, 4, outputs),
        "residual": torch.randn(shape, generator=generator),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    return Problem(
        leaves,
        torch.tensor(bits),
        zero_point,
        conv,
        relu,
        torch.randn(shape, generator=generator),
    )


def gradients_of_op(problem: Problem, backend: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    y = mixed_conv2d(
        bits=problem.bits,
        input_zero_point=problem.zero_point,
        bit_options=OPTIONS,
        activation="relu" if problem.relu else None,
        backend=backend,
        **leaves,
        **problem.conv,
    )
    assert isinstance(y, Tensor)
    y.backward(problem.grad_output)
    grads = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.shape == leaf.shape
        grads[name] = leaf.grad
    return y.detach(), grads


def gradients_of_construction(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = problem.doubled()
    conv = {name: value for name, value in problem.conv.items() if name != "padding"}
    padding = problem.conv.get("padding", 0)
    sides = padding if isinstance(padding, tuple) else (padding,) * 4
    rows: list[Tensor | None] = [None] * len(problem.bits)
    for width in sorted(set(problem.bits.tolist())):
        chosen = [n for n, b in enumerate(problem.bits.tolist()) if b == width]
        residual = leaves["residual"][chosen]
        if width == 0:
            y = residual
        else:
            index = OPTIONS.index(width)
            x, weight = leaves["input"][chosen], leaves["weight"]
            if width != 32:
                x = fake_quantized_input(
                    x, leaves["input_scale"][index], width, int(problem.zero_point[index])
                )
                weight = fake_quantized_weight(weight, leaves["weight_scale"][index], width)
            y = F.conv2d(F.pad(x, sides), weight, leaves["bias"], **conv)
            y = y * leaves["mul"][index].view(-1, 1, 1) + leaves["add"][index].view(-1, 1, 1)
            y = y + residual
            y = y.relu() if problem.relu else y
        for row, n in enumerate(chosen):
            rows[n] = y[row]
    y = torch.stack([row for row in rows if row is not None])
    y.backward(problem.grad_output.double())
    grads = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
    return y.detach(), grads


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Element by element, allowing float32 sums of a few hundred terms."""
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            got[name].double(),
            value.double(),
            rtol=2e-4,
            atol=2e-5 * scale + 1e-30,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "bits", [[2, 2], [4, 4], [8, 8], [32, 32], [0, 0], [8, 0, 2, 32, 4, 2, 0, 8]], ids=str
)
def test_gradients_equal_those_of_fake_quantization(
    bits: list[int], relu: bool, conv: dict[str, Any], backend: str
) -> None:
    problem = make_problem(conv, bits, relu, seed=len(bits) + sum(bits))
    y, got = gradients_of_op(problem, backend)
    expected_y, expected = gradients_of_construction(problem)
    torch.testing.assert_close(
        y.double(), expected_y, rtol=1e-4, atol=1e-5 * float(expected_y.abs().max())
    )
    assert_all_close(got, expected)


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
def test_backward_of_a_larger_layer(backend: str) -> None:
    """Against the reference, where several bands, panels and threads are at work."""
    torch.manual_seed(3)
    steps = torch.tensor([0.7, 0.2, 0.02])
    grads = []
    leaves = {
        "input": torch.randn(6, 24, 19, 33),
        "weight": torch.randn(40, 24, 3, 3) * 0.1,
        "weight_scale": torch.full((3, 40), 1.0) * torch.tensor([[0.1], [0.03], [0.002]]),
        "input_scale": steps,
        "mul": torch.rand(4, 40) + 0.5,
    }
    dy = torch.randn(6, 40, 19, 33).to(memory_format=torch.channels_last)
    for name in ("reference", backend):
        fresh = {key: value.clone().requires_grad_() for key, value in leaves.items()}
        y = mixed_conv2d(
            bits=torch.tensor([2, 4, 8, 32, 0, 8]),
            bit_options=OPTIONS,
            input_zero_point=torch.tensor([2, 8, 128]),
            padding=1,
            backend=name,
            **fresh,
        )
        assert isinstance(y, Tensor)
        y.backward(dy)
        grads.append({key: value.grad for key, value in fresh.items()})
    assert_all_close(grads[1], grads[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_sample_passes_its_gradient_to_the_residual_only(backend: str) -> None:
    problem = make_problem({"padding": 1}, [0, 4, 0], True, seed=5)
    _, grads = gradients_of_op(problem, backend)
    _, alone = gradients_of_op(make_problem({"padding": 1}, [0, 0], True, seed=5), backend)
    skipped = [0, 2]
    assert torch.equal(grads["residual"][skipped], problem.grad_output[skipped])
    assert not grads["input"][skipped].any()
    assert grads["input"][1].any()
    for name, value in alone.items():
        assert bool(value.any()) == (name == "residual"), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_gradient_of_a_batch_is_the_sum_over_its_widths(backend: str) -> None:
    bits = [2, 32, 4, 8, 2, 0]
    problem = make_problem({"padding": 1}, bits, False, seed=11)
    _, whole = gradients_of_op(problem, backend)
    total = torch.zeros_like(whole["weight"], dtype=torch.float64)
    for width in (2, 4, 8, 32):
        chosen = [n for n, b in enumerate(bits) if b == width]
        part = Problem(
            {
                name: leaf.detach()[chosen] if name in ("input", "residual") else leaf.detach()
                for name, leaf in problem.leaves.items()
            },
            problem.bits[chosen],
            problem.zero_point,
            problem.conv,
            problem.relu,
            problem.grad_output[chosen],
        )
        _, grads = gradients_of_op(part, backend)
        assert torch.equal(grads["input"], whole["input"][chosen])
        total += grads["weight"].double()
    torch.testing.assert_close(
        whole["weight"].double(), total, rtol=1e-5, atol=1e-6 * float(total.abs().max())
    )


def test_relu_stops_the_gradient_where_the_output_is_zero() -> None:
    problem = make_problem({"padding": 1}, [4, 8], True, seed=7)
    y, grads = gradients_of_op(problem, "reference")
    closed = y == 0
    assert closed.any()
    assert torch.equal(grads["residual"], problem.grad_output.masked_fill(closed, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_not_wanted_are_not_made(backend: str) -> None:
    problem = make_problem({"padding": 1}, [4, 8], False, seed=7)
    _, everything = gradients_of_op(problem, backend)
    for wanted in problem.leaves:
        leaves = {name: leaf.detach().clone() for name, leaf in problem.leaves.items()}
        leaves[wanted].requires_grad_()
        y = mixed_conv2d(
            bits=problem.bits,
            input_zero_point=problem.zero_point,
            bit_options=OPTIONS,
            padding=1,
            backend=backend,
            **leaves,
        )
        assert isinstance(y, Tensor)
        y.backward(problem.grad_output)
        for name, leaf in leaves.items():
            if name == wanted:
                assert leaf.grad is not None
                assert torch.equal(leaf.grad, everything[name])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_gradient_is_read_by_its_strides(backend: str) -> None:
    problem = make_problem({"padding": 1}, [4, 32], False, seed=9)
    problem.grad_output = torch.ones(()).expand(problem.grad_output.shape)
    _, got = gradients_of_op(problem, backend)
    problem.grad_output = problem.grad_output.contiguous()
    _, expected = gradients_of_op(problem, backend)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_half_precision_parameters_get_gradients_of_their_dtype() -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float16, requires_grad=True)
    y = mixed_conv2d(x, weight, 8, {8: 0.05}, {8: 128}, weight_scale={8: torch.full((3,), 0.02)})
    assert isinstance(y, Tensor)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float16


def test_backward_through_a_packed_input_says_why_not() -> None:
    packed = quantize_pack(torch.randn(1, 2, 4, 4), 8, 0.1)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    y = mixed_conv2d(packed, weight, 8, weight_scale={8: torch.full((3,), 0.02)})
    assert isinstance(y, Tensor)
    with pytest.raises(RuntimeError, match="need a float input, got a packed one"):
        y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_gradients_through_a_packed_weight(backend: str) -> None:
    from dfs_kernels import PackedConvWeight

    problem = make_problem({"padding": 1}, [2, 4, 8, 32], False, seed=13)
    _, expected = gradients_of_op(problem, "reference")
    weight = PackedConvWeight.from_float(problem.leaves["weight"], problem.leaves["weight_scale"])
    leaves = {
        name: leaf.detach()
        for name, leaf in problem.leaves.items()
        if name not in ("weight", "weight_scale", "input")
    }
    x = problem.leaves["input"].detach().clone().requires_grad_()
    y = mixed_conv2d(
        x,
        weight,
        problem.bits,
        input_zero_point=problem.zero_point,
        padding=1,
        backend=backend,
        **leaves,
    )
    assert isinstance(y, Tensor)
    y.backward(problem.grad_output)
    assert x.grad is not None
    assert_all_close({"input": x.grad}, {"input": expected["input"]})
