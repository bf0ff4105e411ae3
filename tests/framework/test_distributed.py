from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dfs.nn import PerWidthBatchNorm2d
from dfs.nn.replicas import SyncedBatchNorm2d
from dfs.train import Trainer
from tests.framework.helpers import tiny_data
from tests.framework.train_together import CONFIG


def _train(folder: Path, processes: int) -> list[dict[str, Any]]:
    """Train in so many processes; what each of them came to."""
    folder.mkdir()
    started = []
    for rank in range(processes):
        arguments = map(str, (rank, processes, folder))
        command = [sys.executable, "-m", "tests.framework.train_together", *arguments]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    # From the same start: rounding is then all that may differ, while over many steps quantizers
    # turn it into whole levels.
    start = Trainer(CONFIG, tmp_path / "starts" / "0", tiny_data())
    start.save()
    for stage in (2, 3, 4, 5):
        start.run(stage)
        shutil.copytree(tmp_path / "starts" / "0", tmp_path / "starts" / str(stage))
    Trainer(CONFIG, tmp_path / "starts" / "0", tiny_data()).save()
    (alone,) = _train(tmp_path / "alone", 1)
    first, second = _train(tmp_path / "together", 2)
    assert first.keys() == alone.keys() == {"0", "2", "3", "4", "5", "from the beginning"}
    for name, expected in alone.items():
        assert len(expected["curve"]) == (8 if name == "from the beginning" else 1)
        for one, two in zip(expected["curve"], first[name]["curve"], strict=True):
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6), name
        for key, value in expected["weights"].items():
            assert torch.equal(first[name]["weights"][key], second[name]["weights"][key]), key
            torch.testing.assert_close(
                first[name]["weights"][key], value, rtol=1e-3, atol=1e-5, msg=f"{name}: {key}"
            )
    # One of them writes.
    assert len((tmp_path / "together" / "run" / "environment.jsonl").read_text().splitlines()) == 1


_TORCHRUN = """
import sys
sys.argv = ["dfs", *sys.argv[1:]]
from dfs.cli import main
main()
"""


@pytest.mark.slow
def test_torchrun_shares_a_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = tmp_path / "dfs_command.py"
    script.write_text(_TORCHRUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = ["model=resnet8", "batch_size=400", "float_epochs=2", "exit_points="]
    options = [o for s in settings for o in ("--set", s)]
    command = [*launch, str(script), "train", "--out", str(tmp_path / "run"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--max-minutes", "0"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=200,
    )
    assert "saved in S0 float, step 1;" in done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_one_process_normalizes_as_pytorch_does() -> None:
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm2d(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    per_width = PerWidthBatchNorm2d(3, (2, 8), min_samples=2)
    assert torch.equal(per_width(x, 8), theirs(x))
