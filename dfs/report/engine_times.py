"""Times of a frozen network beside its peers, as a table and a plot."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from dfs.engine.timing import EngineTime, EngineTimes
from dfs.report.plots import PALETTE, pyplot_for_files, save_figure


def engine_times_table(found: EngineTimes, title: str) -> Table:
    """Milliseconds per image, median and 99th percentile, a column per batch size."""
    plural = "" if found.threads == 1 else "s"
    where = f"{found.threads} thread{plural}" if found.device == "cpu" else found.device
    table = Table(
        title=f"{title}: ms per image, p50 / p99, {where}",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("paper\ncost %", justify="right")
    for batch in found.batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    for label, times in found.rows().items():
        cost = next(iter(times.values())).cost
        cells = (_cell(times.get(batch)) for batch in found.batches)
        table.add_row(label, "" if cost is None else f"{100 * cost:.2f}", *cells)
    return table


def _cell(found: EngineTime | None) -> str:
    return "" if found is None else f"{found.p50:.3f} / {found.p99:.3f}"


def plot_engine_times(path: Path, found: EngineTimes, title: str) -> None:
    """Milliseconds per image over the batch size, a line for each contestant, as a PNG.

    The lines are medians; whiskers reach to the 99th percentile.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = pyplot_for_files()
    figure, axis = pyplot.subplots(figsize=(8.5, 5))
    rows = found.rows()
    for i, (label, times) in enumerate(rows.items()):
        own = times[next(iter(times))].cost is not None
        axis.errorbar(
            list(times),
            [t.p50 for t in times.values()],
            yerr=[[0.0] * len(times), [max(t.p99 - t.p50, 0.0) for t in times.values()]],
            color=PALETTE[i % len(PALETTE)],
            linestyle="-" if own else "--",
            marker="o" if own else "s",
            capsize=2,
            label=label,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(found.batches, [str(batch) for batch in found.batches])
    axis.set_xlabel("images in a batch")
    axis.set_ylabel("ms per image, median to 99th percentile")
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
