"""Every backend gives the reference's bits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfs_kernels import PackedActivation, mixed_conv2d, mixed_conv2d_, reference
from dfs_kernels.backends import load
from dfs_kernels.packing import Quantizer, row_bytes
from tests.kernels.cases import (
    CORNERS,
    FORMS,
    OTHER_BACKENDS,
    WITH_TRITON,
    ConvCase,
    as_bits,
    assert_matches_reference,
    build,
    build_largest_products,
    cases_of_forms,
    conv_cases,
    pack,
    packing_case,
    run,
    sample_bits,
    special_values,
    subset,
    within_bound,
)

ROOT = Path(__file__).resolve().parents[2]
every_backend = pytest.mark.parametrize("backend", OTHER_BACKENDS)
with_triton = pytest.mark.parametrize("backend", WITH_TRITON)


@pytest.fixture(autouse=True)
def keep_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_there_is_a_backend_to_compare() -> None:
    assert "cpu" in OTHER_BACKENDS


# Triton's interpreter is slow; test_triton.py draws fewer.
@pytest.mark.parametrize("backend", [name for name in OTHER_BACKENDS if name != "triton"])
@settings(max_examples=400)
@given(case=conv_cases())
def test_any_convolution(backend: str, case: ConvCase) -> None:
    assert_matches_reference(build(case), backend)


@every_backend
@pytest.mark.parametrize(("input_form", "residual_form", "output_form"), FORMS)
def test_every_combination_of_forms(
    backend: str, input_form: str, residual_form: str | None, output_form: str
) -> None:
    for case in cases_of_forms(input_form, residual_form, output_form):
        assert_matches_reference(build(case), backend)


@with_triton
@pytest.mark.parametrize("case", CORNERS, ids=ConvCase.describe)
def test_corner(backend: str, case: ConvCase) -> None:
    assert_matches_reference(build(case), backend)


@with_triton
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_at_top", [False, True])
def test_largest_products_do_not_saturate(backend: str, bits: int, zero_at_top: bool) -> None:
    """Codes and levels all at one extreme, where 16-bit pair sums would overflow."""
    top = (1 << bits) - 1
    built = build_largest_products(bits, zero_at_top)
    assert_matches_reference(built, backend)
    out = run(built, backend).out
    assert isinstance(out, Tensor)
    interior = 64 * 9 * top * (1 << (bits - 1)) * (1 if zero_at_top else -1)
    assert out[0, 0, 2, 2].item() == interior


@with_triton
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_special_values_quantize_alike(backend: str, bits: int) -> None:
    x = special_values()
    for scale in (2.0**-126, 1e-20, 0.3, 2.0**126):
        for zero_point in (0, 1, (1 << bits) - 1):
            quantizer = Quantizer(
                (bits,), torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
            )
            width = torch.tensor([bits], dtype=torch.int32)
            expected = pack(x, width, quantizer)
            got = PackedActivation(
                torch.full_like(expected.data, 0xA5),
                width,
                quantizer.scale,
                quantizer.zero_point,
                (bits,),
                20,
                2,
                2,
            )
            load(backend).quantize_pack(x, got)
            assert torch.equal(got.data, expected.data)


@with_triton
@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 4, 8]),
    channels=st.integers(1, 40),
    rows=st.integers(0, 5),
    signed=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_packing(
    backend: str, bits: int, channels: int, rows: int, signed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    codes = torch.randint(low, high, (rows, channels), generator=generator)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    if rows:
        codes[0, 0], codes[-1, -1] = low, high - 1
    packed = load(backend).pack_bits(codes, bits)
    assert torch.equal(packed, reference.pack_bits(codes, bits))
    back = load(backend).unpack_bits(packed, bits, channels, signed)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@with_triton
@settings(max_examples=60)
@given(
    channels=st.integers(1, 17),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    bits=st.lists(st.sampled_from([0, 2, 4, 8, 32]), max_size=4),
    form=st.sampled_from(["contiguous", "channels_last", "strided"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_quantize_pack_and_unpack_dequantize(
    backend: str, channels: int, size: tuple[int, int], bits: list[int], form: str, seed: int
) -> None:
    built = build(packing_case(tuple(bits), channels, size, form, seed))
    assert isinstance(built.input, Tensor)
    assert built.input_quantizer is not None
    quantizer = built.input_quantizer
    expected = pack(built.input, built.bits, quantizer)
    got = replace(expected, data=torch.full_like(expected.data, 0xA5))
    load(backend).quantize_pack(built.input, got)
    for n in range(len(bits)):
        assert torch.equal(sample_bits(got, n), sample_bits(expected, n))
    values = load(backend).unpack_dequantize(got)
    assert torch.equal(as_bits(values), as_bits(reference.unpack_dequantize(expected)))


@with_triton
@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 17), st.integers(1, 3), st.integers(1, 3)),
    bits=st.sampled_from([2, 4, 8]),
    centred=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_quantize_weight(
    backend: str, shape: tuple[int, int, int, int], bits: int, centred: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    reach = 1 << (bits - 1)
    scale = 2.0 ** torch.randint(-126, 120, (shape[0],), generator=generator)
    codes = torch.randint(-2 * reach - 3, 2 * reach + 3, shape, generator=generator) / 2
    weight = codes * scale.view(-1, 1, 1, 1)
    rows = (shape[0], *shape[2:], (shape[1] * bits + 7) // 8)
    expected = torch.full(rows, 0x5A, dtype=torch.uint8)
    load("reference").quantize_weight(weight, scale, bits, centred, expected)
    got = torch.full(rows, 0xA5, dtype=torch.uint8)
    load(backend).quantize_weight(weight, scale, bits, centred, got)
    assert torch.equal(got, expected)


@every_backend
@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=60)
@given(case=conv_cases(options=(2, 4, 8, 32), centred=(True, False, False, False)))
def test_public_function(backend: str, case: ConvCase) -> None:
    built = build(case)
    arguments = built.arguments()
    expected = mixed_conv2d(**arguments, backend="reference")
    got = mixed_conv2d(**arguments, backend=backend)
    assert type(got) is type(expected)
    assert got.shape == case.output_shape
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        assert got.stride() == expected.stride()
    for n, width in enumerate(case.bits):
        if width == 32:
            assert within_bound(built, got, n)
        else:
            assert torch.equal(sample_bits(got, n), sample_bits(expected, n))


@pytest.mark.parametrize("backend", ["reference", *OTHER_BACKENDS])
@settings(max_examples=40)
@given(case=conv_cases(options=(2, 4, 8, 32), centred=(True, False, False, False)))
def test_in_place_equals_out_of_place(backend: str, case: ConvCase) -> None:
    """For a float residual; a packed one is requantized with its own steps."""
    case = replace(case, residual_form="float", output_form="float")
    arguments = build(case).arguments()
    expected = mixed_conv2d(**arguments, backend=backend)
    target = arguments["residual"].clone()
    assert mixed_conv2d_(**{**arguments, "residual": target}, backend=backend) is None
    assert torch.equal(as_bits(target), as_bits(expected))


@pytest.mark.parametrize("backend", ["reference", *OTHER_BACKENDS])
@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("packed", [False, True])
def test_in_place_on_the_input_itself_is_refused(backend: str, width: int, packed: bool) -> None:
    """Windows would read what has been added to already."""
    values = torch.randn(2, 8, 4, 4)
    bits = torch.full((2,), width, dtype=torch.int32)
    quantizer = Quantizer((8, 32), torch.tensor([0.05, 1.0]), torch.tensor([128, 0]).int())
    x = pack(values, bits, quantizer) if packed else values
    weight = torch.randn(8, 8, 3, 3)
    arguments = {
        "weight": weight,
        "bits": bits,
        "input_scale": quantizer.scale,
        "input_zero_point": quantizer.zero_point,
        "weight_scale": torch.full((2, 8), 0.05),
        "bit_options": (8, 32),
        "padding": 1,
        "backend": backend,
    }
    before = x.clone()
    with pytest.raises(ValueError, match="residual shares memory with the input"):
        mixed_conv2d_(x, residual=x, **arguments)
    for n in range(2):
        assert torch.equal(sample_bits(x, n), sample_bits(before, n))


@pytest.mark.parametrize("backend", ["reference", *OTHER_BACKENDS])
def test_a_sample_does_not_depend_on_the_batch_or_the_threads(backend: str) -> None:
    widths = (32, 8, 0, 2, 4, 32, 8, 2, 4, 32, 0)
    for seed, residual_form, output_form in (
        (1, None, "float"),
        (2, "packed", "own"),
        (3, "float", "fixed"),
    ):
        case = ConvCase(
            bits=widths,
            group_channels=13,
            group_outputs=6,
            groups=2,
            size=(19, 23),
            residual_form=residual_form,
            output_form=output_form,
            seed=seed,
        )
        built = build(case)
        torch.set_num_threads(1)
        whole = run(built, backend).out
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = run(built, backend).out
            for n in range(len(widths)):
                assert torch.equal(sample_bits(again, n), sample_bits(whole, n))
            for chosen in ([4, 0, 9, 2, 5, 1, 3], [5], list(reversed(range(len(widths))))):
                part = run(subset(built, chosen), backend).out
                for row, n in enumerate(chosen):
                    assert torch.equal(sample_bits(part, row), sample_bits(whole, n))


@with_triton
def test_a_skipped_sample_is_not_read(backend: str) -> None:
    """Its input may hold anything: a row of a packed 0-bit sample is not even initialised."""
    case = ConvCase(bits=(0, 4), residual_form="float")
    built = build(case)
    clean = run(built, backend).out
    assert isinstance(built.input, Tensor)
    dirty = built.input.clone()
    dirty[0] = torch.nan
    again = run(replace(built, input=dirty), backend).out
    assert torch.equal(as_bits(again), as_bits(clean))


@with_triton
def test_packed_rows_ignore_the_bytes_beyond_a_samples_width(backend: str) -> None:
    case = ConvCase(bits=(2, 4), input_form="packed")
    built = build(case)
    assert isinstance(built.input, PackedActivation)
    clean = run(built, backend).out
    data = built.input.data.clone()
    for n, width in enumerate(case.bits):
        data[n, row_bytes((width,), *built.input.shape[1:]) :] = 0xFF
    again = run(replace(built, input=replace(built.input, data=data)), backend).out
    assert torch.equal(as_bits(again), as_bits(clean))


# Processes and instruction sets


def run_python(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    environment.pop("DFS_CPU_ISA", None)
    if isa is not None:
        environment["DFS_CPU_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )


def test_kernels_run_in_a_forked_process() -> None:
    """The child works on memory that the parent made: torch's own threads do not survive a fork."""
    code = """
import os, signal
import numpy as np
import torch
from dfs_kernels.backends import load
from tests.kernels.cases import ConvCase, build
torch.set_num_threads(2)
built = build(ConvCase(bits=(8, 2, 4, 32) * 8, group_channels=16, group_outputs=16, size=(32, 32)))
before, after = (torch.zeros(built.case.output_shape) for _ in range(2))
call = built.call()
load("cpu").mixed_conv2d(call, before)
child = os.fork()
if child == 0:
    signal.alarm(30)
    load("cpu").mixed_conv2d(call, after)
    os._exit(0 if np.array_equal(before.numpy(), after.numpy()) else 3)
print(os.waitpid(child, 0)[1])
"""
    done = run_python(code, None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def supported_isas() -> list[str]:
    cpu = pytest.importorskip("dfs_kernels._cpu")
    isas: list[str] = cpu.supported_isas()
    return isas


def test_the_scalar_path_is_always_there() -> None:
    assert supported_isas()[0] == "scalar"
    assert len(set(supported_isas())) == len(supported_isas())


def test_every_isa_can_be_forced() -> None:
    for isa in supported_isas():
        done = run_python("from dfs_kernels import _cpu; print(_cpu.isa())", isa)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa


def test_an_unknown_isa_is_refused_with_those_that_exist() -> None:
    cpu = pytest.importorskip("dfs_kernels._cpu")
    with pytest.raises(ValueError, match=r"DFS_CPU_ISA.*'sse9'.*only: scalar"):
        cpu.set_isa("sse9")
    done = run_python("from dfs_kernels import _cpu; _cpu.isa()", "sse9")
    assert done.returncode != 0
    assert "DFS_CPU_ISA is 'sse9'" in done.stderr
    assert "scalar" in done.stderr


def test_without_dfs_cpu_isa_the_best_is_taken() -> None:
    done = run_python("from dfs_kernels import _cpu; print(_cpu.isa())", None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == supported_isas()[-1]
