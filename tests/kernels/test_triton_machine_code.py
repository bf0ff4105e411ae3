"""What the Triton kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed for this platform"
)

# Compute capability: bytes of shared memory that a block can have.
TARGETS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The least among GPUs from compute capability 8.0 on, which the default serves too.
LEAST_SHARED = 99 * 1024
# Where each operation of the formulas is rounded by itself.
EXACT = {
    "mixed_conv2d_kernel",
    "grouped_conv2d_kernel",
    "quantize_pack_kernel",
    "quantize_weight_kernel",
    "unpack_dequantize_kernel",
}
HOT = {
    "mixed_conv2d_kernel",
    "grouped_conv2d_kernel",
    "float_conv2d_kernel",
    "quantize_pack_kernel",
    "unpack_dequantize_kernel",
    "rnn_gate_kernel",
    "input_gradient_kernel",
    "weight_gradient_kernel",
}
OTHERS = {
    "quantize_weight_kernel",
    "sum_levels_kernel",
    "sort_samples_kernel",
    "pack_bits_kernel",
    "unpack_bits_kernel",
}

Kernels = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Kernels]:
    """What each kernel compiled to, by compute capability."""
    running = {}
    for capability in TARGETS:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(f"sm_{capability}"))
        command = [sys.executable, "-m", "tests.kernels.triton_ahead_of_time", str(capability)]
        running[capability] = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    results = {}
    for capability, process in running.items():
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
        results[capability] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, compiled: dict[int, Kernels]) -> tuple[int, Kernels]:
    return request.param, compiled[request.param]


def of(kernels: Kernels, name: str) -> Kernels:
    found = [k for k in kernels if k["kernel"] == name]
    assert found
    return found


def test_every_kernel_is_compiled(target: tuple[int, Kernels]) -> None:
    _, kernels = target
    assert {k["kernel"] for k in kernels} == HOT | OTHERS


def test_convolutions_use_the_int8_tensor_cores(target: tuple[int, Kernels]) -> None:
    import triton

    capability, kernels = target
    convolutions = [k for k in of(kernels, "mixed_conv2d_kernel") if any(k["WIDTHS"])]
    forms = {(tuple(k["WIDTHS"]), k["STREAM"], k["IN_PLACE"]) for k in convolutions}
    each, all_three = (
        ((True, False, False), (False, True, False), (False, False, True)),
        (True,) * 3,
    )
    for widths in (*each, all_three):
        assert {(widths, True, False), (widths, False, True), (widths, False, False)} <= forms
    instructions = {80: ("mma",), 90: ("wgmma",), 100: ("tcgen05",)}[capability]
    if capability == 100 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        # An earlier Triton may not have the instruction of Blackwell's for integers yet.
        instructions = ("tcgen05", "mma")
    for k in convolutions:
        # At least one matrix product for each width. Tiles of few pixels, which the tuning may
        # choose, are too small for the newer instructions.
        allowed = instructions if k["candidate"] == 0 else {*instructions, "mma"}
        assert sum(k[name] for name in allowed) >= sum(k["WIDTHS"]), k


def test_float_products_take_tf32_only_where_allowed(target: tuple[int, Kernels]) -> None:
    _, kernels = target
    for name in ("float_conv2d_kernel", "input_gradient_kernel", "weight_gradient_kernel"):
        products = [k for k in of(kernels, name) if k["DOTS"]]
        assert {k["PRECISION"] for k in products} == {"ieee", "tf32"}
        for k in products:
            assert (k["tf32"] > 0) == (k["PRECISION"] == "tf32"), k


def test_exact_kernels_fuse_no_multiply_and_add(target: tuple[int, Kernels]) -> None:
    """In PTX; the assembler is told the same by the option."""
    _, kernels = target
    assert not any(k["fp_fusion"] for k in kernels)
    assert [k for k in kernels if k["kernel"] in EXACT and k["fma"]] == []


def test_kernels_fit_the_gpu(target: tuple[int, Kernels]) -> None:
    """Shared memory; and where it counts, registers."""
    capability, kernels = target
    for k in kernels:
        is_default = k["candidate"] == 0
        assert k["shared"] <= (LEAST_SHARED if is_default else TARGETS[capability]), k
        # What spills where it is tuned for will not be the fastest.
        assert not is_default or (k["stack"] <= 16 and k["spills_in_loops"] == 0), k


def test_loops_hold_no_float64(target: tuple[int, Kernels]) -> None:
    """But for the gate, which is float64 by definition."""
    _, kernels = target
    assert any(k["float64_in_loops"] for k in of(kernels, "rnn_gate_kernel"))
    rest = [k for k in kernels if k["kernel"] != "rnn_gate_kernel"]
    assert [k for k in rest if k["float64_in_loops"]] == []


def test_whole_words_are_read_and_written(target: tuple[int, Kernels]) -> None:
    """Where channels allow it: 16 bytes of 8-bit codes, 8 and 4 of the narrower ones."""
    _, kernels = target
    dense = [k for k in of(kernels, "mixed_conv2d_kernel") if k["GROUPS"] == 1]
    for k in dense:
        reads = {**k["loads"], **k["copies"]} if any(k["WIDTHS"]) else k["loads"]
        # Codes, a residual stream's among them, but for packed residuals of several widths.
        assert "1" not in reads, k
        if k["OUT_INDEX"] is not None:
            # Single bytes are written by the filling of unknown samples only.
            assert k["stores"].get("1", 0) <= 2, k
            assert "16" in k["stores"], k
    for k in of(kernels, "quantize_pack_kernel"):
        assert k["stores"].get("1", 0) <= 2, k
    wide = [k for k in of(kernels, "quantize_pack_kernel") if k["C"] in (16, 96)]
    assert all("16" in k["loads"] for k in wide), wide


def test_assembly_is_read_rightly() -> None:
    """What the checks above rest on."""
    from tests.kernels.triton_ahead_of_time import (
        _access_sizes,
        _copy_sizes,
        _loop_lines,
        spills_in_loops,
    )

    ptx = """
        mul.f64 %fd1, %fd2, %fd3;
    $L__BB0_1:
        ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        add.f64 %fd4, %fd5, %fd6;
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r7;
        @%p1 bra $L__BB0_1;
        st.global.b8 [ %rd3 + 0 ], { %r8 };
        bra $L__BB0_2;
    $L__BB0_2:
        neg.f64 %fd7, %fd8;
    """.replace("    $", "$")
    assert [line.split()[0] for line in _loop_lines(ptx) if ".f64" in line] == ["add.f64"]
    assert _access_sizes("ld", ptx) == {16: 1}
    assert _access_sizes("st", ptx) == {1: 1}
    assert _copy_sizes(ptx) == {16: 1}
    sass = """
        /*0010*/ STL [R1], R2 ;
        /*0020*/ IMMA.16832.S8.S8 R4, R8.ROW, R9.COL, R4 ;
        /*0030*/ LDL.LU R2, [R1] ;
        /*0040*/ @P0 BRA 0x20 ;
        /*0050*/ LDL R2, [R1] ;
    """
    assert spills_in_loops(sass) == 1
