"""What a run's folder holds beside its checkpoint: settings, environment, metrics.

config.toml         the resolved settings; ``--preset`` takes it
environment.jsonl   a line for every process that worked on the run: versions, machine, seed
metrics.jsonl       a line for every step, and one for the end of every stage
tensorboard/        the same curves, where tensorboard is installed
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dfs.latency import describe_machine
from dfs.train.checkpoint import write_beside
from dfs.train.config import TrainConfig
from dfs.train.presets import to_toml

CONFIG_NAME = "config.toml"
ENVIRONMENT_NAME = "environment.jsonl"
METRICS_NAME = "metrics.jsonl"
_PACKAGES = ("torch", "numpy", "triton")


class RunRecord:
    """The files of one run, opened when the first line is written.

    Args:
        metrics_size: bytes of the metrics to keep; lines behind them belong to steps that are done
            again.
    """

    def __init__(self, folder: Path, config: TrainConfig, metrics_size: int = 0) -> None:
        self.folder = folder
        self.config = config
        self.metrics_size = metrics_size
        self._open = False
        self._curves: Any = None

    def log(self, stage: str, step: int, measured: dict[str, float], final: bool = False) -> None:
        """Add a line to the metrics."""
        if not self._open:
            self._start()
        line = {"stage": stage, "step": step, "final": final, **measured}
        with open(self.folder / METRICS_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            self.metrics_size = file.tell()
        if self._curves is not None:
            for name, value in measured.items():
                self._curves.add_scalar(f"{stage}/{name}", value, step)

    def flush(self) -> None:
        """Bring to the disk what is buffered."""
        if self._curves is not None:
            self._curves.flush()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_beside(self.folder / CONFIG_NAME, to_toml(self.config.to_dict()))
        with open(self.folder / ENVIRONMENT_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(describe_environment(self.config.seed)) + "\n")
        path = self.folder / METRICS_NAME
        path.touch()
        os.truncate(path, min(self.metrics_size, path.stat().st_size))
        self._curves = _curves(self.folder / "tensorboard")
        self._open = True


def _curves(folder: Path) -> Any:
    """A writer of TensorBoard's files, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]


def describe_environment(seed: int) -> dict[str, Any]:
    """What a result may depend on beside its settings."""
    import dfs

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "dfs": dfs.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "machine": {**describe_machine(), "system": platform.platform()},
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the repository that the package lies in, if it does."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
