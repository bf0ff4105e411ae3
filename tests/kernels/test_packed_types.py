"""The packed classes, and every refusal: the error names the argument."""

from __future__ import annotations

import io
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfs_kernels import (
    PackedActivation,
    PackedConvWeight,
    available_backends,
    backend_info,
    backends,
    direct,
    mixed_conv2d,
    mixed_conv2d_,
    pack_bits,
    quantize_pack,
    unpack_bits,
    unpack_dequantize,
    use_backend,
    warmup,
)
from tests.kernels.cases import CPU_BACKENDS

ROOT = Path(__file__).resolve().parents[2]


def make_weight(**kwargs: Any) -> PackedConvWeight:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 5, 3, 2, generator=generator)
    scales = 0.05 + torch.rand(4, 6, generator=generator)
    return PackedConvWeight.from_float(weight, kwargs.pop("scales", scales), **kwargs)


def assert_same(a: PackedConvWeight, b: PackedConvWeight) -> None:
    assert (a.bit_options, a.levels, a.shape) == (b.bit_options, b.levels, b.shape)
    assert torch.equal(a.scales, b.scales)
    for bits in a.bit_options:
        assert torch.equal(a.packed(bits), b.packed(bits))


# PackedConvWeight


def test_dequantize_gives_the_levels_times_the_step() -> None:
    weight = torch.tensor([-9.0, -0.6, -0.2, 0.0, 0.2, 0.9, 9.0]).view(1, 7, 1, 1)
    scales = {2: torch.tensor([0.5]), 4: torch.tensor([0.25])}
    packed = PackedConvWeight.from_float(weight, scales, (2, 4, 32))
    centred = [-0.75, -0.75, -0.25, 0.25, 0.25, 0.75, 0.75]
    assert packed.levels == ("centred", "twos", "twos")
    assert packed.dequantize(2).flatten().tolist() == centred
    four = [-2.0, -0.5, -0.25, 0.0, 0.25, 1.0, 1.75]
    assert packed.dequantize(4).flatten().tolist() == four
    assert torch.equal(packed.dequantize(32), weight)
    twos = PackedConvWeight.from_float(weight, scales, (2, 4, 32), {2: "twos"})
    assert twos.dequantize(2).flatten().tolist() == [-1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_32_bits_keep_the_weight(channels: int, channels_last: bool) -> None:
    weight = torch.randn(2, channels, 3, 2)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    packed = PackedConvWeight.from_float(weight, torch.empty(0, 2), (32,))
    assert torch.equal(packed.dequantize(32), weight)


def test_nbytes_counts_codes_and_scales() -> None:
    packed = PackedConvWeight.from_float(torch.randn(64, 64, 3, 3), torch.ones(3, 64), (2, 4, 8))
    taps = 64 * 64 * 9
    assert packed.nbytes == taps // 4 + taps // 2 + taps + 3 * 64 * 4


def test_running_a_weight_does_not_change_what_is_counted_or_saved() -> None:
    packed = make_weight()
    before, state = packed.nbytes, packed.state_dict()
    mixed_conv2d(torch.randn(1, 5, 4, 4), packed, 8, torch.ones(4))
    assert packed.nbytes == before
    assert packed.state_dict().keys() == state.keys()


def _used_weight(scale: float = 0.1) -> tuple[PackedConvWeight, Callable[[], Tensor]]:
    """A weight that has been run, and a function that runs one and checks it."""
    x = torch.randn(2, 6, 5, 4)
    steps = torch.full((4, 8), scale)
    weight = PackedConvWeight.from_float(torch.randn(8, 6, 3, 3), steps, (2, 4, 8, 32))

    def run(other: PackedConvWeight = weight) -> Tensor:
        got = mixed_conv2d(x, other, 8, torch.full((4,), 0.05))
        expected = mixed_conv2d(x, other, 8, torch.full((4,), 0.05), backend="reference")
        assert isinstance(got, Tensor)
        assert isinstance(expected, Tensor)
        assert torch.equal(got, expected)
        return got

    run()
    return weight, run


def test_a_replaced_buffer_is_used_at_once() -> None:
    weight, run = _used_weight()
    before = run()
    changed = replace(weight, buffer=weight.buffer.flip(0))
    assert not torch.equal(run(changed), before)
    assert torch.equal(run(), before)


def test_codes_edited_in_place_are_used_at_once() -> None:
    weight, run = _used_weight()
    before = run()
    weight.packed(8).bitwise_not_()
    assert not torch.equal(run(), before)


def test_a_plan_made_while_the_codes_change_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, run = _used_weight()
    other = weight.buffer.flip(0)
    weight.buffer = weight.buffer.clone()
    make = direct.ConvPlan.__init__

    def make_and_change(plan: direct.ConvPlan, *args: Any) -> None:
        make(plan, *args)
        weight.buffer = other

    monkeypatch.setattr(direct.ConvPlan, "__init__", make_and_change)
    mixed_conv2d(torch.randn(2, 6, 5, 4), weight, 8, torch.full((4,), 0.05))
    monkeypatch.undo()
    run()


def test_retiled_copies_are_not_pickled() -> None:
    weight, run = _used_weight()
    fresh = PackedConvWeight.from_state_dict(weight.state_dict())
    assert len(pickle.dumps(weight)) == len(pickle.dumps(fresh))
    assert torch.equal(run(pickle.loads(pickle.dumps(weight))), run())


def test_the_callers_flushing_of_denormals_changes_nothing() -> None:
    """Their product is a normal float, but the multiplier alone is not."""
    x = torch.randn(1, 6, 5, 4) * 2.0**-30
    steps = torch.full((1, 8), 2.0**-100)
    weight = PackedConvWeight.from_float(torch.randn(8, 6, 3, 3), steps, (8,))
    expected = mixed_conv2d(x, weight, 8, 2.0**-38)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        got = mixed_conv2d(x, weight, 8, 2.0**-38)
    finally:
        torch.set_flush_denormal(False)
    assert isinstance(got, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(got, expected)
    assert bool((expected != 0).any())


def test_weights_stay_on_a_device_that_they_are_on() -> None:
    packed = make_weight()
    assert packed.to("cpu") is packed
    assert packed.to("meta").device.type == "meta"
    assert packed.to("meta").shape == packed.shape


@pytest.mark.parametrize("options", [(2, 4, 8, 32), (4,), (2, 8)])
def test_state_dict_through_torch_save(options: tuple[int, ...]) -> None:
    packed = make_weight(scales=0.1 + torch.rand(len(options), 6), bit_options=options)
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert_same(PackedConvWeight.from_state_dict(state), packed)


def test_state_dict_through_safetensors(tmp_path: Path) -> None:
    packed = make_weight(levels={4: "centred", 2: "twos"})
    save_file(packed.state_dict(), tmp_path / "weight.safetensors")
    again = PackedConvWeight.from_state_dict(load_file(tmp_path / "weight.safetensors"))
    assert_same(again, packed)
    assert again.levels == ("twos", "centred", "twos", "twos")
    x = torch.randn(1, 5, 4, 4)
    for bits in (2, 4, 8, 32):
        y, expected = (mixed_conv2d(x, w, bits, torch.ones(4)) for w in (again, packed))
        assert isinstance(y, Tensor)
        assert isinstance(expected, Tensor)
        assert torch.equal(y, expected)


Damage = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("version"), "entry 'version' is missing"),
        (lambda s: s.pop("codes_4"), "entry 'codes_4' is missing"),
        (lambda s: s.update(version=torch.tensor(2)), r"version is \[2\], this build reads \[1\]"),
        (lambda s: s.update(shape=torch.tensor([6, 5, 3])), "shape must be four positive ints"),
        (lambda s: s.update(shape=torch.tensor([6, 0, 3, 2])), "shape must be four positive ints"),
        (
            lambda s: s.update(shape=torch.tensor([6, 9, 3, 2])),
            r"codes_2 must be uint8 \(6, 3, 2, 3\), got torch.uint8 \(6, 3, 2, 2\)",
        ),
        (lambda s: s.update(shape=torch.tensor([6, 5, 2, 3])), "codes_2 must be uint8"),
        (
            lambda s: s.update(codes_8=s["codes_8"][:5]),
            r"codes_8 must be uint8 \(6, 3, 2, 5\), got torch.uint8 \(5, 3, 2, 5\)",
        ),
        (lambda s: s.update(codes_8=s["codes_8"].flatten()[:-1]), "codes_8 must be uint8"),
        (lambda s: s.update(codes_8=s["codes_8"].view(torch.int8)), "got torch.int8"),
        (
            lambda s: s.update(bit_options=torch.tensor([2, 4, 6, 32])),
            "only .* can be packed, got 6",
        ),
        (lambda s: s.update(bit_options=torch.tensor([4, 2, 8, 32])), "must be ascending"),
        (lambda s: s.update(centred=s["centred"][:2]), "centred must hold 4 bools"),
        (lambda s: s.update(centred=s["centred"].int()), "centred must hold 4 bools"),
        (lambda s: s.update(scales=s["scales"][:3]), r"scales must be float32 \(4, 6\)"),
        (lambda s: s.update(scales=s["scales"].double()), "scales must be float32"),
        (lambda s: s["scales"][1].fill_(torch.nan), r"scales must lie in \[2\^-126, 2\^126\]"),
        (
            lambda s: s["codes_32"].view(torch.float32).fill_(torch.inf),
            "codes_32 holds values that are not finite",
        ),
    ],
)
def test_a_damaged_state_is_refused(damage: Damage, message: str) -> None:
    state = make_weight().state_dict()
    PackedConvWeight.from_state_dict(state)
    damage(state)
    with pytest.raises(ValueError, match=message):
        PackedConvWeight.from_state_dict(state)


