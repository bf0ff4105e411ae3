"""The ``dfs`` command's process, before PyTorch is loaded into it."""

from __future__ import annotations

import os

WAIT_POLICY = "OMP_WAIT_POLICY"
# They say the same to GNU's and to Intel's and LLVM's OpenMP.
_OWN_SETTINGS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Have OpenMP's threads sleep at the end of a loop instead of spinning, unless told otherwise.

    PyTorch's OpenMP reads the policy when it is loaded. Beside another busy process a thread that
    spins keeps the one that it waits for from running: on two cores with one of them taken,
    training steps of a small network took 2 to 4 seconds instead of 0.15.
    """
    if not any(name in os.environ for name in _OWN_SETTINGS):
        os.environ.setdefault(WAIT_POLICY, "passive")


def describe_waiting() -> str:
    """How OpenMP's threads wait in this process, as far as the environment tells."""
    found = [
        f"{name}={os.environ[name]}" for name in (WAIT_POLICY, *_OWN_SETTINGS) if name in os.environ
    ]
    return ", ".join(found) or "OpenMP's default: threads spin while they wait"


def main() -> None:
    """Entry point."""
    wait_passively()
    from dfs.cli import main as run

    run()
