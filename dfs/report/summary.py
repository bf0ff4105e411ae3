"""The table of a sweep: means over the seeds, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, JustifyMethod
from rich.table import Table

from dfs.train.checkpoint import write_beside

TABLE_NAMES = ("table.md", "table.csv", "table.json")


@dataclass(frozen=True)
class SummaryRow:
    """One method at one target.

    Attributes:
        seeds: how many runs came to a result.
        accuracy, paper_cost, bitops, latency, milliseconds_per_image: means over the seeds;
            accuracy and costs are fractions. None where there is no run, or no latency table.
        distinct_decisions: how many decision vectors the images got, a mean too; 1 is the same
            decision for every image.
        permuted: mean accuracy when images are given each other's decisions; None where all images
            get the same.
        engine_1, engine_64: milliseconds per image of the frozen network on a CPU, in batches of 1
            and 64; None where it was not timed.
        spread: sample standard deviation of the accuracy; None for one seed.
        note: what went wrong, if anything.
    """

    label: str
    method: str
    target: float | None
    seeds: int
    accuracy: float | None
    spread: float | None
    paper_cost: float | None
    bitops: float | None
    latency: float | None
    milliseconds_per_image: float | None
    distinct_decisions: float | None = None
    permuted: float | None = None
    engine_1: float | None = None
    engine_64: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The label and the target."""
        return self.label if self.target is None else f"{self.label}, {self.target:.2%}"


def summarise(results: Sequence[dict[str, Any]]) -> list[SummaryRow]:
    """A row per label and target, in the order in which they first appear.

    Args:
        results: of :meth:`dfs.train.sweep.Sweep.results`.
    """
    return [_row(label, target, group) for (label, target), group in grouped(results).items()]


def grouped(
    results: Sequence[dict[str, Any]],
) -> dict[tuple[str, float | None], list[dict[str, Any]]]:
    """Results of the same label and target, in the order in which these first appear."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["label"], result["target"]), []).append(result)
    return groups


def _row(label: str, target: float | None, group: list[dict[str, Any]]) -> SummaryRow:
    good = [result for result in group if "failed" not in result]
    accuracies = [result["accuracy"] for result in good]
    notes = [f"seed {r['seed']}: {r['failed']}" for r in group if "failed" in r]
    return SummaryRow(
        label,
        group[0]["method"],
        target,
        len(good),
        _mean(accuracies),
        statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        _mean([r["paper_cost"] for r in good]),
        _mean([r["bitops"] for r in good]),
        _mean([r["latency"] for r in good]),
        _mean([r["milliseconds_per_image"] for r in good]),
        _mean([r.get("distinct_decisions") for r in good]),
        _mean([statistics.fmean(r["permuted"]) if "permuted" in r else None for r in good]),
        _mean([r.get("engine_1") for r in good]),
        _mean([r.get("engine_64") for r in good]),
        "; ".join(notes),
    )


def describe_result(result: dict[str, Any]) -> str:
    """One result in a line, as it comes."""
    target = "" if result["target"] is None else f", {result['target']:.2%}"
    name = f"{result['label']}{target}, seed {result['seed']}"
    if "failed" in result:
        return f"{name}: failed: {result['failed']}"
    return (
        f"{name}: accuracy {result['accuracy']:.2%}, paper cost {result['paper_cost']:.2%}, "
        f"BitOPs {result['bitops']:.2%}"
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


class _Column(NamedTuple):
    """A figure of every row: its field, its heading, and how it is shown."""

    field: str
    heading: str
    show: Callable[[float | None], str]
    optional: bool = False


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.2f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# Optional ones are there if any network has the figure.
_COLUMNS = (
    _Column("paper_cost", "paper cost %", _percent),
    _Column("bitops", "BitOPs %", _percent),
    _Column("latency", "latency %", _percent, optional=True),
    _Column("milliseconds_per_image", "ms per image", _milliseconds),
    _Column("engine_1", "engine ms, batch 1", _milliseconds, optional=True),
    _Column("engine_64", "engine ms, batch 64", _milliseconds, optional=True),
    _Column("distinct_decisions", "decisions", _count),
    _Column("permuted", "permuted %", _percent, optional=True),
)


def _columns(rows: Sequence[SummaryRow]) -> list[_Column]:
    return [c for c in _COLUMNS if not c.optional or any(_figure(r, c) is not None for r in rows)]


def _figure(row: SummaryRow, column: _Column) -> float | None:
    found: float | None = getattr(row, column.field)
    return found


def _cells(row: SummaryRow, columns: Sequence[_Column]) -> list[str]:
    accuracy = _percent(row.accuracy)
    if row.spread is not None:
        accuracy += f" ± {row.spread * 100:.2f}"
    figures = (column.show(_figure(row, column)) for column in columns)
    return [row.name, str(row.seeds), accuracy, *figures, row.note]


def to_markdown(rows: Sequence[SummaryRow]) -> str:
    """A Markdown table."""
    headings, *cells = table_cells(rows)
    aligned = ["---", *["---:"] * (len(headings) - 2), "---"]
    return "".join(f"| {' | '.join(line)} |\n" for line in (headings, aligned, *cells))


def to_csv(rows: Sequence[SummaryRow]) -> str:
    """All figures as they are, a heading first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(SummaryRow.__dataclass_fields__))
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def write_tables(folder: Path, rows: Sequence[SummaryRow], about: dict[str, Any]) -> None:
    """``table.md``, ``table.csv`` and ``table.json`` in a folder.

    Args:
        about: what the JSON says beside the rows.
    """
    content = {**about, "rows": [asdict(row) for row in rows]}
    texts = (to_markdown(rows), to_csv(rows), json.dumps(content, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(TABLE_NAMES, texts, strict=True):
        write_beside(folder / name, text)


def read_tables(folder: Path) -> list[SummaryRow]:
    """The rows that :func:`write_tables` wrote; ValueError if there is no readable table."""
    return rows_of(read_about(folder))


def read_about(folder: Path) -> dict[str, Any]:
    """All of the JSON that :func:`write_tables` wrote.

    Raises:
        ValueError: there is no readable table.
    """
    path = folder / TABLE_NAMES[-1]
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows_of(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no table of a sweep ({error})") from error
    return content


def rows_of(about: dict[str, Any]) -> list[SummaryRow]:
    """The rows in it."""
    return [SummaryRow(**row) for row in about["rows"]]


def table_cells(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """Headings, and the cells of every row, as texts."""
    columns = _columns(rows)
    headings = ["network", "seeds", "accuracy %", *(c.heading for c in columns), "note"]
    return [headings, *(_cells(row, columns) for row in rows)]


def rich_summary(rows: Sequence[SummaryRow], title: str, width: int) -> Table:
    """The same for a terminal of ``width`` columns; where it is narrow the last figures go."""
    headings, *lines = table_cells(rows)
    wide = Console(width=1000)
    # The network, seeds and accuracy stay, and notes get lines of their own.
    for count in range(len(headings) - 1, 2, -1):
        table = Table(title=title, title_justify="left", caption_justify="left")
        for i, heading in enumerate(headings[:count]):
            justify: JustifyMethod = "right" if i else "left"
            table.add_column(heading.replace(" ", "\n", 1), justify=justify, no_wrap=True)
        for line in lines:
            table.add_row(*line[:count])
        if wide.measure(table).maximum <= width:
            break
    captions = [f"{row.name}: {row.note}" for row in rows if row.note]
    if count < len(headings) - 1:
        captions.append(f"further columns in {TABLE_NAMES[0]}")
    table.caption = "\n".join(captions) or None
    return table
