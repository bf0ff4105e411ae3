"""The reference against loops over Python and numpy numbers that share no code with it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfs_kernels import (
    PackedActivation,
    PackedConvWeight,
    mixed_conv2d,
    pack_bits,
    quantize_pack,
    reference,
    unpack_bits,
    unpack_dequantize,
)

FLOAT = np.float32
Floats = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def numpy_may_overflow() -> None:
    np.seterr(over="ignore", under="ignore", invalid="ignore")


# Naive formulas, one float32 rounding per line


def naive_round_half_even(value: float) -> int:
    return round(Fraction(value))


def naive_activation_code(x: np.float32, bits: int, scale: np.float32, zero_point: int) -> int:
    inverse = FLOAT(1) / scale
    t = x * inverse
    low, high = -zero_point, 2**bits - 1 - zero_point
    if math.isnan(t) or t < low:
        return low + zero_point
    if t > high:
        return high + zero_point
    return naive_round_half_even(float(t)) + zero_point


def naive_weight_level(w: np.float32, bits: int, scale: np.float32, centred: bool) -> int:
    inverse = FLOAT(1) / scale
    t = w * inverse
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if centred:
        code = low if t < low else high if t > high else min(math.floor(float(t)), high)
        return 2 * code + 1
    code = low if t < low else high if t > high else naive_round_half_even(float(t))
    return code


def naive_sums(
    levels: npt.NDArray[np.int64],
    weights: npt.NDArray[np.int64],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> npt.NDArray[np.int64]:
    """Integer sums (O, OH, OW) of one sample (C, H, W); what lies outside counts for nothing."""
    height, width = levels.shape[1:]
    outputs, group_channels, kernel_h, kernel_w = weights.shape
    left, right, top, bottom = padding
    out_h = (height + top + bottom - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    out_w = (width + left + right - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    sums = np.zeros((outputs, out_h, out_w), dtype=np.int64)
    for o in range(outputs):
        first = o // (outputs // groups) * group_channels
        for y in range(out_h):
            for x in range(out_w):
                total = 0
                for c in range(group_channels):
                    for i in range(kernel_h):
                        for j in range(kernel_w):
                            row = y * stride[0] - top + i * dilation[0]
                            column = x * stride[1] - left + j * dilation[1]
                            if 0 <= row < height and 0 <= column < width:
                                a = int(levels[first + c, row, column])
                                total += a * int(weights[o, c, i, j])
                sums[o, y, x] = total
    return sums


def naive_epilogue(total: int, step: float, bias: float, mul: float, add: float) -> np.float32:
    m = FLOAT(step * mul)
    c = FLOAT(bias * mul + add)
    product = FLOAT(total) * m
    return FLOAT(product + c)


# Quantization


@pytest.mark.parametrize(
    ("bits", "zero_point", "values", "codes"),
    [
        (
            2,
            0,
            [-1.0, -0.0, 0.5, 0.5000001, 1.5, 2.5, 2.4999998, 3.0, 9.0],
            [0, 0, 0, 1, 2, 2, 2, 3, 3],
        ),
        (2, 2, [-2.5, -1.5, -0.5, 0.5, 1.0, 1.5], [0, 0, 2, 2, 3, 3]),
        (4, 8, [-8.5, -7.5, -6.5, 0.5, 1.5, 6.5, 7.5], [0, 0, 2, 8, 10, 14, 15]),
        (8, 128, [-128.5, -127.5, -126.5, 125.5, 126.5, 127.5], [0, 0, 2, 254, 254, 255]),
        (8, 0, [math.nan, math.inf, -math.inf, 254.5, 253.5], [0, 255, 0, 254, 254]),
        (8, 200, [math.nan, math.inf, -math.inf, 3e38, -3e38], [0, 255, 0, 255, 0]),
        (1, 0, [-1.0, 0.5, 0.50001, 7.0], [0, 0, 1, 1]),
        (16, 32768, [-32769.0, -32767.5, 32766.5, 32767.0, 40000.0], [0, 0, 65534, 65535, 65535]),
    ],
)
def test_activation_codes(
    bits: int, zero_point: int, values: list[float], codes: list[int]
) -> None:
    got = reference.quantize_activation(
        torch.tensor(values), bits, torch.tensor(1.0), torch.tensor(zero_point)
    )
    assert got.tolist() == codes


@pytest.mark.parametrize("bits", range(1, 17))
def test_activation_codes_equal_the_naive_ones(bits: int) -> None:
    rng = np.random.default_rng(bits)
    top = 2**bits - 1
    for scale in (FLOAT(2.0**-126), FLOAT(0.1), FLOAT(1 / 3), FLOAT(7.77e10), FLOAT(2.0**126)):
        for zero_point in {0, 1, top // 2, top}:
            codes = rng.integers(-3, 2 * top + 4, 300) / 2 - zero_point
            x = (codes * np.float64(scale)).astype(FLOAT)
            x[:150] *= rng.uniform(0.9, 1.1, 150).astype(FLOAT)
            specials = [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0]
            x = np.concatenate([x, np.array(specials, dtype=FLOAT)])
            got = reference.quantize_activation(
                torch.from_numpy(x), bits, torch.tensor(scale), torch.tensor(zero_point)
            )
            expected = [naive_activation_code(v, bits, scale, zero_point) for v in x]
            assert got.tolist() == expected


@pytest.mark.parametrize(
    ("bits", "centred", "values", "levels"),
    [
        (2, True, [-9.0, -2.0, -1.0, -1e-6, 0.0, 0.999, 1.0, 2.0], [-3, -3, -1, -1, 1, 1, 3, 3]),
        (2, False, [-9.0, -1.5, -0.5, 0.5, 0.51, 1.5], [-2, -2, 0, 0, 1, 1]),
        (4, False, [-8.5, -7.5, 0.5, 1.5, 6.5, 7.4, 99.0], [-8, -8, 0, 2, 6, 7, 7]),
        (8, False, [-128.5, -127.5, 126.5, 127.5], [-128, -128, 126, 127]),
        (1, True, [-2.0, -0.1, 0.0, 5.0], [-1, -1, 1, 1]),
    ],
)
def test_weight_levels(bits: int, centred: bool, values: list[float], levels: list[int]) -> None:
    weight = torch.tensor(values)[None]
    codes = reference.quantize_weight(weight, bits, torch.ones(1), centred)
    assert reference.weight_levels(codes, centred).tolist() == [levels]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bits", range(1, 17))
def test_weight_levels_equal_the_naive_ones(bits: int, centred: bool) -> None:
    rng = np.random.default_rng(100 + bits)
    reach = 2 ** (bits - 1)
    scales = np.array([2.0**-126, 0.013, 1 / 3, 2.0**100], dtype=FLOAT)
    w = rng.integers(-2 * reach - 3, 2 * reach + 4, (4, 200)) / 2
    w[:, :100] += rng.uniform(-0.5, 0.5, (4, 100))
    values = (w * scales.astype(np.float64)[:, None]).astype(FLOAT)
    codes = reference.quantize_weight(
        torch.from_numpy(values), bits, torch.from_numpy(scales), centred
    )
    expected = [
        [naive_weight_level(v, bits, scale, centred) for v in row]
        for row, scale in zip(values, scales, strict=True)
    ]
    assert reference.weight_levels(codes, centred).tolist() == expected


def test_one_over_the_step_is_rounded_before_it_multiplies() -> None:
    """A division would give another code here."""
    found = 0
    for scale in np.linspace(0.011, 0.999, 400, dtype=FLOAT):
        for k in range(1, 255):
            x = FLOAT(FLOAT(k + 0.5) * scale)
            by_division = naive_round_half_even(float(x / scale))
            by_inverse = naive_activation_code(x, 8, scale, 0)
            if by_division == by_inverse:
                continue
            found += 1
            got = reference.quantize_activation(
                torch.tensor([x]), 8, torch.tensor(scale), torch.tensor(0)
            )
            assert got.tolist() == [by_inverse]
    assert found > 10


# Packing


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [1], [0b01]),
        (2, [3, 0, 2, 1], [0b01100011]),
        (2, [0, 1, 2, 3, 3], [0b11100100, 0b11]),
        (4, [0xA], [0x0A]),
        (4, [0x1, 0xF, 0x7], [0xF1, 0x07]),
        (8, [0, 255, 128], [0, 255, 128]),
    ],
)
def test_packed_bytes(bits: int, codes: list[int], packed: list[int]) -> None:
    got = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits, backend="reference")
    assert got.dtype == torch.uint8
    assert got.tolist() == packed
    back = unpack_bits(got, bits, len(codes), signed=False, backend="reference")
    assert back.dtype == torch.uint8
    assert back.tolist() == codes


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [-2, -1, 0, 1], [0b01001110]),
        (4, [-8, 7, -1], [0x78, 0x0F]),
        (8, [-128, -1, 127], [0x80, 0xFF, 0x7F]),
    ],
)
def test_packed_signed_bytes(bits: int, codes: list[int], packed: list[int]) -> None:
    got = pack_bits(torch.tensor(codes, dtype=torch.int8), bits, backend="reference")
    assert got.tolist() == packed
    back = unpack_bits(got, bits, len(codes), signed=True, backend="reference")
    assert back.dtype == torch.int8
    assert back.tolist() == codes


def test_activation_rows_hold_pixels_of_channels() -> None:
    x = torch.tensor([[[[0.0, 1.0]], [[2.0, 3.0]], [[3.0, 2.0]]]])  # 3 channels, 1x2 pixels
    packed = quantize_pack(x, 2, 1.0, backend="reference")
    assert packed.data.tolist() == [[0b111000, 0b101101]]
    assert packed.shape == (1, 3, 1, 2)
    four = quantize_pack(x, 4, 1.0, 1, backend="reference")
    assert four.data.tolist() == [[0x31, 0x04, 0x42, 0x03]]


def test_tail_codes_are_zero_whatever_the_zero_point() -> None:
    x = torch.zeros(1, 1, 1, 1)
    assert quantize_pack(x, 2, 1.0, 3, backend="reference").data.tolist() == [[0b11]]
    weight = PackedConvWeight.from_float(-torch.ones(1, 1, 1, 1), {2: torch.ones(1)}, (2,))
    assert weight.packed(2).flatten().tolist() == [0b11]


def test_rows_are_sized_by_the_widest_option() -> None:
    x = torch.tensor([1.0, -2.5, 0.1]).view(1, 3, 1, 1)
    scale = {2: 1.0, 8: 0.5, 32: 1.0}
    packed = quantize_pack(
        x.expand(3, 3, 1, 1), torch.tensor([2, 8, 32]), scale, backend="reference"
    )
    assert packed.data.shape == (3, 12)
    assert packed.data[0, 0].item() == 0b000001
    assert packed.data[1, :3].tolist() == [2, 0, 0]
    assert packed.data[2].view(torch.float32).tolist() == x.flatten().tolist()


def test_weight_rows_hold_taps_of_channels_of_a_group() -> None:
    weight = torch.tensor([[[[1.0, -1.0]], [[-2.0, 0.0]], [[1.0, 1.0]]]])  # (1, 3, 1, 2)
    packed = PackedConvWeight.from_float(weight, {2: torch.ones(1)}, (2,), {2: "twos"})
    assert packed.packed(2).tolist() == [[[[0b011001], [0b010011]]]]
    assert packed.packed(2).shape == (1, 1, 2, 1)


def test_dequantized_values() -> None:
    x = torch.tensor([-1.0, 0.3, 2.0]).view(1, 3, 1, 1)
    packed = quantize_pack(x, 4, 0.3, 2, backend="reference")
    step = FLOAT(0.3)
    expected = [float(FLOAT(-2) * step), float(FLOAT(1) * step), float(FLOAT(7) * step)]
    assert unpack_dequantize(packed, backend="reference").flatten().tolist() == expected


# Convolution


@st.composite
def small_convolutions(draw: st.DrawFn) -> dict[str, object]:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    least = (
        max(1, dilation[0] * (kernel[0] - 1) + 1 - padding[2] - padding[3]),
        max(1, dilation[1] * (kernel[1] - 1) + 1 - padding[0] - padding[1]),
    )
    return {
        "kernel": kernel,
        "padding": padding,
        "dilation": dilation,
        "stride": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": draw(st.integers(1, 2)),
        "group_channels": draw(st.integers(1, 3)),
        "group_outputs": draw(st.integers(1, 2)),
        "size": (least[0] + draw(st.integers(0, 2)), least[1] + draw(st.integers(0, 2))),
        "bits": draw(st.sampled_from([*range(1, 17), 2, 4, 8])),
        "relu": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }


@settings(max_examples=120)
@given(c=small_convolutions())
def test_convolution_equals_the_naive_one(c: dict) -> None:  # type: ignore[type-arg]
    rng = np.random.default_rng(c["seed"])
    bits, groups = c["bits"], c["groups"]
    top, reach = 2**bits - 1, 2 ** (bits - 1)
    channels, outputs = groups * c["group_channels"], groups * c["group_outputs"]
    zero_point = int(rng.integers(0, top + 1))
    scale = FLOAT(rng.uniform(0.01, 2))
    weight_scale = rng.uniform(0.01, 2, outputs).astype(FLOAT)
    codes = rng.integers(-1, 2 * top + 2, (channels, *c["size"])) / 2
    codes.flat[0], codes.flat[-1] = 0, top
    x = ((codes - zero_point) * np.float64(scale)).astype(FLOAT)
    w_codes = rng.integers(-2 * reach, 2 * reach + 1, (outputs, c["group_channels"], *c["kernel"]))
    w = (w_codes / 2 * weight_scale.astype(np.float64)[:, None, None, None]).astype(FLOAT)
    bias, mul, add = (rng.normal(size=outputs).astype(FLOAT) for _ in range(3))
    if not c["affine"]:
        bias[:], mul[:], add[:] = 0, 1, 0

    centred = bits <= 2
    levels = np.array(
        [naive_activation_code(v, bits, scale, zero_point) - zero_point for v in x.flat]
    ).reshape(x.shape)
    weights = np.array(
        [
            naive_weight_level(v, bits, s, centred)
            for s, row in zip(weight_scale, w.reshape(outputs, -1), strict=True)
            for v in row
        ]
    ).reshape(w.shape)
    sums = naive_sums(levels, weights, c["stride"], c["padding"], c["dilation"], groups)
    residual = rng.normal(size=sums.shape).astype(FLOAT) if c["residual"] else None
    expected = np.empty(sums.shape, dtype=FLOAT)
    for index, total in np.ndenumerate(sums):
        o = index[0]
        step = float(scale) * float(weight_scale[o]) * (0.5 if centred else 1.0)
        y = naive_epilogue(total, step, float(bias[o]), float(mul[o]), float(add[o]))
        if residual is not None:
            y = y + residual[index]
        expected[index] = max(y, FLOAT(0)) if c["relu"] else y

    got = mixed_conv2d(
        torch.from_numpy(x)[None],
        torch.from_numpy(w),
        bits,
        torch.tensor([scale]),
        torch.tensor([zero_point], dtype=torch.int32),
        weight_scale=torch.from_numpy(weight_scale)[None],
        bit_options=(bits,),
        bias=torch.from_numpy(bias) if c["affine"] else None,
        mul=torch.from_numpy(mul)[None] if c["affine"] else None,
        add=torch.from_numpy(add)[None] if c["affine"] else None,
        stride=c["stride"],
        padding=c["padding"],
        dilation=c["dilation"],
        groups=groups,
        residual=None if residual is None else torch.from_numpy(residual)[None],
        activation="relu" if c["relu"] else None,
        backend="reference",
    )
    assert isinstance(got, Tensor)
    assert got.shape[0] == 1
    np.testing.assert_array_equal(got[0].numpy(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_every_border_pixel_with_a_zero_point(bits: int, fraction: float) -> None:
    """With all inputs and weights one, an output counts the taps inside the image."""
    top = 2**bits - 1
    zero_point = max(round(fraction * top) - 1, 0)
    x = torch.ones(1, 3, 5, 6)
    weight = torch.ones(2, 3, 3, 3)
    options = {"weight_scale": {bits: torch.full((2,), 2.0 if bits == 2 else 1.0)}}
    got = mixed_conv2d(
        x,
        weight,
        bits,
        {bits: 1.0},
        {bits: zero_point},
        padding=(2, 1, 1, 3),
        backend="reference",
        **options,
    )
    assert isinstance(got, Tensor)
    inside = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.ones(1, 1, 5, 6), (2, 1, 1, 3)), torch.ones(1, 1, 3, 3)
    )
    assert torch.equal(got, (3 * inside).expand(1, 2, *inside.shape[2:]))


@settings(max_examples=60)
@given(c=small_convolutions())
def test_32_bits_stay_within_the_bound(c: dict) -> None:  # type: ignore[type-arg]
    rng = np.random.default_rng(c["seed"])
    groups = c["groups"]
    channels, outputs = groups * c["group_channels"], groups * c["group_outputs"]
    x = rng.normal(size=(channels, *c["size"])).astype(FLOAT)
    w = rng.normal(size=(outputs, c["group_channels"], *c["kernel"])).astype(FLOAT)
    got = mixed_conv2d(
        torch.from_numpy(x)[None],
        torch.from_numpy(w),
        32,
        stride=c["stride"],
        padding=c["padding"],
        dilation=c["dilation"],
        groups=groups,
        backend="reference",
    )
    assert isinstance(got, Tensor)
    # Products of 2^-k multiples are exact as integers: scaled, both sums are exact.
    unit = 2.0**60
    as_integers = np.vectorize(lambda v: int(float(v) * unit), otypes=[object])
    exact = _object_sums(as_integers(x), as_integers(w), c)
    absolute = _object_sums(abs(as_integers(x)), abs(as_integers(w)), c)
    taps = w[0].size
    for index, value in np.ndenumerate(got[0].numpy()):
        error = abs(Fraction(float(value)) - Fraction(exact[index], 2**120))
        assert error <= (taps + 2) * Fraction(1, 2**23) * Fraction(absolute[index], 2**120)


def _object_sums(x: npt.NDArray, w: npt.NDArray, c: dict) -> npt.NDArray:  # type: ignore[type-arg]
    left, right, top, bottom = c["padding"]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right)))
    outputs, group_channels, kernel_h, kernel_w = w.shape
    (step_y, step_x), (gap_y, gap_x) = c["stride"], c["dilation"]
    out_h = (padded.shape[1] - gap_y * (kernel_h - 1) - 1) // step_y + 1
    out_w = (padded.shape[2] - gap_x * (kernel_w - 1) - 1) // step_x + 1
    sums = np.zeros((outputs, out_h, out_w), dtype=object)
    for o, y, x_ in np.ndindex(outputs, out_h, out_w):
        first = o // (outputs // c["groups"]) * group_channels
        window = padded[
            first : first + group_channels,
            y * step_y : y * step_y + gap_y * (kernel_h - 1) + 1 : gap_y,
            x_ * step_x : x_ * step_x + gap_x * (kernel_w - 1) + 1 : gap_x,
        ]
        sums[o, y, x_] = sum(int(a) * int(b) for a, b in zip(window.flat, w[o].flat, strict=True))
    return sums


# Epilogue


def one_product(total: int, **more: object) -> Tensor | PackedActivation:
    """A 1x1 convolution of one pixel whose integer sum is ``total``, at 8 bits."""
    x = torch.tensor([float(total)]).view(1, 1, 1, 1)
    arguments: dict = {  # type: ignore[type-arg]
        "input_scale": {8: 1.0},
        "weight_scale": {8: torch.ones(1)},
        "backend": "reference",
        **more,
    }
    return mixed_conv2d(x, torch.ones(1, 1, 1, 1), 8, **arguments)


def test_the_epilogue_rounds_the_product_and_the_sum() -> None:
    """A fused multiply-add would keep what the first rounding drops."""
    m = 1 + 2.0**-23
    product = FLOAT(255) * FLOAT(m)
    fused = 255 * m - float(product)
    assert fused != 0
    got = one_product(255, mul={8: torch.tensor([m])}, add={8: torch.tensor([-float(product)])})
    assert isinstance(got, Tensor)
    assert got.item() == 0.0


def test_the_multiplier_is_formed_in_float64() -> None:
    steps = FLOAT(0.1), FLOAT(0.3), FLOAT(0.7)
    got = one_product(
        10,
        input_scale={8: float(steps[0])},
        weight_scale={8: torch.tensor([steps[1]])},
        mul={8: torch.tensor([steps[2]])},
    )
    assert isinstance(got, Tensor)
    code = naive_activation_code(FLOAT(10), 8, steps[0], 0)
    level = naive_weight_level(FLOAT(1), 8, steps[1], False)
    m = FLOAT(float(steps[0]) * float(steps[1]) * float(steps[2]))
    assert got.item() == float(FLOAT(code * level) * m)
    assert m != FLOAT(FLOAT(steps[0] * steps[1]) * steps[2])


@pytest.mark.parametrize(
    ("residual", "activation", "expected"),
    [(None, None, -6.0), (4.0, None, -2.0), (4.0, "relu", 0.0), (10.0, "relu", 4.0)],
)
def test_residual_comes_before_relu(
    residual: float | None, activation: str | None, expected: float
) -> None:
    added = None if residual is None else torch.full((1, 1, 1, 1), residual)
    got = one_product(6, mul={8: -torch.ones(1)}, residual=added, activation=activation)
    assert isinstance(got, Tensor)
    assert got.item() == expected


def test_requantization_comes_last() -> None:
    """ReLU first, so that the code is that of 0, not that of the negative sum."""
    got = one_product(
        6,
        mul={8: -torch.ones(1)},
        activation="relu",
        output_scale={8: 1.0},
        output_zero_point={8: 100},
    )
    assert isinstance(got, PackedActivation)
    assert got.data.tolist() == [[100]]


def test_a_packed_residual_is_dequantized_first() -> None:
    residual = quantize_pack(torch.full((1, 1, 1, 1), 3.0), 4, 0.4, 1, backend="reference")
    got = one_product(6, residual=residual)
    assert isinstance(got, Tensor)
    code = naive_activation_code(FLOAT(3), 4, FLOAT(0.4), 1) - 1
    assert got.item() == float(FLOAT(6) + FLOAT(code) * FLOAT(0.4))


def test_no_bits_give_zero_or_the_residual_untouched() -> None:
    x = torch.full((2, 1, 1, 1), torch.nan)
    arguments: dict = {  # type: ignore[type-arg]
        "bits": 0,
        "input_scale": {8: 1.0},
        "weight_scale": {8: torch.ones(1)},
        "bias": torch.ones(1),
        "activation": "relu",
        "backend": "reference",
    }
    weight = torch.ones(1, 1, 1, 1)
    nothing = mixed_conv2d(x, weight, **arguments)
    assert isinstance(nothing, Tensor)
    assert nothing.flatten().tolist() == [0.0, 0.0]
    residual = torch.tensor([-0.0, -5.0]).view(2, 1, 1, 1)
    kept = mixed_conv2d(x, weight, residual=residual, **arguments)
    assert isinstance(kept, Tensor)
    assert torch.equal(kept.view(torch.int32), residual.view(torch.int32))


def test_a_skipped_packed_residual_keeps_its_codes() -> None:
    codes = torch.arange(256, dtype=torch.float32).view(1, 256, 1, 1)
    residual = quantize_pack(codes, 8, 1.0, 7, backend="reference")
    arguments: dict = {  # type: ignore[type-arg]
        "input_scale": {8: 1.0},
        "weight_scale": {8: torch.ones(256)},
        "activation": "relu",
        "residual": residual,
        "output_scale": residual.scale,
        "output_zero_point": residual.zero_point,
        "output_bits": 8,
        "backend": "reference",
    }
    got = mixed_conv2d(torch.ones(1, 1, 1, 1), torch.ones(256, 1, 1, 1), 0, **arguments)
    assert isinstance(got, PackedActivation)
    assert torch.equal(got.data, residual.data)


def test_a_skipped_sample_of_a_packed_output_holds_the_code_of_zero() -> None:
    got = mixed_conv2d(
        torch.ones(1, 1, 1, 1),
        torch.ones(3, 1, 1, 1),
        0,
        {8: 1.0},
        weight_scale={8: torch.ones(3)},
        output_scale={4: 1.0},
        output_zero_point={4: 9},
        output_bits=4,
        backend="reference",
    )
    assert isinstance(got, PackedActivation)
    assert got.data.tolist() == [[0x99, 0x09]]
