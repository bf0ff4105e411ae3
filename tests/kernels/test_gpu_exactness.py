"""The backends for GPU tensors give the reference's bits on a GPU.

The reference runs on copies on the CPU, or for large shapes on the GPU itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import ours
from bench.gpu.backends import gpu_backends, gpu_candidates
from bench.gpu.device import is_rehearsal, machine
from bench.gpu.prepared import to_run
from bench.layers import GPU_LAYERS, INTEGER_WIDTHS, Layer, layer_input, layer_weights
from dfs_kernels import (
    GateStep,
    PackedActivation,
    RNNGateWeights,
    mixed_conv2d,
    quantize_pack,
    reference,
    rnn_gate,
    unpack_dequantize,
)
from dfs_kernels.backends import load
from dfs_kernels.packing import Quantizer, row_bytes
from tests.kernels.cases import (
    CORNERS,
    FORMS,
    RESIDUAL_FORMS,
    STREAM_FORM,
    ConvCase,
    as_bits,
    assert_matches_reference,
    build,
    build_largest_products,
    cases_of_forms,
    on_device,
    pack,
    packing_case,
    run,
    sample_bits,
    special_values,
    subset,
)
from tests.kernels.gate_cases import CHOICES, assert_same_step, gate_weights, packed_features
from tests.kernels.wide_cases import draw_case

pytestmark = pytest.mark.gpu
every_backend = pytest.mark.parametrize("backend", [*gpu_backends(), *gpu_candidates()])

_DRAWN_CASES = 28
_LARGE_BATCH = 64
# Beyond what a signed 32-bit number of bytes reaches.
_BEYOND_INT32 = 2**31 + 2**24
_WIDE_SIDE = 256


@every_backend
@pytest.mark.parametrize(("input_form", "residual_form", "output_form"), FORMS)
def test_every_combination_of_forms(
    backend: str,
    input_form: str,
    residual_form: str | None,
    output_form: str,
    device: torch.device,
) -> None:
    for case in cases_of_forms(input_form, residual_form, output_form):
        assert_matches_reference(build(case), backend, device)


@every_backend
@pytest.mark.parametrize("residual_form", RESIDUAL_FORMS)
@pytest.mark.parametrize("output_form", ["float", "own", "fixed"])
@pytest.mark.parametrize("channels", [5, 16])
def test_a_stream_is_read_at_own_widths(
    backend: str, channels: int, residual_form: str | None, output_form: str, device: torch.device
) -> None:
    """As a residual block does, where it can be unpacked in words and where it can't."""
    for case in cases_of_forms(STREAM_FORM, residual_form, output_form):
        assert_matches_reference(build(replace(case, group_channels=channels)), backend, device)


@every_backend
@pytest.mark.parametrize("case", CORNERS, ids=ConvCase.describe)
def test_corner(backend: str, case: ConvCase, device: torch.device) -> None:
    assert_matches_reference(build(case), backend, device)


@every_backend
@pytest.mark.parametrize("seed", range(_DRAWN_CASES))
def test_any_convolution(backend: str, seed: int, device: torch.device) -> None:
    case = draw_case(Random(seed))
    assert_matches_reference(build(case), backend, device)


@every_backend
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_at_top", [False, True])
def test_largest_products_do_not_saturate(
    backend: str, bits: int, zero_at_top: bool, device: torch.device
) -> None:
    assert_matches_reference(build_largest_products(bits, zero_at_top), backend, device)


@every_backend
@pytest.mark.parametrize("output_form", ["float", "own", "in_place"])
def test_every_part_of_a_large_tile(backend: str, output_form: str, device: torch.device) -> None:
    """Channels and pixels that fill tiles and reach beyond them, with all widths at once."""
    case = ConvCase(
        bits=(8, 2, 4, 32, 0, 8),
        group_channels=64,
        group_outputs=72,
        size=(13, 17) if not is_rehearsal() else (3, 4),
        input_form="packed",
        residual_form="packed",
        output_form=output_form,
        relu=True,
    )
    assert_matches_reference(build(case), backend, device)


