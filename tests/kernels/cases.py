"""Random mixed convolutions, run on poisoned and guarded outputs."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dfs_kernels import PackedActivation, PackedConvWeight, available_backends, reference
from dfs_kernels.backends import load
from dfs_kernels.backends.measured import CANDIDATES
from dfs_kernels.call import ConvCall, ConvWeight
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import Quantizer, row_bytes
from dfs_kernels.widths import activation_max

# Without the candidates: they share all but one kernel with a backend that is here. test_cuda.py.
CPU_BACKENDS = tuple(
    name
    for name in available_backends()
    if load(name).supports("cpu", (8,)) and name not in CANDIDATES
)
# What every test compares. Triton's interpreter takes many minutes for all of them, so that it has
# a selection of its own in test_triton.py, unless DFS_TEST_TRITON=1.
_SLOW = set() if os.environ.get("DFS_TEST_TRITON") == "1" else {"triton"}
OTHER_BACKENDS = tuple(name for name in CPU_BACKENDS if name not in ("reference", *_SLOW))
# The same with Triton, for tests that do not take long with it either.
WITH_TRITON = tuple(name for name in CPU_BACKENDS if name in (*OTHER_BACKENDS, "triton"))
# Why the Triton kernels can't be compared, for tests that are skipped then.
TRITON_REASON = str(load("triton").unavailable_reason())

INPUT_FORMS = ("contiguous", "channels_last", "strided", "packed", "requantized")
# Stored at 8 bits whatever the sample's width, as a residual stream is.
STREAM_FORM = "stream"
RESIDUAL_FORMS = (None, "float", "strided", "packed")
OUTPUT_FORMS = ("float", "channels_last", "own", "fixed", "in_place")

# Every combination of them that there is.
FORMS = tuple(
    forms
    for forms in itertools.product(INPUT_FORMS, RESIDUAL_FORMS, OUTPUT_FORMS)
    if forms[1] is not None or forms[2] != "in_place"
)

_GUARD = 64
_FLOAT_POISON = {"reference": 12345.0, "other": float("nan")}
_CODE_POISON = {"reference": 0x5A, "other": 0xA5}


@dataclass(frozen=True)
class ConvCase:
    """The choices that make up one mixed convolution; its numbers follow from ``seed``."""

    bits: tuple[int, ...]
    options: tuple[int, ...] = (2, 4, 8, 32)
    centred: tuple[bool, ...] = (True, False, False, False)
    group_channels: int = 3
    group_outputs: int = 2
    groups: int = 1
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom
    size: tuple[int, int] = (4, 5)
    input_form: str = "contiguous"
    packed_weight: bool = True
    residual_form: str | None = None
    output_form: str = "float"
    output_bits: int = 8
    bias: bool = True
    mul: bool = True
    add: bool = True
    relu: bool = False
    extreme: bool = False  # codes at the ends of their range only
    offset: int = 0  # of packed rows from an aligned address, in bytes
    seed: int = 0

    def describe(self) -> str:
        return f"{self.bits}-{self.size}-{self.kernel}"

    @property
    def geometry(self) -> ConvGeometry:
        shape = (
            self.groups * self.group_outputs,
            self.group_channels,
            *self.kernel,
        )
        return ConvGeometry.create(
            self.groups * self.group_channels,
            shape,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        geometry = self.geometry
        return len(self.bits), geometry.out_channels, *geometry.output_size(*self.size)


# Where kernels tend to go wrong.
CORNERS = (
    ConvCase(bits=()),
    ConvCase(bits=(), output_form="own", input_form="packed"),
    ConvCase(bits=(0, 0, 0)),
    ConvCase(bits=(0, 0), residual_form="float", relu=True),
    ConvCase(bits=(0, 0), residual_form="packed", output_form="in_place", relu=True),
    ConvCase(bits=(2, 8, 4, 32), size=(1, 1), kernel=(1, 1), padding=(0, 0, 0, 0)),
    ConvCase(bits=(2, 8, 4, 32), size=(1, 1), padding=(1, 2, 0, 3)),
    ConvCase(bits=(2, 8, 4, 32), size=(1, 17), kernel=(1, 5), stride=(1, 2)),
    ConvCase(bits=(2, 8, 4), group_channels=129, group_outputs=17, kernel=(1, 1)),
    ConvCase(bits=(2, 8, 4), group_channels=64, group_outputs=64, size=(8, 8)),
    ConvCase(bits=(2, 8, 4, 32), group_channels=1, groups=33, group_outputs=1, size=(7, 9)),
    ConvCase(bits=(4, 2, 8, 32), group_channels=2, groups=3, dilation=(2, 3), size=(9, 11)),
    ConvCase(bits=(4, 2, 8, 32), padding=(9, 0, 0, 7), kernel=(2, 3)),
    ConvCase(bits=(8, 32, 2), group_channels=16, size=(70, 90), stride=(2, 1)),
)


def cases_of_forms(
    input_form: str, residual_form: str | None, output_form: str
) -> tuple[ConvCase, ConvCase]:
    """All widths in one batch, with a packed and with a float weight."""
    case = ConvCase(
        bits=(8, 0, 2, 32, 4, 0),
        group_channels=5,
        group_outputs=7,
        input_form=input_form,
        residual_form=residual_form,
        output_form=output_form,
        relu=True,
    )
    return replace(case, seed=1), replace(case, seed=2, packed_weight=False)


@dataclass
class Built:
    """The tensors of a case."""

    case: ConvCase
    input: Tensor | PackedActivation
    input_quantizer: Quantizer | None
    weight: Tensor
    packed_weight: PackedConvWeight
    bits: Tensor
    bias: Tensor | None
    mul: Tensor | None
    add: Tensor | None
    residual: Tensor | PackedActivation | None
    output_quantizer: Quantizer | None
    output_bits: Tensor

    def call(self) -> ConvCall:
        case = self.case
        shape = case.geometry.weight_shape
        data = self.packed_weight.buffer if case.packed_weight else self.weight
        weight = ConvWeight(data, shape, case.options, case.centred, self.packed_weight.scales)
        return ConvCall(
            self.input,
            weight,
            self.bits,
            case.geometry,
            self.input_quantizer,
            self.bias,
            self.mul,
            self.add,
            self.residual,
            case.relu,
        )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``mixed_conv2d``; float weights need the default levels."""
        case, quantizer, out = self.case, self.input_quantizer, self.output_quantizer
        if case.output_form == "fixed" and out is not None:
            output: dict[str, Any] = {"output_bits": case.output_bits}
        else:
            output = {}
        if out is not None and case.output_form in ("own", "fixed"):
            output |= {"output_scale": out.scale, "output_zero_point": out.zero_point}
        return {
            "input": self.input,
            "weight": self.packed_weight if case.packed_weight else self.weight,
            "bits": self.bits,
            "input_scale": None if quantizer is None else quantizer.scale,
            "input_zero_point": None if quantizer is None else quantizer.zero_point,
            "weight_scale": None if case.packed_weight else self.packed_weight.scales,
            "bit_options": case.options,
            "bias": self.bias,
            "mul": self.mul,
            "add": self.add,
            "stride": case.stride,
            "padding": case.padding,
            "dilation": case.dilation,
            "groups": case.groups,
            "residual": self.residual,
            "activation": "relu" if case.relu else None,
            **output,
        }


