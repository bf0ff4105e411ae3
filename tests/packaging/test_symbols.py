"""What the compiled CPU code exports and which instructions it holds."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools.extension import compile_library
from build_tools.toolchain import ROOT, find_host_compiler, is_x86_64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF objects"),
]
needs_x86_64 = pytest.mark.skipif(not is_x86_64(), reason="x86-64 only")

# EVEX and VEX code, as objdump prints it: their registers, and the prefix of their mnemonics
# (legacy ones that begin with v are none of the baseline's).
VEX = re.compile(r"\t(?:\{evex\} )?v[a-z0-9]+ |%[yz]mm\d|%k[0-7]\b")
LEGACY_V = re.compile(r"\tv(?:err|erw|mcall|mlaunch|mresume|mxoff) ")


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    cpu = [path for path in compile_library(find_host_compiler()) if path.parent.name == "cpu"]
    assert cpu
    return [ROOT / path for path in cpu]


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} not found")
    return found


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(path: Path) -> list[tuple[str, str]]:
    """The (kind, name) pairs of an object's defined symbols."""
    lines = output_of(tool("nm"), "--defined-only", str(path)).splitlines()
    return [(line.split()[-2], line.split()[-1]) for line in lines if line.strip()]


def test_isa_object_exports_its_function_table_and_nothing_else(objects: list[Path]) -> None:
    isa_objects = [path for path in objects if path.name.startswith("isa_")]
    assert isa_objects
    for path in isa_objects:
        exported = [(kind, name) for kind, name in symbols(path) if kind.isupper() or kind in "uvw"]
        assert len(exported) == 1, (path.name, exported)
        assert exported[0][0] in "DRB", (path.name, exported)


@needs_x86_64
def test_baseline_objects_hold_no_vex_code(objects: list[Path]) -> None:
    objdump = tool("objdump")
    baseline = [p for p in objects if not p.name.startswith("isa_") or p.stem == "isa_scalar.cpp"]
    assert baseline
    for path in baseline:
        code = output_of(objdump, "-d", "--no-show-raw-insn", str(path)).splitlines()
        assert len(code) > 10
        found = [line for line in code if VEX.search(line) and not LEGACY_V.search(line)]
        assert found == [], path.name


@needs_x86_64
def test_vex_code_would_be_found(tmp_path: Path) -> None:
    objdump, compiler = tool("objdump"), tool("g++")
    source = tmp_path / "vex.cpp"
    source.write_text("void f(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 3.0f; }\n")
    for flags in (["-mavx"], ["-mavx2"], ["-mavx512f", "-mprefer-vector-width=512"]):
        output = tmp_path / "vex.o"
        output_of(compiler, "-O3", *flags, "-c", str(source), "-o", str(output))
        code = output_of(objdump, "-d", "--no-show-raw-insn", str(output))
        assert VEX.search(code), flags


def test_module_exports_its_init_function_only() -> None:
    modules = sorted((ROOT / "dfs_kernels").glob(f"_c*.{sys.implementation.cache_tag}*.so"))
    if not modules:
        pytest.skip("no module was built in place")
    for path in modules:
        lines = output_of(tool("nm"), "--dynamic", "--defined-only", str(path)).splitlines()
        names = [line.split()[-1].split("@")[0] for line in lines]
        ours = [name for name in names if "dfs" in name or name.startswith("PyInit_")]
        assert ours == [f"PyInit_{path.name.split('.')[0]}"]
