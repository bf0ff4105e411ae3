"""The Triton kernels touch nothing beyond their tensors, which lie between guard pages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dfs_kernels import available_backends
from tests.kernels.cases import TRITON_REASON

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason=TRITON_REASON)

EDGES = ("end", "start")


def start_guarded(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.triton_guard_pages", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status, and a message that ends with the case and the kernel that ran last."""
    out, errors = process.communicate(timeout=500)
    lines = out.splitlines()
    case = next((line for line in reversed(lines) if not line.startswith(" ")), "nothing ran")
    last = lines[-1].strip() if lines else ""
    return process.returncode, f"{errors[-2000:]}\ncase: {case}\nkernel: {last}"


def test_no_kernel_reads_or_writes_beyond_its_tensors() -> None:
    running = {edge: start_guarded(edge) for edge in EDGES}
    results = {edge: outcome(process) for edge, process in running.items()}
    for edge, (status, message) in results.items():
        assert status == 0, f"guard at the {edge} (status {status})\n{message}"
        assert message.endswith("kernel: done"), message


@pytest.mark.parametrize("edge", EDGES)
def test_one_element_too_many_is_noticed(edge: str) -> None:
    running = {fault: start_guarded(edge, fault) for fault in ("read", "write", "none")}
    results = {fault: outcome(process) for fault, process in running.items()}
    assert results["none"][0] == 0, results["none"][1]
    for fault in ("read", "write"):
        status, message = results[fault]
        assert status == -signal.SIGSEGV, message
        assert message.endswith(f"case: {fault}\nkernel: faulty_copy_kernel")