@every_backend
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_special_values_quantize_alike(backend: str, bits: int, device: torch.device) -> None:
    x = special_values()
    width = torch.tensor([bits], dtype=torch.int32)
    for scale in (2.0**-126, 1e-20, 0.3, 2.0**126):
        for zero_point in (0, 1, (1 << bits) - 1):
            zero = torch.tensor([zero_point], dtype=torch.int32)
            quantizer = Quantizer((bits,), torch.tensor([scale]), zero)
            expected = pack(x, width, quantizer)
            got = poisoned(expected.to(device))
            load(backend).quantize_pack(x.to(device), got)
            assert torch.equal(got.data.cpu(), expected.data), (scale, zero_point)


@every_backend
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(
    ("channels", "size"), [(1, (1, 1)), (5, (3, 7)), (64, (8, 8)), (17, (9, 5))]
)
def test_quantize_pack_and_unpack_dequantize(
    backend: str, channels: int, size: tuple[int, int], form: str, device: torch.device
) -> None:
    case = packing_case((8, 0, 2, 32, 4), channels, size, form)
    built = build(case)
    assert isinstance(built.input, Tensor)
    assert built.input_quantizer is not None
    expected = pack(built.input, built.bits, built.input_quantizer)
    moved = on_device(built, device)
    assert isinstance(moved.input, Tensor)
    got = poisoned(expected.to(device))
    load(backend).quantize_pack(moved.input, got)
    for n in range(len(case.bits)):
        assert torch.equal(sample_bits(got.to("cpu"), n), sample_bits(expected, n))
    values = load(backend).unpack_dequantize(got)
    assert torch.equal(as_bits(values.cpu()), as_bits(reference.unpack_dequantize(expected)))


@every_backend
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_packing(backend: str, bits: int, signed: bool, device: torch.device) -> None:
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    for rows, channels in ((1, 1), (3, 7), (65, 129), (5, 64)):
        codes = torch.randint(low, high, (rows, channels))
        codes[0, 0], codes[-1, -1] = low, high - 1
        codes = codes.to(torch.int8 if signed else torch.uint8)
        packed = load(backend).pack_bits(codes.to(device), bits)
        assert torch.equal(packed.cpu(), reference.pack_bits(codes, bits))
        back = load(backend).unpack_bits(packed, bits, channels, signed)
        assert back.dtype == codes.dtype
        assert torch.equal(back.cpu(), codes)