def build(case: ConvCase) -> Built:
    generator = torch.Generator().manual_seed(case.seed)
    geometry = case.geometry
    shape = (len(case.bits), geometry.in_channels, *case.size)
    bits = torch.tensor(case.bits, dtype=torch.int32)
    quantizer = _random_quantizer(case.options, generator)
    x = _full_range_values(shape, bits, quantizer, generator, case.extreme)
    source: Tensor | PackedActivation = _in_form(x, case.input_form)
    if case.input_form == "packed":
        source = pack(x, bits, quantizer, case.offset)
    elif case.input_form in ("requantized", STREAM_FORM):
        widths = (8,) if case.input_form == STREAM_FORM else case.options
        stored = torch.tensor(widths)[
            torch.randint(len(widths), (len(case.bits),), generator=generator)
        ].to(torch.int32)
        stored[bits == 0] = 0
        source = pack(x, stored, _random_quantizer(widths, generator), case.offset)
    packed_weight, weight = _random_weight(case, generator)
    out_channels = geometry.out_channels
    affine_shape = (len(case.options), out_channels)
    output_shape = case.output_shape
    residual = _random_residual(case, output_shape, bits, generator)
    output_quantizer, output_bits = _random_output(case, bits, generator)
    return Built(
        case,
        source,
        None if case.input_form == "packed" else quantizer,
        weight,
        packed_weight,
        bits,
        torch.randn(out_channels, generator=generator) if case.bias else None,
        torch.randn(affine_shape, generator=generator) if case.mul else None,
        torch.randn(affine_shape, generator=generator) if case.add else None,
        residual,
        output_quantizer,
        output_bits,
    )


