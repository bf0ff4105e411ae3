"""The compiled code runs on a processor without AVX: qemu's Nehalem has x86-64-v2 and no more."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools.csrc_tests import build_executable
from build_tools.toolchain import ROOT, is_x86_64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not is_x86_64(), reason="x86-64 Linux only"),
]

CONVOLUTION = ROOT / "tests" / "packaging" / "convolve_without_torch.py"


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    found = shutil.which("qemu-x86_64")
    if found is None:
        pytest.skip("qemu-x86_64 not found (Debian and Ubuntu: apt install qemu-user)")
    return [found, "-cpu", "Nehalem"]


@pytest.fixture(scope="module")
def module() -> Path:
    found = sorted((ROOT / "dfs_kernels").glob(f"_cpu.{sys.implementation.cache_tag}*.so"))
    if not found:
        pytest.skip("no module was built in place")
    return found[0]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_avx_code_would_be_noticed(emulator: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("neither g++ nor clang++ found")
    source, program = tmp_path / "avx.cpp", tmp_path / "avx"
    source.write_text('int main() { __asm__ volatile("vpxor %xmm0, %xmm0, %xmm0"); }\n')
    built = run(compiler, source, "-o", program)
    assert built.returncode == 0, built.stdout
    assert run(*emulator, program).returncode != 0


def test_cpp_tests_pass(emulator: list[str]) -> None:
    result = run(*emulator, build_executable([]), "--percent", "10")
    assert re.search(r"instruction sets: scalar$", result.stdout, re.MULTILINE), result.stdout
    failed = re.findall(r"^FAIL (\S+)", result.stdout, re.MULTILINE)
    summary = re.search(r"^(\d+) tests, (\d+) failed$", result.stdout, re.MULTILINE)
    assert summary, result.stdout
    assert int(summary[1]) > 0
    assert int(summary[2]) == len(failed), result.stdout
    # The emulator itself aborts when a child of a process with threads starts threads of its own.
    assert [name for name in failed if "fork" not in name] == [], result.stdout


def test_module_convolves(emulator: list[str], module: Path) -> None:
    result = run(*emulator, sys.executable, "-I", "-S", CONVOLUTION, module)
    assert result.returncode == 0, result.stdout
    assert result.stdout.split() == ["scalar:", "exact"]


def test_module_convolves_on_this_processor(module: Path) -> None:
    result = run(sys.executable, "-I", "-S", CONVOLUTION, module)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("scalar: exact\n")
