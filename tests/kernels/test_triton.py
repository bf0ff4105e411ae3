"""What only the Triton backend has: its dispatch, and its checks on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dfs_kernels import PackedActivation, available_backends, mixed_conv2d, reference
from dfs_kernels.backends import triton as backend
from dfs_kernels.packing import row_bytes
from dfs_kernels.triton import configs
from tests.kernels.cases import (
    STREAM_FORM,
    TRITON_REASON,
    ConvCase,
    assert_matches_reference,
    build,
    conv_cases,
    run,
    sample_bits,
    subset,
)
from tests.kernels.test_gradients import (
    CONVS,
    assert_all_close,
    gradients_of_construction,
    gradients_of_op,
    make_problem,
)

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason=TRITON_REASON)


def in_buckets(*sizes: int) -> tuple[configs.ConvConfig, ...]:
    return (replace(configs.conv_configs(*sizes)[0], buckets=True),)


@settings(max_examples=60)
@given(case=conv_cases())
def test_any_convolution(case: ConvCase) -> None:
    assert_matches_reference(build(case), "triton")


@settings(max_examples=20)
@given(case=conv_cases(input_form=STREAM_FORM))
def test_any_convolution_of_a_stream(case: ConvCase) -> None:
    assert_matches_reference(build(case), "triton")


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("input_form", ["packed", "requantized", STREAM_FORM])
def test_outermost_codes_in_rows_at_any_address(offset: int, input_form: str) -> None:
    """Whole words, odd ones and bytes; all levels centred."""
    for channels, outputs, groups in ((16, 18, 1), (6, 5, 1), (8, 8, 2), (1, 2, 5)):
        case = ConvCase(
            bits=(8, 2, 32, 4),
            centred=(True, True, True, False),
            group_channels=channels,
            group_outputs=outputs,
            groups=groups,
            padding=(2, 0, 1, 3),
            input_form=input_form,
            residual_form="packed",
            output_form="own",
            extreme=True,
            offset=offset,
        )
        assert_matches_reference(build(case), "triton")


@pytest.mark.parametrize("buckets", [False, True])
def test_a_sample_does_not_depend_on_its_batch(
    monkeypatch: pytest.MonkeyPatch, buckets: bool
) -> None:
    if buckets:
        monkeypatch.setattr(backend, "conv_configs", in_buckets)
    case = ConvCase(bits=(8, 0, 32, 2, 4, 8), residual_form="packed", output_form="own")
    built = build(case)
    whole = run(built, "triton").out
    for chosen in ([3, 1, 5, 2, 0, 4], [2], [4, 4, 0]):
        part = run(subset(built, chosen), "triton").out
        for row, n in enumerate(chosen):
            assert torch.equal(sample_bits(part, row), sample_bits(whole, n))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("count", [1, 40, 1025])
def test_levels_are_summed(centred: bool, count: int) -> None:
    codes = torch.randint(256, (3, count)).to(torch.uint8)
    codes[0] = 128
    codes[1] = 127
    sums = torch.empty(3, dtype=torch.int32)
    backend._sum_levels(codes, centred, sums)
    levels = reference.weight_levels(codes.view(torch.int8), centred)
    assert torch.equal(sums, levels.sum(1).int())


@pytest.mark.parametrize("batch", [(8, 0, 2, 32, 4, 2, 0), (0, 0), (4,), (32, 8)])
@pytest.mark.parametrize("output_form", ["float", "fixed"])
def test_buckets_give_the_same(
    monkeypatch: pytest.MonkeyPatch, batch: tuple[int, ...], output_form: str
) -> None:
    monkeypatch.setattr(backend, "conv_configs", in_buckets)
    case = ConvCase(
        bits=batch,
        group_channels=8,
        group_outputs=5,
        residual_form="packed",
        output_form=output_form,
    )
    assert_matches_reference(build(case), "triton")


def test_tf32_follows_the_setting_of_pytorchs_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    try:
        for precision, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            cudnn.conv.fp32_precision = precision
            assert backend._float_precision() == expected
    finally:
        cudnn.conv.fp32_precision = before


def test_samples_are_sorted_by_width() -> None:
    bits = torch.tensor([8, 2, 0, 32, 7, 2, 4] * 30, dtype=torch.int32)
    order, starts = backend._sort_samples(bits)
    assert starts.tolist() == [0, 60, 90, 120, 150, 210]
    ranks = {2: 0, 4: 1, 8: 2, 32: 3, 0: 4, 7: 4}
    expected = sorted(range(len(bits)), key=lambda n: ranks[int(bits[n])])
    assert order.tolist() == expected


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("output_form", ["float", "fixed"])
def test_an_unknown_width_fills_its_sample(groups: int, output_form: str) -> None:
    """Nothing can be raised on a GPU without waiting for it."""
    case = ConvCase(
        bits=(8, 2, 4), groups=groups, group_channels=8, group_outputs=2, output_form=output_form
    )
    built = build(case)
    bits = built.bits.clone()
    bits[1] = 5
    call = replace(built.call(), bits=bits)
    good = replace(built.call())
    if output_form == "float":
        image, expected = (torch.zeros(case.output_shape) for _ in range(2))
        backend.mixed_conv2d(call, image)
        backend.mixed_conv2d(good, expected)
        assert bool(image[1].isnan().all())
        assert torch.equal(image[[0, 2]], expected[[0, 2]])
        return
    quantizer = built.output_quantizer
    assert quantizer is not None
    rows = [torch.zeros(3, 900, dtype=torch.uint8) for _ in range(2)]
    for data, one in zip(rows, (call, good), strict=True):
        shape = case.output_shape[1:]
        out = PackedActivation(
            data[:, : _row_bytes(quantizer.options, shape)].contiguous(),
            built.output_bits,
            quantizer.scale,
            quantizer.zero_point,
            quantizer.options,
            *shape,
        )
        backend.mixed_conv2d(one, out)
        data[:, : out.data.shape[1]] = out.data
    used = _row_bytes(quantizer.options, case.output_shape[1:])
    assert bool((rows[0][1, :used] == 0xFF).all())
    assert torch.equal(rows[0][[0, 2]], rows[1][[0, 2]])


def _row_bytes(options: tuple[int, ...], shape: tuple[int, ...]) -> int:
    return row_bytes(options, *shape)


def test_quantize_pack_fills_an_unknown_width() -> None:
    bits = torch.tensor([8, 3, 0, 2], dtype=torch.int32)
    packed = PackedActivation(
        torch.full((4, 60), 0x5A, dtype=torch.uint8),
        bits,
        torch.ones(2),
        torch.zeros(2, dtype=torch.int32),
        (2, 8),
        5,
        3,
        4,
    )
    backend.quantize_pack(torch.randn(4, 5, 3, 4), packed)
    assert bool((packed.data[1] == 0xFF).all())
    assert bool((packed.data[2] == 0x5A).all())
    assert bool(backend.unpack_dequantize(packed)[1].isnan().all())


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gradients_equal_the_references(groups: int) -> None:
    """Groups of eight, four and one channel: matrix products, and products one by one."""
    options = (2, 4, 8, 32)
    bits = torch.tensor([8, 0, 2, 32, 4])
    x = torch.randn(5, 8, 6, 5)
    weight, residual = torch.randn(16, 8 // groups, 3, 3), torch.randn(5, 16, 3, 3)
    mul, steps = torch.rand(4, 16) + 0.5, torch.rand(4, 16) + 0.2
    values = (x, weight, mul, steps, torch.rand(4) + 0.2, residual)
    found = []
    for name in ("reference", "triton"):
        leaves = [value.clone().requires_grad_() for value in values]
        y = mixed_conv2d(
            leaves[0],
            leaves[1],
            bits,
            leaves[4],
            weight_scale=leaves[3],
            mul=leaves[2],
            residual=leaves[5],
            bit_options=options,
            stride=2,
            padding=1,
            groups=groups,
            activation="relu",
            backend=name,
        )
        assert isinstance(y, torch.Tensor)
        gradient = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found.append(torch.autograd.grad(y, leaves, gradient))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_gradients_equal_those_of_fake_quantization(conv: dict[str, Any]) -> None:
    problem = make_problem(conv, [8, 0, 2, 32, 4, 2], True, seed=3)
    _, got = gradients_of_op(problem, "triton")
    assert_all_close(got, gradients_of_construction(problem)[1])