def packing_case(
    bits: tuple[int, ...], channels: int, size: tuple[int, int], form: str, seed: int = 0
) -> ConvCase:
    """Whose input, a float tensor, is what there is to pack."""
    return ConvCase(
        bits=bits,
        group_channels=channels,
        size=size,
        kernel=(1, 1),
        padding=(0, 0, 0, 0),
        input_form=form,
        seed=seed,
    )


def build_largest_products(bits: int, zero_at_top: bool) -> Built:
    """Codes and levels all at one extreme, without an affine."""
    case = ConvCase(bits=(bits,), options=(bits,), centred=(False,), group_channels=64, size=(6, 6))
    built = build(case)
    top = activation_max(bits) if zero_at_top else 0
    quantizer = Quantizer((bits,), torch.ones(1), torch.tensor([top], dtype=torch.int32))
    weight = torch.full(built.weight.shape, -1e9)
    scales = torch.ones(1, weight.shape[0])
    return replace(
        built,
        input=torch.full((1, 64, 6, 6), -1e9 if zero_at_top else 1e9),
        input_quantizer=quantizer,
        weight=weight,
        packed_weight=PackedConvWeight.from_float(weight, scales, (bits,), {bits: "twos"}),
        mul=None,
        add=None,
        bias=None,
    )


def special_values() -> Tensor:
    """(1, 20, 2, 2): what floats have beside ordinary numbers."""
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    values = [torch.nan, torch.inf, -torch.inf, huge, -huge, tiny, -tiny, tiny / 2, 0.0, -0.0]
    return torch.tensor(values).repeat(2)[None, :, None, None].expand(1, 20, 2, 2).contiguous()