def nan_weight() -> Tensor:
    weight = torch.ones(6, 5, 3, 2)
    weight[5, 4, 2, 1] = torch.nan
    return weight


FLOAT_WEIGHT = torch.ones(6, 5, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((FLOAT_WEIGHT.int(), torch.ones(4, 6)), TypeError, "weight must be floating point"),
        (([1.0], torch.ones(4, 6)), TypeError, "weight must be a tensor, got list"),
        ((FLOAT_WEIGHT[0], torch.ones(4, 6)), ValueError, "weight must be .O, C/groups, KH, KW."),
        ((FLOAT_WEIGHT[:, :0], torch.ones(4, 6)), ValueError, "weight must be .* no empty side"),
        ((nan_weight(), torch.ones(4, 6)), ValueError, "weight holds values that are not finite"),
        ((FLOAT_WEIGHT / 0, torch.ones(4, 6)), ValueError, "weight holds values that are not"),
        ((FLOAT_WEIGHT, torch.ones(2, 6)), ValueError, r"scales must have shape \(4, 6\)"),
        ((FLOAT_WEIGHT, torch.ones(4, 5)), ValueError, r"scales must have shape \(4, 6\)"),
        ((FLOAT_WEIGHT, torch.ones(4, 6).int()), TypeError, "scales must be floating point"),
        ((FLOAT_WEIGHT, {2: torch.ones(6)}), ValueError, "scales has no entry for 4 bits"),
        ((FLOAT_WEIGHT, torch.zeros(4, 6)), ValueError, r"scales must lie in .*, got 0.0"),
        ((FLOAT_WEIGHT, -torch.ones(4, 6)), ValueError, r"scales must lie in .*, got -1.0"),
        (
            (FLOAT_WEIGHT, torch.ones(4, 6) * torch.nan),
            ValueError,
            "scales must lie in .*, got nan",
        ),
        ((FLOAT_WEIGHT, torch.ones(4, 6) / 0), ValueError, "scales must lie in .*, got inf"),
        ((FLOAT_WEIGHT, torch.full((4, 6), 2.0**-127)), ValueError, "scales must lie in"),
        ((FLOAT_WEIGHT, torch.full((4, 6), 2.0**127)), ValueError, "scales must lie in"),
        ((FLOAT_WEIGHT, torch.ones(1, 6), (6,)), ValueError, "bit_options: only .* got 6"),
        ((FLOAT_WEIGHT, torch.ones(1, 6), (0,)), ValueError, "bit_options may hold 1 to 16 and 32"),
        ((FLOAT_WEIGHT, torch.ones(2, 6), (8, 4)), ValueError, "bit_options must be ascending"),
        ((FLOAT_WEIGHT, torch.ones(0, 6), ()), ValueError, "bit_options must not be empty"),
        ((FLOAT_WEIGHT, torch.ones(1, 6), (4.0,)), TypeError, "bit_options must hold ints"),
        ((FLOAT_WEIGHT, torch.ones(1, 6), (4,), {8: "twos"}), ValueError, "levels names 8 bits"),
        ((FLOAT_WEIGHT, torch.ones(1, 6), (4,), {4: "odd"}), ValueError, "levels must be one of"),
        (
            (FLOAT_WEIGHT, torch.ones(4, 6, device="meta")),
            ValueError,
            "scales is on meta, but the input is on cpu",
        ),
    ],
)
def test_from_float_refuses(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PackedConvWeight.from_float(*arguments)


def test_the_extreme_scales_are_taken() -> None:
    for scale in (2.0**-126, 2.0**126):
        packed = PackedConvWeight.from_float(FLOAT_WEIGHT, torch.full((4, 6), scale))
        assert torch.isfinite(packed.dequantize(8)).all()


def test_a_width_that_is_not_held_is_refused() -> None:
    packed = make_weight(scales=torch.ones(1, 6), bit_options=(4,))
    with pytest.raises(ValueError, match=r"bits=8 is not held; this weight has \(4,\)"):
        packed.dequantize(8)


# PackedActivation


def make_activation(**kwargs: Any) -> PackedActivation:
    fields: dict[str, Any] = {
        "data": torch.zeros(2, 12, dtype=torch.uint8),
        "bits": torch.tensor([4, 8], dtype=torch.int32),
        "scale": torch.ones(2),
        "zero_point": torch.zeros(2, dtype=torch.int32),
        "bit_options": (4, 8),
        "channels": 3,
        "height": 2,
        "width": 2,
    }
    return PackedActivation(**{**fields, **kwargs})


def test_activation_attributes() -> None:
    packed = make_activation()
    assert packed.shape == (2, 3, 2, 2)
    assert packed.device == torch.device("cpu")
    copy = packed.clone()
    copy.data.fill_(9)
    assert not packed.data.any()
    assert packed.to("meta").device.type == "meta"
    scale, zero_point = packed.quantizer.at(8)
    assert (scale.item(), zero_point.item()) == (1.0, 0)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"data": torch.zeros(2, 12)}, TypeError, "data must be uint8 .*, got torch.float32"),
        ({"data": torch.zeros(24).byte()}, TypeError, "data must be uint8 .* with 1 dimensions"),
        ({"data": torch.zeros(2, 11).byte()}, ValueError, "data has rows of 11 bytes, .* takes 12"),
        ({"data": torch.zeros(12, 2).byte().T}, ValueError, "data must be contiguous"),
        ({"bits": torch.tensor([4, 8])}, TypeError, "bits must be torch.int32, got torch.int64"),
        ({"bits": torch.tensor([4]).int()}, ValueError, r"bits must have shape \(2,\)"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must have shape \(2,\), got \(3,\)"),
        ({"scale": torch.ones(2).double()}, TypeError, "scale must be torch.float32"),
        ({"zero_point": torch.zeros(2)}, TypeError, "zero_point must be torch.int32"),
        ({"zero_point": torch.zeros(2, 1).int()}, ValueError, "zero_point must have shape"),
        (
            {"scale": torch.ones(2, device="meta")},
            ValueError,
            "scale is on meta, but data is on cpu",
        ),
        ({"bit_options": (4, 6)}, ValueError, "bit_options: only .* got 6"),
    ],
)
def test_an_activation_of_the_wrong_form_is_refused(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_activation(**fields)


# The functions over codes and activations


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_bits(torch.zeros(3).byte(), 3), ValueError, "bits must be 2, 4 or 8, got 3"),
        (
            lambda: pack_bits(torch.zeros(3).byte(), 32),
            ValueError,
            "bits must be 2, 4 or 8, got 32",
        ),
        (lambda: pack_bits(torch.zeros(3), 4), TypeError, "codes must be int8 or uint8"),
        (lambda: pack_bits([1], 4), TypeError, "codes must be a tensor, got list"),
        (lambda: pack_bits(torch.zeros(3, 0).byte(), 4), ValueError, "codes must be .* with C > 0"),
        (lambda: unpack_bits(torch.zeros(2).int(), 4, 3, True), TypeError, "packed must be uint8"),
        (
            lambda: unpack_bits(torch.zeros(2).byte(), 4, 5, True),
            ValueError,
            "packed must have 3 bytes",
        ),
        (
            lambda: unpack_bits(torch.zeros(2).byte(), 4, 0, True),
            ValueError,
            "channels must be a posi",
        ),
        (
            lambda: unpack_bits(torch.zeros(2).byte(), 1, 16, True),
            ValueError,
            "bits must be 2, 4 or",
        ),
        (lambda: unpack_dequantize(torch.zeros(2)), TypeError, "packed must be a PackedActivation"),
        (
            lambda: quantize_pack(torch.zeros(1, 1, 1), 8, 1.0),
            ValueError,
            "input must be .N, C, H, W.",
        ),
        (
            lambda: quantize_pack(torch.zeros(1, 0, 1, 1), 8, 1.0),
            ValueError,
            "input must not be empty",
        ),
        (
            lambda: quantize_pack(torch.zeros(1, 1, 1, 1).int(), 8, 1.0),
            TypeError,
            "input must be fl",
        ),
        (lambda: quantize_pack(torch.zeros(1, 1, 1, 1), 6, 1.0), ValueError, "only .* got 6"),
        (lambda: quantize_pack(torch.zeros(1, 1, 1, 1), 8, 0.0), ValueError, "^scale must lie in"),
        (
            lambda: quantize_pack(torch.zeros(1, 1, 1, 1), 8, 1.0, 256),
            ValueError,
            "^zero_point must lie",
        ),
        (
            lambda: quantize_pack(torch.zeros(1, 1, 1, 1), 8, 1.0, -1),
            ValueError,
            "^zero_point must lie",
        ),
        (
            lambda: quantize_pack(torch.zeros(1, 1, 1, 1), 8, 1.0, 0.5),
            TypeError,
            r"zero_point\[8\] must be an",
        ),
        (
            lambda: quantize_pack(torch.zeros(2, 1, 1, 1), torch.tensor([8, 3]), torch.ones(4)),
            ValueError,
            r"bits\[1\] is 3",
        ),
        (
            lambda: quantize_pack(torch.zeros(1, 1, 1, 1), torch.tensor([8]), torch.ones(5)),
            ValueError,
            "scale does not tell its widths",
        ),
        (
            lambda: unpack_dequantize(make_activation(bits=torch.tensor([4, 2]).int())),
            ValueError,
            r"bits\[1\] is 2",
        ),
    ],
)
def test_packing_functions_refuse(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


# mixed_conv2d


def valid_arguments() -> dict[str, Any]:
    return {
        "input": torch.randn(3, 4, 5, 5),
        "weight": torch.randn(6, 4, 3, 3),
        "bits": torch.tensor([2, 8, 32]),
        "input_scale": torch.ones(3),
        "weight_scale": torch.ones(3, 6),
    }


def packed_input(bits: list[int], scale: float = 0.1) -> PackedActivation:
    scales = torch.full((4,), scale)
    return quantize_pack(torch.randn(3, 4, 5, 5), torch.tensor(bits), scales)


PACKED_WEIGHT = PackedConvWeight.from_float(torch.ones(6, 4, 3, 3), torch.ones(4, 6))
META = torch.device("meta")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": [1]}, TypeError, "input must be a tensor, got list"),
        ({"input": torch.ones(3, 4, 5, 5).int()}, TypeError, "input must be floating point"),
        ({"input": torch.ones(4, 5, 5)}, ValueError, r"input must be \(N, C, H, W\)"),
        ({"input": torch.ones(3, 4, 0, 5)}, ValueError, "input must not be empty but for N"),
        ({"input": torch.ones(3, 3, 5, 5)}, ValueError, "input has 3 channels"),
        (
            {"input": torch.ones(3, 4, 2, 2)},
            ValueError,
            "input of 2x2 .* smaller than the kernel's 3x3",
        ),
        ({"weight": torch.ones(6, 4, 3)}, ValueError, "weight must be"),
        ({"weight": torch.ones(6, 4, 3, 3).int()}, TypeError, "weight must be floating point"),
        ({"weight": torch.ones(6, 4, 3, 3, device=META)}, ValueError, "weight is on meta"),
        (
            {"weight": torch.full((6, 4, 3, 3), torch.nan)},
            ValueError,
            "weight holds values that are",
        ),
        ({"weight": PACKED_WEIGHT}, ValueError, "weight_scale goes with a float weight"),
        (
            {"weight": PACKED_WEIGHT.to("meta"), "weight_scale": None},
            ValueError,
            "weight is on meta",
        ),
        ({"weight_scale": None}, ValueError, "weight_scale is needed with a float weight"),
        ({"weight_scale": torch.zeros(3, 6)}, ValueError, "weight_scale must lie in"),
        ({"weight_scale": -torch.ones(3, 6)}, ValueError, "weight_scale must lie in .*, got -1.0"),
        ({"weight_scale": torch.ones(3, 6) * torch.nan}, ValueError, "weight_scale must lie in"),
        ({"weight_scale": torch.ones(3, 5)}, ValueError, "weight_scale must have shape"),
        ({"weight_scale": torch.ones(3, 6, device=META)}, ValueError, "weight_scale is on meta"),
        (
            {"bits": torch.tensor([2, 8, 3])},
            ValueError,
            r"bits\[2\] is 3; .* one of \(2, 4, 8, 32\)",
        ),
        ({"bits": torch.tensor([-2, 8, 3])}, ValueError, r"bits\[0\] is -"),
        ({"bits": torch.tensor([2, 2**32 + 8, 2])}, ValueError, r"bits\[1\] is 2147483647"),
        ({"bits": 5}, ValueError, r"bits\[0\] is 5"),
        ({"bits": 2**40}, ValueError, r"bits\[0\] is 2147483647"),
        ({"bits": True}, TypeError, "bits must be an int or an integer tensor, got True"),
        ({"bits": [2, 8, 4]}, TypeError, "bits must be an int or an integer tensor"),
        ({"bits": torch.ones(3)}, TypeError, "bits must be an integer tensor, got torch.float32"),
        ({"bits": torch.ones(3).bool()}, TypeError, "bits must be an integer tensor"),
        ({"bits": torch.tensor([2, 8])}, ValueError, r"bits must have shape \(3,\), got \(2,\)"),
        ({"bits": torch.tensor([[2, 8, 4]])}, ValueError, r"bits must have shape \(3,\)"),
        ({"bits": torch.tensor([2, 8, 4], device=META)}, ValueError, "bits is on meta"),
        ({"input_scale": None}, ValueError, "input_scale is needed to quantize a float input"),
        (
            {"input_scale": torch.zeros(3)},
            ValueError,
            r"input_scale must lie in \[2\^-126, 2\^126\]",
        ),
        ({"input_scale": torch.full((3,), torch.nan)}, ValueError, "input_scale must lie in"),
        ({"input_scale": torch.full((3,), torch.inf)}, ValueError, "input_scale must lie in"),
        ({"input_scale": -torch.ones(3)}, ValueError, "input_scale must lie in"),
        ({"input_scale": torch.ones(2)}, ValueError, "input_scale must have shape"),
        ({"input_scale": {2: 1.0, 8: 1.0}}, ValueError, "input_scale has no entry for 4 bits"),
        ({"input_scale": 1.0}, ValueError, "input_scale must give a value for each of the widths"),
        ({"input_scale": torch.ones(3).int()}, TypeError, "input_scale must be floating point"),
        (
            {"input_zero_point": torch.tensor([4, 0, 0])},
            ValueError,
            "input_zero_point .* at 2 bits, got 4",
        ),
        (
            {"input_zero_point": torch.tensor([0, -1, 0])},
            ValueError,
            "input_zero_point .* 4 bits, got -1",
        ),
        (
            {"input_zero_point": torch.tensor([0.0] * 3)},
            TypeError,
            "input_zero_point must be an integer",
        ),
        (
            {"input_scale": None, "bits": 32, "input_zero_point": torch.zeros(3).int()},
            ValueError,
            "input_zero_point needs input_scale",
        ),
        ({"mul": torch.ones(4, 5)}, ValueError, "mul must have shape"),
        ({"mul": torch.ones(4, 6).int()}, TypeError, "mul must be floating point"),
        ({"add": torch.ones(4, 6, device=META)}, ValueError, "add is on meta"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
        ({"bias": torch.ones(6).int()}, TypeError, "bias must be floating point"),
        ({"bias": torch.ones(6, device=META)}, ValueError, "bias is on meta"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor"),
        ({"residual": torch.ones(3, 6, 3, 4)}, ValueError, "residual must have the output's shape"),
        ({"residual": torch.ones(3, 6, 3, 3).int()}, TypeError, "residual must be floating point"),
        ({"residual": torch.ones(3, 6, 3, 3, device=META)}, ValueError, "residual is on meta"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": (1, 2, 3)}, ValueError, "stride must be an int or a pair"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": (1, 1, -1, 0)}, ValueError, "padding must hold ints of at least 0"),
        ({"padding": (1, 2, 3)}, ValueError, "padding must be an int or a pair"),
        ({"groups": 0}, ValueError, "groups must be a positive int"),
        ({"groups": 4}, ValueError, "groups=4 does not divide the 6 output channels"),
        ({"groups": 2}, ValueError, "input has 4 channels, .* takes 8"),
        ({"activation": "gelu"}, ValueError, "activation must be None or 'relu', got 'gelu'"),
        ({"output_bits": 8}, ValueError, "need output_scale"),
        ({"output_zero_point": torch.zeros(4).int()}, ValueError, "need output_scale"),
        ({"output_scale": torch.zeros(4)}, ValueError, "output_scale must lie in"),
        (
            {"output_scale": torch.ones(3), "output_bits": 3},
            ValueError,
            "output_bits: only .* got 3",
        ),
        (
            {"output_scale": 1.0, "output_bits": 8, "output_zero_point": 256},
            ValueError,
            r"output_zero_point must lie in \[0, 255\] at 8 bits, got 256",
        ),
        ({"bit_options": (2,)}, ValueError, "weight_scale must have shape"),
        ({"bit_options": (4, 2, 8)}, ValueError, "bit_options must be ascending"),
        ({"bit_options": (2, 4, 17)}, ValueError, "bit_options may hold 1 to 16 and 32, got 17"),
        ({"backend": "tpu"}, ValueError, "backend must be one of .*, got 'tpu'"),
        (
            {"input": torch.ones(3, 4, 5, 5).double(), "bits": 32},
            TypeError,
            "weight must be float64 like the input",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_mixed_conv2d_refuses(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = valid_arguments()
    assert isinstance(mixed_conv2d(**arguments), Tensor)
    with pytest.raises(error, match=message):
        mixed_conv2d(**{**arguments, **changes})


def test_the_valid_packed_form_is_taken() -> None:
    y = mixed_conv2d(packed_input([2, 8, 32]), PACKED_WEIGHT, torch.tensor([2, 8, 32]))
    assert isinstance(y, Tensor)
    assert y.shape == (3, 6, 3, 3)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_packed_codes_of_another_width_are_refused(backend: str) -> None:
    bits = torch.tensor([2, 8, 0])
    with pytest.raises(
        ValueError, match=r"bits\[1\] is 8, but the packed input stores .* at 4 bits"
    ):
        mixed_conv2d(packed_input([2, 4, 4]), PACKED_WEIGHT, bits, backend=backend)
    with pytest.raises(ValueError, match="sample 0 is stored at 0 bits but needed at 2"):
        mixed_conv2d(packed_input([0, 8, 4]), PACKED_WEIGHT, bits, torch.ones(4), backend=backend)


def test_the_backend_is_told_when_it_does_not_take_a_width() -> None:
    arguments = valid_arguments() | {
        "bits": 6,
        "bit_options": (6,),
        "input_scale": torch.ones(1),
        "weight_scale": torch.ones(1, 6),
    }
    with pytest.raises(
        ValueError, match=re.escape("backend 'cpu' does not take (6, 32) bits on cpu")
    ):
        mixed_conv2d(**arguments, backend="cpu")
    with use_backend("cpu"), pytest.raises(ValueError, match="backend 'cpu' does not take"):
        mixed_conv2d(**arguments)
    backends._announced.clear()
    with pytest.warns(RuntimeWarning, match=r"mixed_conv2d: the 'cpu' backend is not used"):
        mixed_conv2d(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed_conv2d(**arguments)


@pytest.mark.parametrize("backend", [b for b in CPU_BACKENDS if b != "reference"])
def test_float64_asked_of_another_backend_is_refused(backend: str) -> None:
    x = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=f"backend '{backend}' does not take float64"):
        mixed_conv2d(x, x, 32, backend=backend)


def test_an_accumulator_that_could_overflow_is_refused() -> None:
    taps = (2**31 - 1) // (255 * 128)
    for channels, fits in ((taps, True), (taps + 1, False)):
        arguments: dict[str, Any] = {
            "input": torch.ones(1, channels, 1, 1),
            "weight": torch.ones(1, channels, 1, 1),
            "bits": 8,
            "input_scale": {8: 1.0},
            "weight_scale": {8: torch.ones(1)},
        }
        if fits:
            y = mixed_conv2d(**arguments)
            assert isinstance(y, Tensor)
            assert y.item() == channels
        else:
            with pytest.raises(
                ValueError, match=rf"weight sums {channels} .* at 8 bits and overflow"
            ):
                mixed_conv2d(**arguments)


def test_the_largest_sum_that_fits_is_exact() -> None:
    channels = (2**31 - 1) // (255 * 128)
    for backend in CPU_BACKENDS:
        y = mixed_conv2d(
            torch.full((1, channels, 1, 1), 1e9),
            torch.full((1, channels, 1, 1), -1e9),
            8,
            {8: 1.0},
            weight_scale={8: torch.ones(1)},
            backend=backend,
        )
        assert isinstance(y, Tensor)
        assert y.item() == torch.tensor(-channels * 255 * 128, dtype=torch.float32).item()


# In place


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"residual": None},
            TypeError,
            "residual must be a tensor or a PackedActivation, got None",
        ),
        ({"residual": torch.ones(3, 6, 3, 3).half()}, TypeError, "residual must be float32"),
        ({"residual": torch.ones(3, 6, 3, 4)}, ValueError, "residual must have the output's shape"),
        (
            {"residual": torch.ones(1, 6, 3, 3).expand(3, 6, 3, 3)},
            ValueError,
            "residual must not be expanded",
        ),
        (
            {"weight": torch.ones(6, 4, 3, 3, requires_grad=True)},
            RuntimeError,
            "not differentiable, but weight requires a gradient",
        ),
        (
            {"residual": torch.ones(3, 6, 3, 3, requires_grad=True)},
            RuntimeError,
            "not differentiable, but residual requires a gradient",
        ),
    ],
)
def test_in_place_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = valid_arguments() | {"residual": torch.ones(3, 6, 3, 3)}
    mixed_conv2d_(**arguments)
    with pytest.raises(error, match=message):
        mixed_conv2d_(**{**arguments, **changes})


