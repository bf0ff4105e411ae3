"""What only the CUDA backend has. Its kernels run in the emulator here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfs_kernels import (
    BlockConv,
    GateStep,
    PackedActivation,
    PackedConvWeight,
    available_backends,
    gated_block,
    mixed_conv2d,
    mixed_conv2d_,
    quantize_pack,
    rnn_gate,
    unpack_dequantize,
)
from dfs_kernels.backends import cuda, cuda_bits, reference, triton
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import row_bytes
from tests.kernels.cases import (
    FORMS,
    Built,
    ConvCase,
    assert_matches_reference,
    build,
    build_largest_products,
    cases_of_forms,
    run,
    sample_bits,
    subset,
)
from tests.kernels.gate_cases import CHOICES, gate_weights, packed_features

ROOT = Path(__file__).resolve().parents[2]

emulated = pytest.mark.skipif(
    "cuda" not in available_backends(), reason="the CUDA kernels were not built for the emulator"
)


@emulated
@pytest.mark.parametrize("backend", ["cuda", "cuda-bits"])
@pytest.mark.parametrize("input_form", ["contiguous", "channels_last", "packed", "requantized"])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "size"),
    [
        (16, 16, 3, 1, (18, 16)),  # two taps to a step at 8 bits, a half step at 2 bits
        (32, 32, 3, 1, (9, 8)),
        (64, 64, 3, 1, (8, 8)),
        (64, 16, 1, 2, (9, 9)),  # only every second pixel is staged
        (16, 24, 3, 2, (13, 12)),
        (136, 40, 3, 1, (6, 5)),  # three slices at 8 bits, two at 4, and a whole one at 2
        (272, 72, 1, 1, (5, 5)),  # two blocks of outputs
        (20, 16, 5, 1, (9, 40)),  # rows of 10 and 5 bytes
        (136, 24, 3, 1, (9, 20)),  # slices, and blocks of several warps
        (64, 64, 3, 1, (3, 150)),  # tiles beside each other
    ],
)
def test_layers_of_the_tensor_core_kernel(
    channels: int,
    outputs: int,
    kernel: int,
    stride: int,
    size: tuple[int, int],
    input_form: str,
    backend: str,
) -> None:
    case = ConvCase(
        bits=(2, 8, 0, 4),
        options=(2, 4, 8),
        centred=(True, False, False),
        group_channels=channels,
        group_outputs=outputs,
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2,) * 4,
        size=size,
        input_form=input_form,
        residual_form="packed",
        output_form="fixed",
        relu=True,
    )
    assert _takes_tensor_cores(case.geometry)
    built = build(case)
    cuda._cuda.take_launches()
    assert_matches_reference(built, backend)
    assert ("conv_bits" in cuda._cuda.take_launches()) == (backend == "cuda-bits")


def _takes_tensor_cores(geometry: ConvGeometry) -> bool:
    return all(cuda.tile_bytes(geometry, (b,), (b == 2,)) > 0 for b in (2, 4, 8))


@emulated
@pytest.mark.parametrize("zero_at_top", [False, True])
def test_largest_products_of_bit_planes(zero_at_top: bool) -> None:
    assert_matches_reference(build_largest_products(2, zero_at_top), "cuda-bits")


@emulated
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("channels", "outputs"), [(61, 37), (3, 5), (330, 20)])
def test_bit_planes_of_odd_layers(channels: int, outputs: int, centred: bool) -> None:
    """Channels that fill no word, outputs that fill no tile; the last in two slices."""
    case = ConvCase(
        bits=(2, 8, 2),
        options=(2, 8),
        centred=(centred, False),
        group_channels=channels,
        group_outputs=outputs,
        size=(7, 9),
        input_form="packed",
    )
    assert_matches_reference(build(case), "cuda-bits")


@emulated
@pytest.mark.parametrize(("input_form", "residual_form", "output_form"), FORMS)
def test_bit_planes_in_every_combination_of_forms(
    input_form: str, residual_form: str | None, output_form: str
) -> None:
    for case in cases_of_forms(input_form, residual_form, output_form):
        assert_matches_reference(build(case), "cuda-bits")


@emulated
def test_tiles_of_bit_planes() -> None:
    """Five half steps of 32 lanes, two planes for each of 8 column tiles, and their ones."""
    layer = ConvGeometry(64, 64, 3, 3)
    assert cuda_bits.tile_bytes(layer, (2,), (True,)) == 4 * (64 + 5 * 32 * (2 * 8 + 1))
    for bits in (4, 8, 32):
        assert cuda_bits.tile_bytes(layer, (bits,), (False,)) == cuda.tile_bytes(
            layer, (bits,), (False,)
        )
    assert cuda_bits.tile_bytes(ConvGeometry(8, 8, 40, 40), (2,), (True,)) == 0
    assert cuda_bits.tile_variant() != cuda.tile_variant()


@emulated
def test_a_layer_that_bit_planes_do_not_fit_is_multiplied_as_bytes() -> None:
    """Their ones and offsets take room in shared memory beside the weights."""
    case = ConvCase(
        bits=(2, 8),
        options=(2, 8),
        centred=(True, False),
        group_channels=64,
        group_outputs=8,
        kernel=(17, 17),
        padding=(8, 8, 8, 8),
        size=(4, 5),
        input_form="packed",
    )
    geometry = case.geometry
    assert cuda_bits.tile_bytes(geometry, (2,), (True,)) == cuda.tile_bytes(geometry, (2,), (True,))
    built = build(case)
    cuda._cuda.take_launches()
    assert_matches_reference(built, "cuda-bits")
    launches = cuda._cuda.take_launches()
    assert "conv_mma" in launches
    assert "conv_bits" not in launches


def test_a_gpu_without_1_bit_tensor_cores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cuda, "is_emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda_bits.unavailable_reason() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    assert "12.0 has no 1-bit tensor cores" in str(cuda_bits.unavailable_reason())


@emulated
@pytest.mark.parametrize("centred", [False, True])
def test_what_the_general_kernel_takes_has_no_tiles(centred: bool) -> None:
    grouped = ConvGeometry(8, 8, 3, 3, groups=2)
    assert cuda.tile_bytes(grouped, (2, 4, 8, 32), (centred,) * 4) == 0
    plain = ConvGeometry(8, 8, 3, 3)
    assert (cuda.tile_bytes(plain, (8,), (centred,)) == 0) == centred
    assert cuda.tile_bytes(ConvGeometry(8, 8, 40, 40), (8,), (False,)) == 0


@emulated
def test_results_do_not_depend_on_how_samples_are_divided() -> None:
    """Few samples are divided into smaller tiles than many."""
    case = ConvCase(bits=(4, 2, 8) * 40, group_channels=16, group_outputs=8, size=(24, 11))
    built = build(case)
    whole = run(built, "cuda").out
    for n in (0, 1, 59):
        alone = run(subset(built, [n]), "cuda").out
        assert torch.equal(sample_bits(alone, 0), sample_bits(whole, n))


@emulated
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("output_form", ["float", "fixed"])
def test_an_unknown_width_fills_its_sample(groups: int, output_form: str) -> None:
    """Nothing can be raised on a GPU without waiting for it."""
    case = ConvCase(
        bits=(8, 2, 4), groups=groups, group_channels=8, group_outputs=2, output_form=output_form
    )
    built = build(case)
    good = run(built, "cuda").out
    bits = built.bits.clone()
    bits[1] = 5
    bad = run(replace(built, bits=bits), "cuda").out
    for n in (0, 2):
        assert torch.equal(sample_bits(bad, n), sample_bits(good, n))
    if isinstance(bad, PackedActivation):
        assert bool((bad.data[1] == 0xFF).all())
    else:
        assert bool(bad[1].isnan().all())


@emulated
def test_codes_of_another_width_than_the_samples_fill_it() -> None:
    built = build(ConvCase(bits=(8, 2, 4), input_form="packed", group_channels=8))
    bits = built.bits.clone()
    bits[1] = 8
    out = run(replace(built, bits=bits), "cuda").out
    assert isinstance(out, torch.Tensor)
    assert bool(out[1].isnan().all())
    assert not bool(out[[0, 2]].isnan().any())


@emulated
def test_quantize_pack_fills_an_unknown_width() -> None:
    bits = torch.tensor([8, 3, 0, 2], dtype=torch.int32)
    data = torch.full((4, row_bytes((2, 8), 5, 3, 4)), 0x5A, dtype=torch.uint8)
    zeros = torch.zeros(2, dtype=torch.int32)
    packed = PackedActivation(data, bits, torch.ones(2), zeros, (2, 8), 5, 3, 4)
    cuda.quantize_pack(torch.randn(4, 5, 3, 4), packed)
    assert bool((packed.data[1] == 0xFF).all())
    assert bool((packed.data[2] == 0x5A).all())
    assert bool(cuda.unpack_dequantize(packed)[1].isnan().all())


@emulated
def test_a_gated_block_is_three_launches() -> None:
    """Two convolutions and the gate of the next block, on the 8-bit stream in place."""
    options, channels = (2, 4, 8), 16
    scales = {b: 0.02 * 2 ** (8 - b) for b in options}
    weights = [
        PackedConvWeight.from_float(
            torch.randn(channels, channels, 3, 3),
            {b: torch.full((channels,), 4.0 / 2**b) for b in options},
            options,
        )
        for _ in range(2)
    ]
    gate = gate_weights(channels)
    images = torch.rand(5, channels, 8, 8) * 3
    bits = torch.tensor([8, 0, 2, 4, 8], dtype=torch.int32)

    def run_steps(backend: str) -> tuple[PackedActivation, GateStep]:
        stream = quantize_pack(images, 8, 0.013, backend=backend)
        cuda._cuda.take_launches()
        middle = mixed_conv2d(
            stream, weights[0], bits, scales, padding=1, activation="relu", output_scale=scales,
            backend=backend,
        )  # fmt: skip
        mixed_conv2d_(
            middle, weights[1], bits, padding=1, residual=stream, activation="relu", backend=backend
        )
        return stream, rnn_gate(stream, gate, (0, 2, 4, 8), backend=backend)

    def run_op(backend: str) -> tuple[PackedActivation, GateStep]:
        branch = [BlockConv.create(weight, scales, padding=1) for weight in weights]
        stream = quantize_pack(images, 8, 0.013, backend=backend)
        cuda._cuda.take_launches()
        _, step = gated_block(
            stream, bits, branch, gate=gate, choices=(0, 2, 4, 8), backend=backend
        )
        assert step is not None
        return stream, step

    expected_stream, expected_step = run_steps("reference")
    run_steps("cuda")  # makes the tiles, which are kept
    for run_block in (run_steps, run_op):
        stream, step = run_block("cuda")
        assert cuda._cuda.take_launches() == ["conv_mma", "conv_mma", "rnn_gate"]
        assert torch.equal(stream.data, expected_stream.data)
        assert torch.equal(step.bits, expected_step.bits)


def convolution_call(case: ConvCase, backend: str = "cuda") -> Callable[[], Tensor]:
    arguments = build(case).arguments()

    def call() -> Tensor:
        found = mixed_conv2d(**arguments, backend=backend)
        return found.data if isinstance(found, PackedActivation) else found

    return call


def input_gradient_call() -> Callable[[], Tensor]:
    """A step for each 16 of 40 outputs; then the finished tile."""
    case = ConvCase(
        bits=(32,) * 3,
        group_channels=24,
        group_outputs=40,
        kernel=(1, 1),
        padding=(0, 0, 0, 0),
        size=(9, 10),
        packed_weight=False,
    )
    arguments = build(case).arguments()
    x = arguments["input"].requires_grad_()
    y = mixed_conv2d(**arguments, backend="cuda")
    assert isinstance(y, Tensor)
    slope = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return lambda: torch.autograd.grad(y, x, slope, retain_graph=True)[0]


def gate_call() -> Callable[[], Tensor]:
    features, weights = packed_features(4, 72, 5, 4), gate_weights(72)

    def call() -> Tensor:
        step = rnn_gate(features, weights, CHOICES, backend="cuda")
        return torch.cat([step.logits, step.bits[:, None].double()], 1)

    return call


def packing_call() -> Callable[[], Tensor]:
    x, scale = torch.randn(4, 40, 6, 7), torch.tensor([0.02])
    return lambda: quantize_pack(x, 8, scale, bit_options=(8,), backend="cuda").data


def unpacking_call() -> Callable[[], Tensor]:
    x = quantize_pack(torch.rand(4, 40, 6, 7), 8, 0.02, backend="reference")
    return lambda: unpack_dequantize(x, backend="cuda")


# Channels in several slices, read through the table of an 8-bit stream; products in several parts.
_SLICED = ConvCase(
    bits=(8, 8, 4, 2), options=(2, 4, 8), centred=(True, False, False), group_channels=136,
    group_outputs=24, size=(9, 20), input_form="stream", residual_form="packed",
    output_form="fixed", relu=True,
)  # fmt: skip
_SLICED_BITS = replace(_SLICED, bits=(2,) * 4, group_channels=300, output_form="float")
_FLOAT = ConvCase(bits=(32,) * 4, group_channels=8, group_outputs=40, size=(9, 10))


@emulated
@pytest.mark.parametrize(
    ("kernel", "make", "barriers"),
    [
        ("conv_mma", lambda: convolution_call(_SLICED), 8),
        ("conv_bits", lambda: convolution_call(_SLICED_BITS, "cuda-bits"), 6),
        ("conv_float", lambda: convolution_call(_FLOAT), 9),
        ("input_gradient", input_gradient_call, 3 + 2),
        ("rnn_gate", gate_call, 7),
        ("quantize_pack", packing_call, 1),
        ("unpack_dequantize", unpacking_call, 1),
    ],
)
def test_no_barrier_can_be_left_out(
    kernel: str, make: Callable[[], Callable[[], Tensor]], barriers: int
) -> None:
    """The emulator lets warps run ahead: whatever a barrier is for shows without it."""
    emulator, call = cuda._cuda, make()
    call()  # makes what is derived from a weight
    emulator.take_launches()
    expected = call()
    assert emulator.take_launches()[-1] == kernel
    assert emulator.barriers_met() == barriers
    for index in range(barriers):
        emulator.skip_barrier(index)
        try:
            found: Tensor | None = call()
        except RuntimeError as error:
            assert "emulated kernel" in str(error)  # noqa: PT017
            found = None
        finally:
            emulator.skip_barrier(-1)
        assert found is None or not torch.equal(as_bits_of(found), as_bits_of(expected)), index
    assert torch.equal(as_bits_of(call()), as_bits_of(expected))


def as_bits_of(x: Tensor) -> Tensor:
    """So that NaN equals itself."""
    return x.view(torch.uint8)


@emulated
def test_tiles_are_those_of_the_same_codes() -> None:
    """A packed weight's tiles, made once, and those made within a call of a float weight."""
    weight = torch.randn(24, 40, 3, 3)
    options = (2, 4, 8)
    packed = PackedConvWeight.from_float(weight, {b: torch.full((24,), 0.1) for b in options})
    geometry = ConvGeometry(40, 24, 3, 3)
    tiles = cuda.retile_weight(packed, geometry)
    assert tiles.numel() == cuda.tile_bytes(geometry, packed.bit_options, packed.centred)
    assert torch.equal(tiles, cuda.retile_weight(packed, geometry))


