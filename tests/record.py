"""What a long campaign leaves behind: its outcome, and the circumstances, as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def circumstances(seconds: float) -> dict[str, Any]:
    """Code, versions, processor, day and duration."""
    return {
        "commit": _commit(),
        "versions": {
            "dynamic-fractional-skipping": _package_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "processor": _processor(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "seconds": round(seconds),
    }


def write_record(record: dict[str, Any], path: Path) -> None:
    """Beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def _commit() -> str | None:
    """The commit checked out, marked if files differ from it; None outside of a repository."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _package_version() -> str | None:
    try:
        return version("dynamic-fractional-skipping")
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
