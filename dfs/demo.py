"""The demonstration: one small network, trained once, then to two cost targets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dfs.report import ResultRow, plot_decisions, require_plotting, results_table
from dfs.train import Trainer, evaluate
from dfs.train.presets import load_preset
from dfs.train.trainer import SHARED_STAGES, Progress

TARGETS = (0.04, 0.01)


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demonstration shows, and the files it left."""

    title: str
    rows: tuple[ResultRow, ...]
    plot: Path
    results: Path

    def table(self) -> Table:
        return results_table(self.rows, self.title)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [row.to_dict() for row in self.rows],
            "plot": str(self.plot),
        }


def run_demo(
    out: Path, progress: Progress | None = None, stop: Callable[[], bool] | None = None
) -> DemoResult | None:
    """Train on the digits and measure on their test images.

    The stages up to the one that makes one set of weights work at every width are shared by the
    targets. Starts afresh every time; an earlier demonstration in ``out`` is replaced file by file.

    Returns:
        None if ``stop`` ended it early.
    """
    require_plotting()
    out.mkdir(parents=True, exist_ok=True)
    config = load_preset("digits")
    shared = Trainer(config, out / "shared")
    if not shared.run(SHARED_STAGES, progress, stop):
        return None
    test = shared.data.test
    rows = [
        ResultRow("static, 32 bits", evaluate(shared.plain, test)),
        ResultRow("static, 8 bits", evaluate(shared.model, test, 8)),
    ]
    decisions = []
    for target in TARGETS:
        run = shared.fork(config.with_target(target), out / f"target-{target:g}")
        if not run.run(None, _labelled(progress, target), stop):
            return None
        result = evaluate(run.model, test)
        name = f"DFS, target {target:.0%}"
        rows.append(ResultRow(name, result))
        shares = result.shares(config.choices)
        decisions.append((f"{name}: cost {result.paper_cost:.2%}", shares))
    plot = out / "decisions.png"
    plot_decisions(plot, decisions, config.choices)
    title = (
        f"{config.model} on {config.dataset}: {len(test)} test images, "
        f"times in batches of {rows[0].evaluation.batch_size}"
    )
    result_file = out / "results.json"
    shown = DemoResult(title, tuple(rows), plot, result_file)
    beside = result_file.with_name(f".{result_file.name}.{os.getpid()}")
    beside.write_text(json.dumps(shown.to_dict(), indent=2) + "\n", encoding="utf-8")
    os.replace(beside, result_file)
    return shown


def _labelled(progress: Progress | None, target: float) -> Progress | None:
    if progress is None:
        return None
    report = progress

    def labelled(stage: str, step: int, total: int, measured: dict[str, float]) -> None:
        report(f"{stage} ({target:.0%})", step, total, measured)

    return labelled
