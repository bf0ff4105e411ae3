"""Keep what a finished sweep came to under bench/results/accuracy, with how to remake it.

    dfs sweep --preset fast --dataset cifar10 --data DIR --out sweeps/cifar10
    python -m bench.accuracy sweeps/cifar10 --name cifar10-resnet20

writes into bench/results/accuracy/NAME

    results.json     every network: seed, accuracy, costs, times, which images it got right; the
                     commit of this checkout, which is to be the one that trained them; the
                     machine of the times; the sweep's arguments
    config.toml      the settings, for ``dfs sweep --preset``
    table.md, accuracy-*.png, decisions.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.commit import current_commit
from dfs.report.summary import TABLE_NAMES, read_about
from dfs.report.sweep_report import PLOTS
from dfs.train.checkpoint import write_beside
from dfs.train.presets import to_toml
from dfs.train.sweep import ENGINES_NAME

_RESULTS = Path(__file__).parent / "results" / "accuracy"
# Folders of one machine.
_LOCAL_SETTINGS = ("data", "teacher", "latency_table")


def keep(sweep: Path, name: str, out: Path = _RESULTS) -> Path:
    """Copy the figures of a finished sweep, with the checkout's commit.

    Returns:
        The folder that was written.

    Raises:
        ValueError: ``sweep`` is not a finished sweep.
    """
    about = read_about(sweep)
    results = _results(sweep)
    path = sweep / ENGINES_NAME
    engines = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"milliseconds": {}}
    )
    if any(key not in engines["milliseconds"] for key, r in results if "failed" not in r):
        raise ValueError(f"{sweep}: the sweep is not finished; the same dfs sweep command goes on")
    content = {
        "commit": current_commit(),
        "arguments": about["arguments"],
        "engines": {name: engines[name] for name in ("threads", "machine")},
        "comparisons": about["comparisons"],
        "results": [result | engines["milliseconds"].get(key, {}) for key, result in results],
    }
    base = {k: v for k, v in about["base"].items() if k not in _LOCAL_SETTINGS}
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / "results.json", json.dumps(content, indent=1) + "\n")
    write_beside(folder / "config.toml", to_toml(base))
    shutil.copy(sweep / TABLE_NAMES[0], folder)
    for picture in sorted((sweep / PLOTS).glob("*.png")):
        shutil.copy(picture, folder)
    return folder


def _results(sweep: Path) -> list[tuple[str, dict[str, Any]]]:
    """By their keys, seed by seed, in the order in which they came."""
    paths = sorted((sweep / "results").glob("*.json"))
    found = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return sorted(found, key=lambda one: (one[1]["seed"], one[1]["time"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sweep", type=Path, help="folder of a finished sweep")
    parser.add_argument("--name", required=True, help="of the folder to write")
    given = parser.parse_args(arguments)
    try:
        print(keep(given.sweep, given.name))
    except ValueError as error:
        print(f"bench.accuracy: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
