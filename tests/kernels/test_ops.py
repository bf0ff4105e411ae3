"""The registered ops as torch sees them: schemas, fakes, compilation, autocast, strides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dfs.nn import DFSConv2d
from dfs_kernels import (
    PackedActivation,
    PackedConvWeight,
    mixed_conv2d,
    mixed_conv2d_,
    pack_bits,
    quantize_pack,
    unpack_bits,
    unpack_dequantize,
    use_backend,
)
from tests.kernels.cases import (
    OTHER_BACKENDS,
    WITH_TRITON,
    ConvCase,
    as_bits,
    build,
    sample_bits,
)
from tests.kernels.op_calls import calls_of, check_op, checkable_forms

BACKENDS = ("reference", *OTHER_BACKENDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_triton = pytest.mark.parametrize("backend", ["reference", *WITH_TRITON])
BITS = (8, 0, 2, 32, 4)


@with_triton
def test_opcheck_of_packing(backend: str) -> None:
    for bits in (2, 4, 8):
        codes = torch.randint(0, 1 << bits, (2, 3, 5)).to(torch.uint8)
        check_op(torch.ops.dfs.pack_bits.default, (codes, bits), {"backend": backend})
        packed = pack_bits(codes, bits)
        for signed in (False, True):
            check_op(
                torch.ops.dfs.unpack_bits.default, (packed, bits, 5, signed), {"backend": backend}
            )


@with_triton
def test_opcheck_of_activations(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3, 2, 4)
    scale = torch.tensor([0.5, 0.2, 0.02, 1.0])
    bits = torch.tensor(BITS)
    packed = quantize_pack(x, bits, scale, backend=backend)
    packed.data[1] = 0  # unspecified, so that two runs may be compared
    for run in (
        lambda: quantize_pack(x[[0, 2, 3, 4]], bits[[0, 2, 3, 4]], scale, backend=backend),
        lambda: unpack_dequantize(packed, backend=backend),
    ):
        for op, args, kwargs in calls_of(run, monkeypatch):
            # Bytes beyond a sample's width are unspecified too.
            if op is torch.ops.dfs.quantize_pack.default:
                args = (args[0], torch.full_like(args[1], 32), *args[2:])
            check_op(op, args, kwargs)


@with_triton
def test_opcheck_of_retiling(backend: str) -> None:
    built = build(ConvCase(bits=(8,)))
    check_op(
        torch.ops.dfs.retile_weight.default,
        (built.packed_weight.buffer, built.packed_weight.scales),
        {
            "bit_options": [2, 4, 8, 32],
            "centred": [True, False, False, False],
            "backend": backend,
            "variant": "any",
            **built.case.geometry.fields(),
        },
    )


def forms_by_backend() -> list[tuple[str, str, str | None, str, bool]]:
    """All of them for each backend; a third for Triton where it is slow."""
    found = []
    for backend in ("reference", *WITH_TRITON):
        step = 1 if backend in BACKENDS else 3
        found += [(backend, *form) for form in checkable_forms()[::step]]
    return found


@pytest.mark.parametrize(
    ("backend", "input_form", "residual_form", "output_form", "packed_weight"), forms_by_backend()
)
def test_opcheck_of_mixed_convolution(
    backend: str,
    input_form: str,
    residual_form: str | None,
    output_form: str,
    packed_weight: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = ConvCase(
        bits=BITS,
        input_form=input_form,
        residual_form=residual_form,
        output_form=output_form,
        packed_weight=packed_weight,
        relu=True,
    )
    arguments = {**build(case).arguments(), "backend": backend}
    if output_form == "in_place":
        run: Callable[[], object] = lambda: mixed_conv2d_(  # noqa: E731
            **{name: v for name, v in arguments.items() if not name.startswith("output")}
        )
    else:
        run = lambda: mixed_conv2d(**arguments)  # noqa: E731
    for op, args, kwargs in calls_of(run, monkeypatch):
        check_op(op, args, kwargs)


@with_triton
def test_opcheck_of_training(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(ConvCase(bits=BITS, packed_weight=False, residual_form="float", relu=True))
    arguments = built.arguments()
    for name in (
        "input",
        "weight",
        "weight_scale",
        "input_scale",
        "bias",
        "mul",
        "add",
        "residual",
    ):
        arguments[name] = arguments[name].clone().requires_grad_()
    ((op, args, kwargs),) = calls_of(
        lambda: mixed_conv2d(**arguments, backend=backend), monkeypatch
    )
    kwargs = {
        name: v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for name, v in kwargs.items()
    }
    check_op(op, args, {**kwargs, "backward_backend": backend})


@with_triton
def test_opcheck_of_backward(backend: str) -> None:
    built = build(ConvCase(bits=BITS, packed_weight=False))
    assert isinstance(built.input, Tensor)
    assert built.input_quantizer is not None
    tensors = (
        torch.randn(built.case.output_shape),
        built.input,
        built.weight,
        built.bits,
        built.input_quantizer.scale,
        built.input_quantizer.zero_point,
        built.packed_weight.scales,
        built.bias,
        built.mul,
    )
    for needs in ((True,) * 6, (True, False, False, True, False, True)):
        names = ("input", "weight", "input_scale", "weight_scale", "mul", "add")
        check_op(
            torch.ops.dfs.mixed_conv2d_backward.default,
            tensors,
            {
                **{f"needs_{name}": need for name, need in zip(names, needs, strict=True)},
                "bit_options": [2, 4, 8, 32],
                "centred": [True, False, False, False],
                "backend": backend,
                **built.case.geometry.fields(),
            },
        )


# Compilation


@with_triton
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("output_form", ["float", "fixed"])
@pytest.mark.parametrize("input_form", ["contiguous", "packed", "requantized"])
def test_the_function_compiles_without_breaks(
    backend: str, input_form: str, output_form: str
) -> None:
    case = ConvCase(
        bits=BITS, input_form=input_form, output_form=output_form, residual_form="float"
    )
    built = build(case)
    arguments = {**built.arguments(), "backend": backend}
    names = ("input", "bits", "residual")
    fixed = {name: value for name, value in arguments.items() if name not in names}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(input: Any, bits: Tensor, residual: Any) -> Any:
        return mixed_conv2d(input=input, bits=bits, residual=residual, **fixed)

    got = run(*(arguments[name] for name in names))
    expected = mixed_conv2d(**arguments)
    for n in range(len(BITS)):
        assert torch.equal(sample_bits(got, n), sample_bits(expected, n))


@with_triton
@pytest.mark.usefixtures("compiler")
def test_packing_functions_compile_without_breaks(backend: str) -> None:
    x = torch.randn(3, 5, 2, 2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = quantize_pack(x, 4, 0.2, 8, backend=backend)
        values = unpack_dequantize(packed, backend=backend)
        codes = unpack_bits(packed.data.view(3, 4, 3), 4, 5, signed=False, backend=backend)
        return values, codes, pack_bits(codes, 4, backend=backend)

    values, codes, again = run(x)
    packed = quantize_pack(x, 4, 0.2, 8, backend="reference")
    assert torch.equal(values, unpack_dequantize(packed))
    assert torch.equal(again.flatten(1), packed.data)
    assert codes.dtype == torch.uint8


@with_triton
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("residual_form", ["float", "packed"])
def test_in_place_compiles_without_breaks(backend: str, residual_form: str) -> None:
    arguments = build(ConvCase(bits=BITS, residual_form=residual_form, relu=True)).arguments()
    expected = arguments.pop("residual").clone()
    target = expected.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(residual: Any) -> None:
        mixed_conv2d_(residual=residual, **arguments, backend=backend)

    run(target)
    before = expected.clone()
    mixed_conv2d_(residual=expected, **arguments, backend=backend)
    for n, width in enumerate(BITS):
        assert torch.equal(sample_bits(target, n), sample_bits(expected, n))
        changed = not torch.equal(sample_bits(expected, n), sample_bits(before, n))
        assert changed == (width != 0)


def layer_step(layer: DFSConv2d, run: Any, x: Tensor, bits: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x, bits)
    y.square().sum().backward()
    grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert x.grad is not None
    return [y.detach(), x.grad, *grads]


@with_triton
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_layer_compiles_without_breaks(backend: str, training: bool, mode: str) -> None:
    layer = DFSConv2d(3, 4, 3, padding=1).train(training)
    x, bits = torch.randn(5, 3, 6, 6), torch.tensor(BITS)
    with use_backend(backend):
        compiled = torch.compile(layer, fullgraph=True, backend=mode)
        got = layer_step(layer, compiled, x, bits)
        expected = layer_step(layer, layer, x, bits)
    assert len(got) == len(expected) == (6 if training else 4)
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("compiler")
def test_a_layer_in_eval_compiles_before_it_was_ever_packed() -> None:
    layer = DFSConv2d(3, 4, 3).eval()
    layer.repack()
    x, bits = torch.randn(2, 3, 6, 6), torch.tensor([2, 8])
    with torch.no_grad():
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, bits)
        assert torch.equal(got, layer(x, bits))


@pytest.mark.usefixtures("compiler")
def test_compiled_code_takes_other_batch_sizes() -> None:
    layer = DFSConv2d(3, 4, 3).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch, size in ((2, 6), (5, 6), (7, 9), (1, 8)):
            x = torch.randn(batch, 3, size, size)
            bits = torch.tensor(BITS).repeat(2)[:batch]
            assert torch.equal(compiled(x, bits), layer(x, bits))


# Autocast and dtypes


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    built = build(ConvCase(bits=BITS, residual_form="float"))
    arguments = {**built.arguments(), "backend": backend}
    expected = mixed_conv2d(**arguments)
    with torch.autocast("cpu", dtype=dtype):
        got = mixed_conv2d(**arguments)
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    assert got.dtype == torch.float32
    assert torch.equal(as_bits(got), as_bits(expected))


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_upcast_exactly(backend: str, dtype: torch.dtype) -> None:
    built = build(ConvCase(bits=BITS, residual_form="float", packed_weight=False))
    arguments = {**built.arguments(), "backend": backend}
    for name in ("input", "weight", "residual", "bias"):
        arguments[name] = arguments[name].to(dtype)
    got = mixed_conv2d(**arguments)
    for name in ("input", "weight", "residual", "bias"):
        arguments[name] = arguments[name].float()
    expected = mixed_conv2d(**arguments)
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    assert got.dtype == torch.float32
    assert torch.equal(as_bits(got), as_bits(expected))


@every_backend
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
def test_bits_of_any_integer_type(backend: str, dtype: torch.dtype) -> None:
    arguments = {**build(ConvCase(bits=BITS)).arguments(), "backend": backend}
    expected = mixed_conv2d(**arguments)
    got = mixed_conv2d(**{**arguments, "bits": arguments["bits"].to(dtype)})
    strided = arguments["bits"].to(dtype).repeat_interleave(2)[::2]
    again = mixed_conv2d(**{**arguments, "bits": strided})
    assert isinstance(got, Tensor)
    assert isinstance(again, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(as_bits(got), as_bits(expected))
    assert torch.equal(as_bits(again), as_bits(expected))


@every_backend
@pytest.mark.parametrize("width", [0, 2, 4, 8, 32])
def test_an_int_for_all_samples(backend: str, width: int) -> None:
    arguments = {**build(ConvCase(bits=(width,) * 3)).arguments(), "backend": backend}
    expected = mixed_conv2d(**arguments)
    got = mixed_conv2d(**{**arguments, "bits": width})
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(as_bits(got), as_bits(expected))


# Strides and fakes


def image(form: str, shape: tuple[int, int, int, int] = (2, 3, 4, 5)) -> Tensor:
    x = torch.randn(shape)
    if form == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if form == "both":
        return torch.randn(2, 3, 1, 1)
    if form == "transposed":
        return torch.randn(2, 3, 5, 4).transpose(2, 3)
    return x


def strides_expected(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    last = form == "channels_last"
    return torch.empty(
        shape, memory_format=torch.channels_last if last else torch.contiguous_format
    ).stride()


@every_backend
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "both", "transposed"])
def test_the_result_is_channels_last_only_if_the_input_is(backend: str, form: str) -> None:
    x = image(form)
    weight = torch.randn(4, 3, 1, 1)
    scales: dict[str, Any] = {
        "input_scale": {8: 0.1},
        "weight_scale": {8: torch.ones(4)},
        "backend": backend,
    }
    y = mixed_conv2d(x, weight, 8, **scales)
    assert isinstance(y, Tensor)
    assert y.stride() == strides_expected(form, y.shape)
    residual = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    again = mixed_conv2d(x, weight, 8, residual=residual, **scales)
    assert isinstance(again, Tensor)
    assert again.stride() == y.stride()
    half = mixed_conv2d(x.half(), weight, 8, **scales)
    assert isinstance(half, Tensor)
    assert half.stride() == y.stride()


@every_backend
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "both", "transposed"])
def test_fakes_tell_shape_dtype_and_strides(backend: str, form: str) -> None:
    weight = torch.randn(4, 3, 1, 1)
    mode = FakeTensorMode(allow_non_fake_inputs=False)

    def run(x: Tensor, weight: Tensor, bits: Tensor, scale: Tensor) -> list[Tensor]:
        arguments: dict[str, Any] = {
            "weight_scale": scale[:, None].expand(3, 4),
            "padding": (1, 0, 2, 0),
            "stride": 2,
            "backend": backend,
        }
        y = mixed_conv2d(x, weight, bits, scale, **arguments)
        own = mixed_conv2d(x, weight, bits, scale, output_scale=scale.new_ones(4), **arguments)
        eight = mixed_conv2d(
            x, weight, bits, scale, output_scale={8: scale[2]}, output_bits=8, **arguments
        )
        packed = quantize_pack(x, bits, scale, bit_options=(2, 4, 8), backend=backend)
        assert isinstance(y, Tensor)
        assert isinstance(own, PackedActivation)
        assert isinstance(eight, PackedActivation)
        return [y, own.data, eight.data, packed.data, unpack_dequantize(packed, backend=backend)]

    arguments = (image(form), weight, torch.tensor([8, 2]), torch.tensor([0.5, 0.2, 0.1]))
    real = run(*arguments)
    with mode:
        fake = run(*(mode.from_tensor(tensor) for tensor in arguments))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@every_backend
def test_forward_writes_every_element_it_returns(backend: str, poisoned_memory: None) -> None:
    built = build(ConvCase(bits=BITS))
    y = mixed_conv2d(**built.arguments(), backend=backend)
    assert isinstance(y, Tensor)
    assert not y.isnan().any()
    arguments = {
        name: value.clone().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in build(replace(built.case, packed_weight=False)).arguments().items()
    }
    result = mixed_conv2d(**arguments, backend=backend)
    assert isinstance(result, Tensor)
    result.sum().backward()
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            assert value.grad is not None, name
            assert not value.grad.isnan().any(), name


def test_a_gradient_free_call_records_no_graph() -> None:
    weight = PackedConvWeight.from_float(torch.randn(4, 3, 1, 1), {8: torch.ones(4)}, (8,))
    y = mixed_conv2d(torch.randn(2, 3, 4, 5), weight, 8, 0.1)
    assert isinstance(y, Tensor)
    assert not y.requires_grad
