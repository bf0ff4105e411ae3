"""What the ``dfs`` command does to its process before PyTorch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def _python(code: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in _NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, **environment},
    )
    return done.stdout


def test_nothing_loads_torch_before_the_policy_is_set() -> None:
    code = """
import sys, dfs.launch
assert "torch" not in sys.modules
dfs.launch.wait_passively()
import dfs
print(dfs.DFSConv2d.__name__, dfs.train.Trainer.__name__, dfs.cost.__name__, "torch" in sys.modules)
"""
    assert _python(code).split() == ["DFSConv2d", "Trainer", "dfs.cost", "True"]


def test_an_unknown_name_is_no_attribute() -> None:
    import dfs

    assert not hasattr(dfs, "no_such_thing")
    assert set(dfs.__all__) <= set(dir(dfs))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "OMP_WAIT_POLICY=passive"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY=active"),
        ({"GOMP_SPINCOUNT": "100"}, "GOMP_SPINCOUNT=100"),
        ({"KMP_BLOCKTIME": "5"}, "KMP_BLOCKTIME=5"),
    ],
)
def test_threads_wait_passively_unless_told_otherwise(given: dict[str, str], told: str) -> None:
    code = """
import sys
from dfs.launch import main
sys.argv = ["dfs", "info", "--json"]
main()
"""
    assert json.loads(_python(code, **given))["waiting"] == told


def test_the_policy_reaches_openmp() -> None:
    """GNU's tells what it read when OMP_DISPLAY_ENV is set; others may say nothing."""
    code = "from dfs.launch import wait_passively; wait_passively(); import torch"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={
            **{name: value for name, value in os.environ.items() if name not in _NAMES},
            "OMP_DISPLAY_ENV": "verbose",
        },
    )
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this OpenMP does not tell its settings")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