def test_in_place_takes_parameters_without_gradients() -> None:
    arguments = valid_arguments() | {"residual": torch.zeros(3, 6, 3, 3)}
    arguments["weight"].requires_grad_()
    with torch.no_grad():
        mixed_conv2d_(**arguments)
    assert arguments["residual"].any()


def test_a_refused_call_leaves_the_residual_alone() -> None:
    residual = torch.ones(3, 6, 3, 3)
    arguments = valid_arguments() | {"residual": residual, "bits": torch.tensor([2, 8, 3])}
    with pytest.raises(ValueError, match=r"bits\[2\] is 3"):
        mixed_conv2d_(**arguments)
    assert torch.equal(residual, torch.ones(3, 6, 3, 3))


# Backends


def test_backend_scopes_nest_and_end() -> None:
    default = backend_info()["defaults"]["cpu"]
    with use_backend("reference"):
        assert backend_info()["defaults"]["cpu"] == "reference"
        with use_backend("cpu"):
            assert backend_info()["defaults"]["cpu"] == "cpu"
        assert backend_info()["defaults"]["cpu"] == "reference"
    assert backend_info()["defaults"]["cpu"] == default
    use_backend("reference")
    assert backend_info()["defaults"]["cpu"] == "reference"
    use_backend(None)
    assert backend_info()["defaults"]["cpu"] == default


