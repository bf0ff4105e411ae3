"""The C++ tests, plain and under sanitizers, and what C++ files may include."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools.toolchain import ROOT

CSRC = ROOT / "csrc"
EXTENSIONS = {".h", ".cpp", ".cu", ".cuh"}
FORBIDDEN = re.compile(
    r"^\s*#\s*include\s*[<\"](?:Python\.h|pybind11/|torch/|ATen/|c10/|caffe2/)", re.MULTILINE
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs GCC or Clang")
@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_cpp_tests_pass(sanitizers: str) -> None:
    command = [sys.executable, "-m", "build_tools.csrc_tests"]
    if sanitizers:
        command += ["--sanitize", sanitizers]
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs GCC or Clang")
def test_fuzzing_finds_nothing() -> None:
    command = [sys.executable, "-m", "build_tools.csrc_fuzz", "--seconds", "5", "--seed", "1"]
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout


def test_native_code_outside_csrc_python_needs_neither_python_nor_torch() -> None:
    sources = [
        path
        for path in CSRC.rglob("*")
        if path.suffix in EXTENSIONS and CSRC / "python" not in path.parents
    ]
    assert sources
    offenders = [
        str(path.relative_to(ROOT)) for path in sources if FORBIDDEN.search(path.read_text())
    ]
    assert offenders == []


def test_no_native_code_includes_torch() -> None:
    pattern = re.compile(r"#\s*include\s*[<\"](?:torch|ATen|c10)/")
    sources = [path for path in CSRC.rglob("*") if path.suffix in EXTENSIONS]
    assert [str(p.relative_to(ROOT)) for p in sources if pattern.search(p.read_text())] == []


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names.update(
                a.value
                for a in node.args
                if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )
    return names


def test_dfs_kernels_never_imports_dfs() -> None:
    sources = list((ROOT / "dfs_kernels").rglob("*.py"))
    assert sources
    offenders = [
        str(path.relative_to(ROOT))
        for path in sources
        if any(name.split(".")[0] == "dfs" for name in imported_modules(path))
    ]
    assert offenders == []
