"""The machine code of the CUDA kernels: the instructions that their speed rests on."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
native = pytest.importorskip("dfs_kernels._cuda")

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = [name for name in native.architectures() if name.startswith("sm_")]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# Those that run once a batch; the others run when weights are packed.
HOT = (
    "conv_mma_kernel",
    "conv_bits_kernel",
    "conv_float_kernel",
    "conv_general_kernel",
    "quantize_pack_kernel",
    "unpack_dequantize_kernel",
    "pack_bits_kernel",
    "rnn_gate_kernel",
    "input_gradient_kernel",
    "input_gradient_direct_kernel",
    "22weight_gradient_kernel",
    "weight_gradient_direct_kernel",
    "arrange_kernel",
    "sum_products_kernel",
    "finish_weight_kernel",
)
# Tiles, kernel sizes, and with or without TF32.
INPUT_GRADIENTS = 3 * 3 * 2
WEIGHT_GRADIENTS = 3 * 2
# Multiply-adds of a thread in a step of 16 products, and of a warp on tensor cores.
STEP_PRODUCTS = {"FFMA": 512, "HMMA.1688.F32.TF32": 16}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?\w+\s+)?([^;]*);")


@cache
def functions(architecture: str) -> dict[str, list[tuple[int, str]]]:
    """The instructions of every kernel by its mangled name: address and text."""
    command = [str(TOOL), "-sass", "-arch", architecture, native.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s+Function : ", text)[1:]
    return {
        part.partition("\n")[0].strip(): [
            (int(address, 16), code) for address, code in INSTRUCTION.findall(part)
        ]
        for part in parts
    }


def kernels(architecture: str, name: str) -> list[list[tuple[int, str]]]:
    found = [code for symbol, code in functions(architecture).items() if name in symbol]
    assert found, name
    return found


def operations(code: list[tuple[int, str]]) -> Counter[str]:
    return Counter(text.split()[0] for _, text in code if text)


def loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """The bodies between a branch backwards and where it leads."""
    places = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        start = int(target[1], 16) if target else address + 1
        if start <= address and start in places:
            found.append(code[places[start] : i + 1])
    return found


def test_machine_code_and_ptx_for_every_architecture() -> None:
    assert set(native.architectures()) >= {"sm_80", "sm_90a", "compute_90"}
    assert TOOL.exists() or shutil.which("cuobjdump")


@every_architecture
@pytest.mark.parametrize("kernel", HOT)
def test_hot_kernels_keep_everything_in_registers(architecture: str, kernel: str) -> None:
    for code in kernels(architecture, kernel):
        local = [text for _, text in code if text.startswith(("STL", "LDL"))]
        assert local == []


@every_architecture
def test_the_convolution_multiplies_on_int8_tensor_cores(architecture: str) -> None:
    instances = kernels(architecture, "conv_mma_kernel")
    assert len(instances) == 3
    for code in instances:
        found = operations(code)
        assert found["IMMA.16832.U8.S8"] > 0
        assert not any(name.startswith(("DFMA", "HMMA")) for name in found)


@every_architecture
def test_the_inner_loops_are_as_short_as_planned(architecture: str) -> None:
    """An H100 starts a multiplication every 8 cycles in each quarter of a multiprocessor."""
    for code in kernels(architecture, "conv_mma_kernel"):
        inner = []
        for body in loops(code):
            count = operations(body)["IMMA.16832.U8.S8"]
            if 0 < count <= 32 and len(body) < 400:
                inner.append(len(body) / count)
        assert len(inner) == 3  # one for each width
        assert max(inner) < 9.5


@every_architecture
def test_bit_planes_are_multiplied_on_1_bit_tensor_cores(architecture: str) -> None:
    """Nor by bytes, as a function that stands in for them does: 4 C + 2 for each row tile."""
    instances = kernels(architecture, "conv_bits_kernel")
    found = [operations(code) for code in instances]
    for name in ("BMMA.168256.AND.POPC", "BMMA.168128.AND.POPC"):
        assert sorted(count[name] for count in found) == [18, 20, 34]
    for code, count in zip(instances, found, strict=True):
        assert not any(name.startswith(("IMMA", "HMMA", "DFMA")) for name in count)
        inner = [
            len(body) / operations(body)["BMMA.168256.AND.POPC"]
            for body in loops(code)
            if operations(body)["BMMA.168256.AND.POPC"] and len(body) < 400
        ]
        assert len(inner) == 1
        assert inner[0] < 6.5


@every_architecture
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        # Packed input, halo and weights past the registers; stream and residual; packed output.
        ("conv_mma_kernel", ("LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128")),
        ("conv_bits_kernel", ("LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128")),
        ("quantize_pack_kernel", ("STG.E.128",)),
        ("arrange_kernel", ("LDG.E.128", "STG.E.128")),
        ("input_gradient_kernel", ("LDGSTS.E.BYPASS.128", "LDG.E.128", "STG.E.128")),
        ("22weight_gradient_kernel", ("LDGSTS.E.BYPASS.128", "STG.E.128")),
        ("unpack_dequantize_kernel", ("LDG.E.128",)),
        ("16pack_bits_kernel", ("LDG.E.128", "STG.E.128")),
        ("unpack_bits_kernel", ("LDG.E.128", "STG.E.128")),
    ],
)
def test_global_memory_is_read_and_written_16_bytes_at_a_time(
    architecture: str, kernel: str, expected: tuple[str, ...]
) -> None:
    for code in kernels(architecture, kernel):
        found = operations(code)
        for name in expected:
            assert any(operation.startswith(name) for operation in found), name


@every_architecture
def test_gradients_multiply_as_they_are_told(architecture: str) -> None:
    """By multiply-adds, more than half of a loop's instructions, or in TF32, one of 27 at least."""
    for kernel, count in (
        ("input_gradient_kernel", INPUT_GRADIENTS),
        ("22weight_gradient_kernel", WEIGHT_GRADIENTS),
    ):
        instances = kernels(architecture, kernel)
        assert len(instances) == count
        in_tf32 = 0
        for code in instances:
            found = operations(code)
            assert not any(name.startswith(("RED", "ATOM")) for name in found)
            name = "HMMA.1688.F32.TF32" if found["HMMA.1688.F32.TF32"] else "FFMA"
            in_tf32 += name != "FFMA"
            inner = [len(b) for b in loops(code) if operations(b)[name] == STEP_PRODUCTS[name]]
            assert len(inner) == 1
            assert inner[0] < (960 if name == "FFMA" else 440)
        assert in_tf32 == count // 2


def test_the_emulated_module_is_no_part_of_the_package() -> None:
    assert importlib.util.find_spec("dfs_kernels._cuda_emulated") is None