def test_an_unknown_backend_is_refused_and_changes_nothing() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'tpu'"):
        use_backend("tpu")
    assert backend_info()["defaults"]["cpu"] == "cpu"


def test_backend_info_tells_what_runs() -> None:
    info = backend_info()
    assert set(available_backends()) <= set(info)
    for name in available_backends():
        assert info[name]["available"] is True
    assert info["cpu"]["isa"] in info["cpu"]["supported_isas"]
    assert info["cpu"]["threads"] == torch.get_num_threads()


def test_warmup_runs() -> None:
    warmup()
    warmup("cpu")


DEBUG_CODE = """
import os
import torch
from dfs_kernels import ops
print(ops._may_read(torch.empty(1)), ops._may_read(torch.empty(1, device="meta")))
"""


@pytest.mark.parametrize(("debug", "expected"), [("0", "True False"), ("1", "True True")])
def test_dfs_debug_looks_at_values_on_every_device(debug: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DEBUG_CODE],
        env={"PYTHONPATH": str(ROOT), "DFS_DEBUG": debug, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_packed_activations_can_be_taken_apart_by_sample() -> None:
    packed = packed_input([2, 8, 4])
    whole = unpack_dequantize(packed)
    for n in range(3):
        one = replace(packed, data=packed.data[n : n + 1], bits=packed.bits[n : n + 1])
        assert torch.equal(unpack_dequantize(one), whole[n : n + 1])


def test_a_residual_stored_at_a_width_it_has_no_room_for_is_refused() -> None:
    x = torch.randn(4, 3, 6, 7)
    weight = torch.randn(5, 3, 3, 3)
    residual = PackedActivation(
        torch.zeros(4, 6 * 7 * 5, dtype=torch.uint8),
        torch.tensor([8, 8, 32, 8], dtype=torch.int32),
        torch.ones(1),
        torch.zeros(1, dtype=torch.int32),
        (8,),
        5,
        6,
        7,
    )
    steps = {8: torch.full((5,), 0.1)}
    with pytest.raises(ValueError, match=r"residual\.bits\[2\] is 32"):
        mixed_conv2d(x, weight, 8, {8: 0.1}, weight_scale=steps, padding=1, residual=residual)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": torch.ones(2, 1)}, "scales must have shape"),
        ({"scales": torch.ones(2, 4).half()}, "scales must be"),
        ({"levels": ("twos", "bogus")}, "levels"),
        ({"buffer": torch.zeros(10, dtype=torch.uint8)}, "buffer must have shape"),
    ],
)
def test_a_packed_weight_put_together_wrongly_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    good = PackedConvWeight.from_float(torch.randn(4, 3, 3, 3), torch.ones(2, 4), (4, 8))
    with pytest.raises((TypeError, ValueError), match=message):
        replace(good, **changes)


def test_strided_widths_and_scales_of_an_activation_are_made_contiguous() -> None:
    packed = quantize_pack(torch.randn(4, 3, 2, 2), torch.tensor([8, 4, 2, 8]), torch.rand(4) + 0.1)
    strided = {
        name: torch.stack([getattr(packed, name), torch.full_like(getattr(packed, name), 7)], 1)
        for name in ("bits", "scale", "zero_point")
    }
    same = replace(packed, **{name: values[:, 0] for name, values in strided.items()})
    assert same.bits.is_contiguous()
    assert torch.equal(unpack_dequantize(same), unpack_dequantize(packed))


def test_a_packed_activation_of_negative_size_is_refused() -> None:
    bits = torch.full((4,), 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="height must be positive"):
        PackedActivation(
            torch.zeros(4, 42, dtype=torch.uint8),
            bits,
            torch.ones(1),
            torch.zeros(1, dtype=torch.int32),
            (2,),
            3,
            -6,
            -7,
        )