@every_backend
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("centred", [False, True])
def test_quantize_weight(backend: str, bits: int, centred: bool, device: torch.device) -> None:
    reach = 1 << (bits - 1)
    for shape in ((5, 3, 3, 3), (2, 17, 1, 2), (4, 64, 3, 3)):
        scale = 2.0 ** torch.randint(-126, 120, (shape[0],))
        codes = torch.randint(-2 * reach - 3, 2 * reach + 3, shape) / 2
        weight = codes * scale.view(-1, 1, 1, 1)
        rows = (shape[0], *shape[2:], (shape[1] * bits + 7) // 8)
        expected = torch.full(rows, 0x5A, dtype=torch.uint8)
        load("reference").quantize_weight(weight, scale, bits, centred, expected)
        got = torch.full(rows, 0xA5, dtype=torch.uint8, device=device)
        load(backend).quantize_weight(weight.to(device), scale.to(device), bits, centred, got)
        assert torch.equal(got.cpu(), expected)


@every_backend
def test_a_sample_does_not_depend_on_the_batch(backend: str, device: torch.device) -> None:
    widths = (32, 8, 0, 2, 4, 32, 8, 2, 4, 32, 0)
    for seed, residual_form, output_form in (
        (1, None, "float"),
        (2, "packed", "own"),
        (3, "float", "fixed"),
    ):
        case = ConvCase(
            bits=widths,
            group_channels=16,
            group_outputs=8,
            size=(19, 23) if not is_rehearsal() else (5, 4),
            residual_form=residual_form,
            output_form=output_form,
            seed=seed,
        )
        built = on_device(build(case), device)
        whole = run(built, backend).out
        everything = list(range(len(widths)))
        for chosen in ([4, 0, 9, 2, 5, 1, 3], [5], everything[::-1], everything):
            part = run(subset(built, chosen), backend).out
            for row, n in enumerate(chosen):
                assert torch.equal(sample_bits(part, row), sample_bits(whole, n))


@every_backend
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("output_form", ["float", "fixed", "own"])
def test_an_unknown_width_fills_its_sample_only(
    backend: str, groups: int, output_form: str, device: torch.device
) -> None:
    case = ConvCase(
        bits=(8, 2, 4), groups=groups, group_channels=8, group_outputs=2, output_form=output_form
    )
    built = on_device(build(case), device)
    good = run(built, backend).out
    bits = built.bits.clone()
    bits[1] = 5
    stored = bits if output_form == "own" else built.output_bits
    found = run(replace(built, bits=bits, output_bits=stored), backend)
    assert found.guards_kept
    bad = found.out
    if isinstance(bad, Tensor):
        assert bool(bad[1].isnan().all())
    else:
        assert bool((bad.data[1] == 0xFF).all())
    for n in (0, 2):
        assert torch.equal(sample_bits(bad, n), sample_bits(good, n))


@every_backend
@pytest.mark.parametrize(
    ("channels", "height", "width", "options"),
    [
        (16, 32, 32, (8,)),
        (64, 8, 8, (8,)),
        (70, 5, 4, (2, 4, 8, 32)),
        (1, 1, 1, (8,)),
        (130, 2, 3, (2, 4)),
    ],
)
def test_gate(
    backend: str,
    channels: int,
    height: int,
    width: int,
    options: tuple[int, ...],
    device: torch.device,
) -> None:
    """Two gates in a row, and one that pools floats."""
    x = packed_features(7, channels, height, width, options)
    weights = gate_weights(channels)
    expected = rnn_gate(x, weights, CHOICES, backend="reference")
    moved = RNNGateWeights(*(value.to(device) for value in weights))
    got = rnn_gate(x.to(device), moved, CHOICES, backend=backend)
    assert_same_step(on_cpu(got), expected)
    again = rnn_gate(x, weights, CHOICES, expected.state, backend="reference")
    got = rnn_gate(x.to(device), moved, CHOICES, expected.state.to(device), backend=backend)
    assert_same_step(on_cpu(got), again)
    values = torch.randn(3, channels, height, width)
    got = rnn_gate(values.to(device), moved, CHOICES, backend=backend)
    assert_same_step(on_cpu(got), rnn_gate(values, weights, CHOICES, backend="reference"))


def on_cpu(step: GateStep) -> GateStep:
    return GateStep(*(value.cpu() for value in step))


@every_backend
@pytest.mark.parametrize("layer", GPU_LAYERS, ids=[layer.name for layer in GPU_LAYERS])
@pytest.mark.parametrize("form", ["packed", "float"])
def test_layers_of_networks(backend: str, layer: Layer, form: str, device: torch.device) -> None:
    """At the shapes that are benchmarked, all widths in a large batch."""
    layer, batch = to_run(layer, min(_LARGE_BATCH, layer.batches[0]))
    bits = ours.repeated_bits(ours.MIX, batch, device)
    if form == "packed":
        run_layer = ours.run_packed(layer, device)
        x: Any = ours.packed_input(layer, bits)
    else:
        run_layer, x = float_run(layer, bits), layer_input(layer, batch, device)
    got, expected = run_layer(x, backend=backend), run_layer(x, backend="reference")
    ours.assert_same(got, expected)


def float_run(layer: Layer, bits: Tensor) -> Callable[..., Any]:
    """Float32 in and out at several widths."""
    weight = layer_weights(layer, bits.device).packed
    scale, zero = ours.steps(layer, bits.device), ours.zero_points(layer, bits.device)

    def run_layer(x: Tensor, backend: str) -> Any:
        return mixed_conv2d(
            x, weight, bits, scale, zero,
            stride=layer.stride, padding=layer.padding, groups=layer.groups, backend=backend,
        )  # fmt: skip

    return run_layer


@every_backend
@pytest.mark.parametrize("form", ["packed", "in_place"])
@pytest.mark.parametrize("bits", [8, 2])
def test_addresses_beyond_int32(backend: str, form: str, bits: int, device: torch.device) -> None:
    """Batches whose packed rows lie further apart than a signed 32-bit number of bytes."""
    layer = Layer("wide", "square", 16, 16, _side(), (1,))
    row = row_bytes((bits,), 16, layer.side, layer.side)
    batch = -(-_reach() // row)
    need_memory(device, 4 * batch * row)
    x = random_packed(layer, batch, bits, device)
    run_layer = wide_run(layer, bits, form)
    stream = random_packed(layer, batch, bits, device) if form == "in_place" else None
    picked = [0, batch // 2, batch - 2, batch - 1]
    few_stream = None if stream is None else ours.select_samples(stream, picked)
    expected = run_layer(ours.select_samples(x, picked), few_stream, "reference")
    got = run_layer(x, stream, backend)
    ours.assert_same(ours.select_samples(got, picked), expected)


def wide_run(layer: Layer, bits: int, form: str) -> Callable[..., PackedActivation]:
    device = machine().device
    weight = layer_weights(layer, device).packed
    scale = torch.tensor([layer.steps[bits]], device=device)

    def run_layer(
        x: PackedActivation, stream: PackedActivation | None, backend: str
    ) -> PackedActivation:
        if stream is not None:
            ours.run_into_stream(layer, device)((x, stream), backend=backend)
            return stream
        result = mixed_conv2d(
            x, weight, x.bits, padding=1, activation="relu",
            output_scale={bits: scale[0]}, output_bits=bits, backend=backend,
        )  # fmt: skip
        assert isinstance(result, PackedActivation)
        return result

    return run_layer


@every_backend
def test_float_addresses_beyond_int32(backend: str, device: torch.device) -> None:
    """Packing what is larger still as floats, and unpacking it."""
    layer = Layer("wide", "square", 16, 16, _side(), (1,))
    batch = -(-_reach() // layer.in_values)
    need_memory(device, 6 * batch * layer.in_values)
    x = torch.randn(batch, 16, layer.side, layer.side, device=device)
    scale, zero = ours.steps(layer, device), ours.zero_points(layer, device)
    options: dict[str, Any] = {"scale": scale, "zero_point": zero, "bit_options": INTEGER_WIDTHS}
    packed = quantize_pack(x, 8, **options, backend=backend)
    picked = [0, batch // 2, batch - 1]
    expected = quantize_pack(x[picked], 8, **options, backend="reference")
    ours.assert_same(ours.select_samples(packed, picked), expected)
    del x
    values = unpack_dequantize(packed, backend=backend)
    assert torch.equal(values[picked], unpack_dequantize(expected, backend="reference"))


@every_backend
def test_dry_run(backend: str, device: torch.device) -> None:
    """One small case of each kind, quick enough for a first try in the interpreter."""
    for case in (
        ConvCase(bits=(8, 0, 2, 32, 4), input_form="strided", residual_form="strided"),
        ConvCase(bits=(4, 8), input_form="packed", residual_form="packed", output_form="in_place"),
        ConvCase(bits=(2, 0), input_form="requantized", output_form="own", offset=3),
    ):
        assert_matches_reference(build(case), backend, device)


def poisoned(packed: PackedActivation) -> PackedActivation:
    return replace(packed, data=torch.full_like(packed.data, 0xA5))


def random_packed(layer: Layer, batch: int, bits: int, device: torch.device) -> PackedActivation:
    """A batch of random codes, without floats that would be larger still."""
    row = row_bytes((bits,), layer.in_channels, layer.side, layer.side)
    return PackedActivation(
        torch.randint(0, 256, (batch, row), dtype=torch.uint8, device=device),
        torch.full((batch,), bits, dtype=torch.int32, device=device),
        torch.tensor([layer.steps[bits]], device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        (bits,),
        layer.in_channels,
        layer.side,
        layer.side,
    )


def need_memory(device: torch.device, size: int) -> None:
    """Skip unless ``size`` bytes are free, and as much again for whoever else is at work."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < 2 * size:
        pytest.skip(f"{2 * size >> 30} GiB of free GPU memory are needed, there are {free >> 30}")


def _reach() -> int:
    return _BEYOND_INT32 if not is_rehearsal() else 4096


def _side() -> int:
    return _WIDE_SIDE if not is_rehearsal() else 8
