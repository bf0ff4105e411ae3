"""Formatters, linters and type checkers have nothing to say."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def installed(name: str) -> str:
    """The tool that belongs to this Python, or else the one on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} not found")
    return found


def check(*command: str) -> None:
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout


def test_ruff_lint() -> None:
    check(installed("ruff"), "check", ".")


def test_ruff_format() -> None:
    check(installed("ruff"), "format", "--check", "--diff", ".")


@pytest.mark.slow
def test_mypy() -> None:
    pytest.importorskip("mypy")
    check(sys.executable, "-m", "mypy")


def test_clang_format() -> None:
    sources = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
    ]
    assert sources
    check(installed("clang-format"), "--dry-run", "-Werror", *sources)
