"""Which commit a result is of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def current_commit(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The commit that is checked: ``id``, and whether the tree was ``dirty`` (None: unknown).

    DFS_COMMIT says it where there is no repository, with "-dirty" at the end if need be.
    """
    given = (os.environ if environment is None else environment).get("DFS_COMMIT", "").strip()
    if given:
        return {"id": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    head = _git("rev-parse", "HEAD")
    if head is None:
        return {"id": "unknown", "dirty": None}
    # Results are not what is checked.
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {"id": head, "dirty": bool(changed)}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