def on_device(built: Built, device: torch.device | str) -> Built:
    """The same case with its tensors on a device, in the same forms."""
    case = built.case

    def move(x: Tensor | PackedActivation | None, form: str | None) -> Any:
        if isinstance(x, PackedActivation):
            moved = x.to(device)
            return replace(moved, data=_offset_rows(moved.data, case.offset))
        return None if x is None else _in_form(x.to(device), form or "contiguous")

    def plain(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    def quantizer(q: Quantizer | None) -> Quantizer | None:
        return None if q is None else q.to(device)

    return Built(
        case,
        move(built.input, case.input_form),
        quantizer(built.input_quantizer),
        built.weight.to(device),
        built.packed_weight.to(device),
        built.bits.to(device),
        plain(built.bias),
        plain(built.mul),
        plain(built.add),
        move(built.residual, case.residual_form),
        quantizer(built.output_quantizer),
        built.output_bits.to(device),
    )


def pack(x: Tensor, bits: Tensor, quantizer: Quantizer, offset: int = 0) -> PackedActivation:
    """``x`` packed by the reference, in rows whose unused bytes are poisoned.

    ``offset`` bytes after an address that is aligned as well as those of fresh tensors.
    """
    rows = (x.shape[0], row_bytes(quantizer.options, *x.shape[1:]))
    data = _offset_rows(torch.full(rows, 0xC3).byte(), offset)
    packed = PackedActivation(
        data, bits, quantizer.scale, quantizer.zero_point, quantizer.options, *x.shape[1:]
    )
    reference.quantize_pack(x, packed)
    return packed


def _offset_rows(rows: Tensor, offset: int) -> Tensor:
    """A copy of uint8 rows that starts ``offset`` bytes after an aligned address."""
    flat = rows.new_empty(offset + rows.numel())
    return flat[offset:].view(rows.shape).copy_(rows)


def _random_quantizer(options: tuple[int, ...], generator: torch.Generator) -> Quantizer:
    scale = 0.05 + torch.rand(len(options), generator=generator)
    zeros = []
    for bits in options:
        top = 1 if bits == 32 else activation_max(bits) + 1
        kind = int(torch.randint(4, (1,), generator=generator))
        inside = int(torch.randint(top, (1,), generator=generator))
        zeros.append((0, top - 1, top // 2, inside)[kind])
    return Quantizer(options, scale, torch.tensor(zeros, dtype=torch.int32))


def _full_range_values(
    shape: tuple[int, ...],
    bits: Tensor,
    quantizer: Quantizer,
    generator: torch.Generator,
    extreme: bool,
) -> Tensor:
    """Values over, on and between all the codes of each sample's width, the outermost forced.

    ``extreme``: only values that give the lowest and the highest code.
    """
    x = torch.randn(shape, generator=generator)
    for n, width in enumerate(bits.tolist()):
        if width in (0, 32):
            continue
        scale, zero_point = quantizer.at(width)
        top = activation_max(width)
        # Half steps, so that there are ties, and a little beyond both ends.
        codes = torch.randint(-3, 2 * top + 4, shape[1:], generator=generator) / 2
        if extreme:
            codes = torch.where(codes > top / 2, top + 1.0, -1.0)
        flat = codes.view(-1)
        flat[torch.randint(flat.numel(), (1,), generator=generator)] = top
        flat[torch.randint(flat.numel(), (1,), generator=generator)] = 0
        noise = torch.rand(shape[1:], generator=generator) - 0.5
        noise[torch.rand(shape[1:], generator=generator) < 0.5] = 0.0
        x[n] = (codes + noise - zero_point) * scale
    return x


def _in_form(x: Tensor, form: str) -> Tensor:
    if form == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if form == "strided":
        n, c, h, w = x.shape
        wide = torch.full((n, 2 * c, h, w + 3), torch.nan, device=x.device)
        wide[:, ::2, :, 1 : w + 1] = x
        return wide[:, ::2, :, 1 : w + 1]
    return x


def _random_weight(case: ConvCase, generator: torch.Generator) -> tuple[PackedConvWeight, Tensor]:
    shape = case.geometry.weight_shape
    weight = torch.randn(shape, generator=generator)
    flat = weight.view(shape[0], -1)
    if case.extreme:
        flat.copy_(torch.where(flat > 0, 6.0, -6.0))
    flat[:, 0] = 6.0
    flat[:, -1] = -6.0
    # Some with codes far below their range: how small products are decides how they are summed.
    spare = torch.rand(len(case.options), generator=generator).sub(0.5).clamp(min=0).mul(2)
    reach = torch.tensor(
        [
            2.0 ** (b - 1 - math.floor(s * (b - 1))) if b != 32 else 1.0
            for b, s in zip(case.options, spare.tolist(), strict=True)
        ]
    )
    scales = (1.0 + torch.rand(len(case.options), shape[0], generator=generator)) / reach[:, None]
    kinds = {
        b: "centred" if c else "twos"
        for b, c in zip(case.options, case.centred, strict=True)
        if b != 32
    }
    return PackedConvWeight.from_float(weight, scales, case.options, kinds), weight


def _random_residual(
    case: ConvCase, shape: tuple[int, ...], bits: Tensor, generator: torch.Generator
) -> Tensor | PackedActivation | None:
    form = case.residual_form
    if form is None:
        return None
    values = torch.randn(shape, generator=generator)
    if form != "packed":
        values.view(-1)[: min(3, values.numel())] = -0.0
        return _in_form(values, "strided" if form == "strided" else "contiguous")
    stored = bits.clone()
    for n in range(len(stored)):
        if torch.rand(1, generator=generator) < 0.5:
            stored[n] = case.options[
                int(torch.randint(len(case.options), (1,), generator=generator))
            ]
    quantizer = _random_quantizer(case.options, generator)
    values = _full_range_values(shape, stored, quantizer, generator, case.extreme)
    return pack(values, stored, quantizer, case.offset)


def _random_output(
    case: ConvCase, bits: Tensor, generator: torch.Generator
) -> tuple[Quantizer | None, Tensor]:
    if case.output_form == "own":
        return _random_quantizer(case.options, generator), bits
    if case.output_form == "fixed":
        stored = torch.full_like(bits, case.output_bits)
        return _random_quantizer((case.output_bits,), generator), stored
    return None, bits


def subset(built: Built, chosen: list[int]) -> Built:
    """The same case with some of its samples, in another order."""

    def pick(x: Tensor | PackedActivation | None) -> Tensor | PackedActivation | None:
        if isinstance(x, PackedActivation):
            return replace(x, data=x.data[chosen], bits=x.bits[chosen])
        return None if x is None else x[chosen]

    case = replace(built.case, bits=tuple(built.case.bits[n] for n in chosen))
    source = pick(built.input)
    assert source is not None
    return replace(
        built,
        case=case,
        input=source,
        bits=built.bits[chosen],
        residual=pick(built.residual),
        output_bits=built.output_bits[chosen],
    )


# Running


@dataclass
class Result:
    """What a backend wrote, and whether it kept within its bounds."""

    out: Tensor | PackedActivation
    guards_kept: bool


def run(built: Built, backend: str) -> Result:
    """Run a case on a backend, into poisoned memory between guard bands."""
    role = "reference" if backend == "reference" else "other"
    case = built.case
    if case.output_form == "in_place":
        built = replace(built, residual=_copy_of(built.residual, case.offset))
        assert built.residual is not None
        load(backend).mixed_conv2d(built.call(), built.residual)
        return Result(built.residual, True)
    shape = case.output_shape
    if built.output_quantizer is None:
        image, flat = _guarded_image(
            shape, case.output_form, _FLOAT_POISON[role], built.bits.device
        )
        load(backend).mixed_conv2d(built.call(), image)
        edges = torch.cat([flat[:_GUARD], flat[-_GUARD:]])
        fresh = torch.full_like(edges, _FLOAT_POISON[role])
        return Result(image, torch.equal(as_bits(edges), as_bits(fresh)))
    quantizer = built.output_quantizer
    rows = row_bytes(quantizer.options, *shape[1:])
    poison = _CODE_POISON[role]
    guard = _GUARD + case.offset
    codes = torch.full(
        (2 * guard + shape[0] * rows,), poison, dtype=torch.uint8, device=built.bits.device
    )
    data = codes[guard : guard + shape[0] * rows].view(shape[0], rows)
    packed = PackedActivation(
        data,
        built.output_bits,
        quantizer.scale,
        quantizer.zero_point,
        quantizer.options,
        *shape[1:],
    )
    load(backend).mixed_conv2d(built.call(), packed)
    edges = torch.cat([codes[:guard], codes[-guard:]])
    return Result(packed, bool((edges == poison).all()))


def _copy_of(x: Tensor | PackedActivation | None, offset: int) -> Tensor | PackedActivation | None:
    if not isinstance(x, Tensor):
        return x if x is None else replace(x, data=_offset_rows(x.data, offset))
    copy = torch.empty_strided(x.shape, x.stride(), device=x.device)
    return copy.copy_(x)


def _guarded_image(
    shape: tuple[int, int, int, int], form: str, poison: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    n, c, h, w = shape
    flat = torch.full((2 * _GUARD + n * c * h * w,), poison, device=device)
    inner = flat[_GUARD : _GUARD + n * c * h * w]
    if form == "channels_last":
        return inner.view(n, h, w, c).permute(0, 3, 1, 2), flat
    return inner.view(n, c, h, w), flat


def as_bits(x: Tensor) -> Tensor:
    """A float32 tensor's bit patterns, so that NaN equals itself and -0 differs from 0."""
    return x.contiguous().view(torch.int32)


def sample_bits(out: Tensor | PackedActivation, n: int) -> Tensor:
    """The bits that one sample's result is made of; empty for a row stored at 0 bits."""
    if isinstance(out, Tensor):
        return as_bits(out[n])
    width = int(out.bits[n])
    if width == 0:
        return torch.empty(0, dtype=torch.uint8)
    return out.data[n, : row_bytes((width,), *out.shape[1:])]


# What a 32-bit sample may differ by


def exact_and_bound(built: Built, n: int) -> tuple[Tensor, Tensor]:
    """One 32-bit sample's y in float64, before ReLU and requantization, and its allowed error.

    The sum may be off by e = (K + 2) * 2^-23 * conv(|x|, |w|). Then y = acc * m + c + residual has
    three roundings, each of at most half a unit in the last place, 2^-24, of its own result.
    """
    case, geometry = built.case, built.case.geometry
    x = _values(built.input, n)
    weight = built.weight.double()
    # Its products and sums are those of float64, for values of any kind.
    sums = reference.conv2d_integer(x, weight, geometry)[0]
    absolute = reference.conv2d_integer(x.abs(), weight.abs(), geometry)[0]
    i = case.options.index(32)
    mul = torch.ones(geometry.out_channels) if built.mul is None else built.mul[i]
    add = torch.zeros(geometry.out_channels) if built.add is None else built.add[i]
    bias = torch.zeros(geometry.out_channels) if built.bias is None else built.bias
    m = mul.double().view(-1, 1, 1)
    c = (bias.double() * mul.double() + add.double()).float().double().view(-1, 1, 1)
    error = (geometry.taps + 2) * 2.0**-23 * absolute * m.abs()
    product = sums * m
    error = error + 2.0**-24 * (product.abs() + error)
    y = product + c
    error = error + 2.0**-24 * (y.abs() + error)
    if built.residual is not None:
        y = y + _values(built.residual, n)[0]
        error = error + 2.0**-24 * (y.abs() + error)
    return y, error


def within_bound(
    built: Built,
    out: Tensor | PackedActivation,
    n: int,
    bound: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Whether a 32-bit sample's result lies where :func:`exact_and_bound` allows.

    ``bound`` is what that function gives, when the caller has it already.
    """
    y, error = exact_and_bound(built, n) if bound is None else bound
    if built.case.relu:
        y = y.clamp_min(0)
    width = 32 if isinstance(out, Tensor) else int(out.bits[n])
    if width == 0:
        return True
    got = _values(out, n)[0]
    if width == 32:
        return bool(((got - y).abs() <= error).all())
    assert isinstance(out, PackedActivation)
    scale, zero_point = (v.double() for v in out.quantizer.at(width))
    low, high = -zero_point, activation_max(width) - zero_point
    t = (y / scale).clamp(low, high)
    # Two more roundings, those of 1 / s and of the product with it.
    slack = error / scale + 2.0**-22 * (t.abs() + 1) + 0.5
    return bool(((got / scale - t).abs() <= slack).all())


def _values(x: Tensor | PackedActivation, n: int) -> Tensor:
    if isinstance(x, Tensor):
        return x[n : n + 1].double()
    one = replace(x, data=x.data[n : n + 1], bits=x.bits[n : n + 1])
    return reference.unpack_dequantize(one).double()


def assert_matches_reference(
    built: Built, backend: str, device: torch.device | str = "cpu"
) -> None:
    """Integer widths bit for bit, 32 bits within the bound, nothing written outside.

    The reference runs on the CPU, the backend on ``device``.
    """
    expected = run(built, "reference")
    got = run(built if device == "cpu" else on_device(built, device), backend)
    out = got.out.to("cpu")
    assert got.guards_kept
    for n, width in enumerate(built.case.bits):
        if width == 32:
            assert within_bound(built, expected.out, n), f"reference, sample {n} at 32 bits"
            assert within_bound(built, out, n), f"sample {n} at 32 bits"
        else:
            assert torch.equal(sample_bits(out, n), sample_bits(expected.out, n)), (
                f"sample {n} at {width} bits"
            )


# Drawing


@st.composite
def conv_cases(draw: st.DrawFn, **fixed: Any) -> ConvCase:
    """Any mixed convolution of a small shape; ``fixed`` pins fields of it."""
    options = fixed.get("options") or draw(
        st.sampled_from([(2, 4, 8, 32), (2, 4, 8), (2,), (4, 8), (8, 32)])
    )
    kernel = fixed.get("kernel") or draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = fixed.get("padding") or draw(st.tuples(*[st.integers(0, 4) for _ in range(4)]))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least_h = max(1, spans[0] - padding[2] - padding[3])
    least_w = max(1, spans[1] - padding[0] - padding[1])
    depthwise = fixed.get("groups") is None and draw(st.booleans())
    residual = draw(st.sampled_from(RESIDUAL_FORMS))
    output = draw(st.sampled_from(OUTPUT_FORMS))
    if output == "in_place" and residual is None:
        residual = "float"
    values: dict[str, Any] = {
        "options": options,
        "centred": tuple(b != 32 and draw(st.booleans()) for b in options),
        "bits": tuple(draw(st.lists(st.sampled_from((0, *options)), max_size=4))),
        "group_channels": 1 if depthwise else draw(st.integers(1, 9)),
        "group_outputs": draw(st.integers(1, 5)),
        "groups": draw(st.integers(1, 5)) if depthwise else draw(st.integers(1, 3)),
        "kernel": kernel,
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "dilation": dilation,
        "padding": padding,
        "size": (least_h + draw(st.integers(0, 6)), least_w + draw(st.integers(0, 6))),
        "input_form": draw(st.sampled_from(INPUT_FORMS)),
        "packed_weight": draw(st.booleans()),
        "residual_form": residual,
        "output_form": output,
        "output_bits": draw(st.sampled_from((2, 4, 8, 32))),
        "bias": draw(st.booleans()),
        "mul": draw(st.booleans()),
        "add": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }
    return ConvCase(**{**values, **fixed})
