"""What a sweep came to: plots of its trade-offs and decisions, and one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfs.report.page import Page
from dfs.report.plots import COST_LABELS, plot_decisions, plot_tradeoff
from dfs.report.run_report import SHEET_NAME
from dfs.report.summary import SummaryRow, read_about, rows_of, table_cells
from dfs.train.checkpoint import write_beside

PLOTS = "plots"


def plot_sweep(folder: Path, out: Path) -> list[Path]:
    """PNGs of a sweep: accuracy over each cost, and how often the blocks took each width.

    Args:
        folder: of the sweep.
        out: where they go.

    Returns:
        Those that there is something to show on.

    Raises:
        ValueError: ``folder`` holds no table of a sweep.
        ImportError: matplotlib is not installed.
    """
    about = read_about(folder)
    rows = rows_of(about)
    written = [
        path
        for cost in COST_LABELS
        if plot_tradeoff(path := out / f"accuracy-{cost}.png", rows, cost)
    ]
    decided = [(d["title"], torch.tensor(d["shares"])) for d in about.get("decisions", [])]
    if decided:
        written.append(out / "decisions.png")
        plot_decisions(written[-1], decided, about["base"]["choices"])
    return written


def write_sweep_report(folder: Path, path: Path) -> None:
    """The page of a sweep: its table, accuracy over every cost, decisions and extreme images.

    Raises:
        ValueError: ``folder`` holds no table of a sweep.
        ImportError: matplotlib is not installed.
    """
    about = read_about(folder)
    rows = rows_of(about)
    pictures = {picture.stem: picture for picture in plot_sweep(folder, folder / PLOTS)}
    page = Page(about.get("title", f"Sweep {folder.resolve().name}"), about.get("note", ""))
    _add_table(page, rows, about.get("left_out", []))
    _add_constant_rival(page, rows, about.get("test_images"))
    _add_best_rivals(page, about.get("comparisons", []))
    for cost, label in COST_LABELS.items():
        if picture := pictures.get(f"accuracy-{cost}"):
            page.heading(f"Accuracy over {label.split(',')[0]}")
            page.picture(picture, f"accuracy over {label}")
    if picture := pictures.get("decisions"):
        page.heading("Decisions")
        page.picture(picture, "how often each block takes each width")
        page.note("How often each residual block takes each width, over the test images.")
        _add_sheet(page, folder, about["decisions"])
    page.heading("How it was made")
    settings = "".join(f"{name} = {value}\n" for name, value in about.get("base", {}).items())
    page.folded("settings of the dynamic networks", settings)
    write_beside(path, page.html())


def _add_table(page: Page, rows: Sequence[SummaryRow], left_out: Sequence[str]) -> None:
    page.heading("Results")
    headings, *cells = table_cells(rows)
    page.table(headings, cells)
    page.note(
        "Costs are fractions of the float network. Paper cost: mean of (bits/32)² over images and "
        "gated blocks. BitOPs: multiply-accumulates weighted by bits², everything counted. Engine: "
        "the network as it is deployed, on one thread of this machine. ± is the standard "
        "deviation over seeds. Decisions counts the different decision vectors that the images "
        "got; permuted is what accuracy is left when they are given each other's. All networks "
        "have the same teacher and as many sample passes."
    )
    for reason in left_out:
        page.note(f"Left out: {reason}")


def _add_constant_rival(page: Page, rows: Sequence[SummaryRow], images: int | None) -> None:
    """DFS beside gates that do not look, which cost as much."""
    blind = {r.target: r for r in rows if r.method == "constant" and r.accuracy is not None}
    pairs = [
        (r, blind[r.target])
        for r in rows
        if r.method == "dfs" and r.accuracy is not None and r.target in blind
    ]
    if not pairs:
        return
    page.heading("Does looking at the input help?")
    cells = []
    for own, other in pairs:
        assert own.accuracy is not None
        assert other.accuracy is not None
        gained = own.accuracy - other.accuracy
        shown = [f"{own.target:.2%}", f"{own.accuracy:.2%}", f"{other.accuracy:.2%}"]
        cells.append([*shown, f"{100 * gained:+.2f}"])
    page.table(["target", "DFS", "constant gate", "difference, points"], cells)
    one = "" if not images else f" One of the {images} test images is {100 / images:.2f} points."
    page.note(
        "The constant gate has the same choices and the same budget, and decides alike for every "
        f"image: what DFS gains over it is what looking at the image is worth.{one}"
    )


def _add_best_rivals(page: Page, compared: Sequence[dict[str, Any]]) -> None:
    """DFS beside the most accurate of all others that cost no more, by every measure."""
    if not compared:
        return
    page.heading("Beside the best rival that costs no more")
    cells = []
    for one in compared:
        scale = 1 if one["measure"].startswith("engine") else 100
        costs = (f"{one[name] * scale:.4g}" for name in ("cost", "rival_cost"))
        gained = one["difference"]
        points = [f"{100 * gained[name]:+.2f}" for name in ("mean", "low", "high")]
        between = f"{points[1]} to {points[2]}"
        label = COST_LABELS[one["measure"]]
        cells.append([one["name"], label, one["rival"], *costs, points[0], between])
    page.table(
        ["network", "by", "best rival", "cost", "its cost", "difference, points", "95 % interval"],
        cells,
    )
    page.note(
        "Intervals by the paired bootstrap over seeds and test images: where one contains 0, the "
        "networks can't be told apart. A rival may cost up to 2 % more."
    )


def _add_sheet(page: Page, folder: Path, decided: Sequence[dict[str, Any]]) -> None:
    """The extreme images of the first run that has such a sheet."""
    for entry in decided:
        sheet = folder / entry["run"] / PLOTS / SHEET_NAME
        if sheet.exists():
            page.heading(f"The cheapest and the dearest images: {entry['title']}")
            page.picture(sheet, "the cheapest and the dearest test images")
            page.note(
                "Below each picture, a bar per gated block in the colour of the bits it took. "
                f"More of this run: dfs report {entry['run']}"
            )
            return
