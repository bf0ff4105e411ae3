"""Tables for people, and the same rows for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dfs.train.evaluate import Evaluation


@dataclass(frozen=True, eq=False)
class ResultRow:
    """One network in a table."""

    name: str
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        result = self.evaluation
        return {
            "name": self.name,
            "accuracy": result.accuracy,
            "paper_cost": result.paper_cost,
            "bitops": result.bitops,
            "latency": result.latency,
            "milliseconds_per_image": result.milliseconds,
            "batch_size": result.batch_size,
            "widths_used": list(result.widths_used),
            "distinct_decisions": result.distinct_decisions,
        }


def results_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Accuracy, costs and measured time, a row per network."""
    table = Table(title=title, title_justify="left")
    table.add_column("network", no_wrap=True)
    for column in ("accuracy\n%", "paper\ncost %", "BitOPs\n%", "ms per\nimage"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("widths\nused", no_wrap=True)
    table.add_column("distinct\ndecisions", justify="right", no_wrap=True)
    for row in rows:
        result = row.evaluation
        dynamic = len(result.widths_used) > 1
        table.add_row(
            row.name,
            f"{result.accuracy * 100:.2f}",
            f"{result.paper_cost * 100:.2f}",
            f"{result.bitops * 100:.2f}",
            f"{result.milliseconds:.3f}",
            "/".join(map(str, result.widths_used)) or "32",
            str(result.distinct_decisions) if dynamic else "-",
        )
    return table