# Gradients, whose values test_gradients.py checks


def training_case(groups: int = 1) -> ConvCase:
    return ConvCase(
        bits=(8, 0, 2, 32, 4, 8),
        groups=groups,
        group_channels=16 // groups,
        group_outputs=16 // groups,
        size=(9, 8),
        packed_weight=False,
    )


def gradients_of(built: Built) -> dict[str, Tensor]:
    arguments = built.arguments()
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    y = mixed_conv2d(**{**arguments, **leaves}, backend="cuda")
    assert isinstance(y, Tensor)
    slope = torch.linspace(-1, 1, y[0].numel()).view(y.shape[1:]).expand(y.shape)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), slope), strict=True))


@emulated
@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            1,
            "sort_samples arrange_grad gradient_weights input_gradient finish_input_scale "
            "arrange_input weight_gradient sum_products sum_grad finish_weight",
        ),
        (
            16,
            "sort_samples gradient_weights input_gradient_direct finish_input_scale "
            "weight_gradient_direct sum_products sum_grad finish_weight",
        ),
    ],
)
def test_gradients_are_this_backends_own(
    groups: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in (reference, triton):
        monkeypatch.delattr(other, "mixed_conv2d_backward")
    built = build(training_case(groups))
    cuda._cuda.take_launches()
    gradients_of(built)
    launches = cuda._cuda.take_launches()
    assert launches[-len(expected.split()) :] == expected.split()


@emulated
@pytest.mark.parametrize("groups", [1, 16])
def test_gradients_depend_on_nothing_that_memory_held(groups: int, poisoned_memory: None) -> None:
    built = build(training_case(groups))
    first = gradients_of(built)
    torch.utils.deterministic.fill_uninitialized_memory = False
    for name, value in gradients_of(built).items():
        assert torch.equal(value, first[name]), name


@emulated
@pytest.mark.parametrize("groups", [1, 16])
def test_a_samples_gradient_does_not_depend_on_the_batch(groups: int) -> None:
    built = build(training_case(groups))
    whole = gradients_of(built)["input"]
    for chosen in ([5, 0], [2], [4, 1, 3, 2, 0, 5]):
        assert torch.equal(gradients_of(subset(built, chosen))["input"], whole[chosen])


@emulated
def test_gradients_of_skipped_samples_read_nothing() -> None:
    """What they hold is as good as absent."""
    built = build(training_case())
    expected = gradients_of(built)
    assert isinstance(built.input, Tensor)
    hollow = built.input.clone()
    hollow[1] = torch.nan
    got = gradients_of(replace(built, input=hollow))
    assert not bool(got["input"][1].any())
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


# Where there is no GPU


def run_python(code: str, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "DFS_CUDA_EMULATOR"}
    environment = {**kept, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PRINT_REASON = "from dfs_kernels.backends import cuda; print(cuda.unavailable_reason())"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so() -> None:
    reason = run_python(PRINT_REASON)
    assert "CUDA" in reason
    assert reason != "None"


def test_an_emulator_that_is_not_there_is_named() -> None:
    reason = run_python(PRINT_REASON, DFS_CUDA_EMULATOR="/nowhere/module.so")
    assert "/nowhere/module.so" in reason


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_EMULATOR", "")
    monkeypatch.setattr(cuda, "_IMPORT_ERROR", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [(7, 5), (6, 1)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    reason = cuda.unavailable_reason()
    assert reason is not None
    assert "7.5" in reason
    assert "8.0" in reason
    found[1] = (8, 0)
    assert cuda.unavailable_reason() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_refused_launch_is_raised_by_name() -> None:
    native = pytest.importorskip("dfs_kernels._cuda")
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"CUDA kernel pack_bits failed: cuda\w+: "):
        native.pack_bits(codes.data_ptr(), 4, 16, 4, codes.data_ptr(), 0)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice\(0\) failed"):
        native.set_device(0)
