"""Plots of what was decided, what it cost and what came of it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs.report.summary import SummaryRow

# Pale for a skip, darker with every bit spent; readable in grey and by colour-blind readers.
_COLOURS = {0: "#e8e8e8", 2: "#a6cee3", 4: "#5aa5cf", 8: "#2171b5", 32: "#08306b"}
_PALEST, _DARKEST = 0.25, 1.0
# Of methods: Okabe and Ito's palette, which colour-blind readers can tell apart, and four of Tol's.
PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"),
    *("#882255", "#44aa99", "#332288", "#999933"),
)
_MARKERS = "osD^vP*Xph<>"
# Points of accuracy: beyond the first, the best networks get a panel of their own, of the second.
_CROWDED, _BEST = 4.0, 2.0
COST_LABELS = {
    "paper_cost": "paper cost, % of full precision",
    "bitops": "BitOPs, % of full precision",
    "latency": "latency by table, % of full precision",
    "engine_1": "ms per image in the engine, batch 1",
    "engine_64": "ms per image in the engine, batch 64",
}
# Those that are fractions, shown in percent.
_FRACTIONS = ("paper_cost", "bitops", "latency")


def require_plotting() -> None:
    """Find out before long work whether there will be plots: ImportError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib; pip install matplotlib")


def pyplot_for_files() -> Any:
    """Matplotlib's pyplot without a display; ImportError where it is missing."""
    require_plotting()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG beside and rename, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(beside, dpi=150, format="png")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
        pyplot_for_files().close(figure)


def width_colours(choices: Sequence[int]) -> dict[int, Any]:
    """A colour for every width, darker with every bit."""
    if set(choices) <= set(_COLOURS):
        return {width: _COLOURS[width] for width in choices}
    shades = pyplot_for_files().get_cmap("Blues")
    widths = sorted(width for width in choices if width)
    span = max(len(widths) - 1, 1)
    darker = {w: _PALEST + (_DARKEST - _PALEST) * i / span for i, w in enumerate(widths)}
    return {w: shades(darker[w]) if w else _COLOURS[0] for w in choices}


def plot_decisions(
    path: Path, decisions: Sequence[tuple[str, Tensor]], choices: Sequence[int]
) -> None:
    """How often each block took each width, one panel per network, as a PNG.

    Args:
        decisions: (title, shares (gated blocks, choices)) per network, see
            :func:`dfs.train.evaluate.decision_shares`.
        choices: ascending widths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = pyplot_for_files()
    figure, panels = pyplot.subplots(
        len(decisions), 1, figsize=(7, 0.6 + 2.2 * len(decisions)), squeeze=False, sharex=True
    )
    for (title, shares), axis in zip(decisions, panels[:, 0], strict=True):
        _stack(axis, shares, choices)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("share of images")
        axis.set_ylim(0, 1)
    blocks = len(decisions[0][1])
    every = max(1, blocks // 20)
    panels[-1, 0].set_xticks(range(0, blocks, every), [str(i + 2) for i in range(0, blocks, every)])
    panels[-1, 0].set_xlabel("residual block (the first is not gated)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title="bits")
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    save_figure(figure, path)


def _stack(axis: Any, shares: Tensor, choices: Sequence[int]) -> None:
    blocks = len(shares)
    colours = width_colours(choices)
    bottom = [0.0] * blocks
    for width, share in zip(choices, shares.T.tolist(), strict=True):
        axis.bar(range(blocks), share, bottom=bottom, color=colours[width], label=_name(width))
        bottom = [b + s for b, s in zip(bottom, share, strict=True)]


def _name(width: int) -> str:
    return "skip" if width == 0 else str(width)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) points that no other beats in both, by ascending cost."""
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def plot_tradeoff(path: Path, rows: Sequence[SummaryRow], cost: str) -> bool:
    """Accuracy over a cost, a series per method, with the Pareto front, as a PNG.

    Args:
        cost: out of ``COST_LABELS``.

    Returns:
        False, without a file, if no row has that cost.
    """
    known = [r for r in rows if r.accuracy is not None and getattr(r, cost) is not None]
    if not known:
        return False
    # All of them, so that a method looks the same over every cost.
    labels = list(dict.fromkeys(row.label for row in rows))
    pyplot = pyplot_for_files()
    scale = 100 if cost in _FRACTIONS else 1
    points = [(scale * getattr(r, cost), 100 * (r.accuracy or 0.0)) for r in known]
    front = [points[i] for i in pareto_front(points)]
    best, worst = max(y for _, y in points), min(y for _, y in points)
    # The better half is seen whole, even where one point is far above it.
    middle = sorted(y for _, y in points)[len(points) // 2]
    depth = max(_BEST, 1.1 * (best - middle))
    crowded = best - worst > max(_CROWDED, 2 * depth)
    figure, panels = pyplot.subplots(
        1, 1 + crowded, figsize=(12 if crowded else 7.5, 4.5), squeeze=False
    )
    for axis in panels[0]:
        _draw_series(axis, labels, known, points, front)
        # Costs differ by orders of magnitude.
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        # Within a factor of ten there are hardly any major ticks.
        costs = [x for x, _ in points]
        axis.xaxis.set_minor_formatter("{x:g}" if max(costs) < 10 * min(costs) else "")
        axis.tick_params(axis="x", which="both", pad=4)
        axis.set_xlabel(COST_LABELS[cost])
        axis.grid(alpha=0.3)
    panels[0, 0].set_ylabel("test accuracy, %")
    if crowded:
        near = [x for x, y in points if y > best - depth]
        panels[0, 1].set_ylim(best - depth, best + depth / 8)
        panels[0, 1].set_xlim(0.8 * min(near), 1.25 * max(near))
        panels[0, 1].set_title("the best of them", loc="left", fontsize=10)
    panels[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
    return True


def _draw_series(
    axis: Any,
    labels: Sequence[str],
    known: Sequence[SummaryRow],
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
) -> None:
    """The points of every method, joined where it has several, and the front."""
    axis.plot(
        *zip(*front, strict=True), color="0.6", linestyle="--", zorder=1, label="Pareto front"
    )
    for i, label in enumerate(labels):
        own = sorted((k for k, r in enumerate(known) if r.label == label), key=points.__getitem__)
        if not own:
            continue
        axis.errorbar(
            [points[k][0] for k in own],
            [points[k][1] for k in own],
            yerr=[100 * (known[k].spread or 0.0) for k in own],
            marker=_MARKERS[i % len(_MARKERS)],
            linewidth=0.8,
            color=PALETTE[i % len(PALETTE)],
            capsize=2,
            label=label,
            zorder=2,
        )


@dataclass(frozen=True, eq=False)
class SheetImage:
    """One picture of a sheet.

    Attributes:
        pixels: (C, H, W) in 0..1, C being 1 or 3.
        bits: (gated blocks,).
        caption: of a line or two.
    """

    pixels: Tensor
    bits: Tensor
    caption: str


def plot_sheet(
    path: Path, groups: Mapping[str, Sequence[SheetImage]], choices: Sequence[int]
) -> None:
    """Pictures in rows with the width of every block below each, as a PNG.

    Args:
        groups: title to pictures, a row each.
    """
    pyplot = pyplot_for_files()
    columns = max(map(len, groups.values()))
    figure = pyplot.figure(figsize=(1.15 * columns, 2.4 * len(groups)), layout="constrained")
    colours = width_colours(choices)
    rows = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for row, (title, pictures) in zip(rows, groups.items(), strict=True):
        row.suptitle(title, x=0.01, ha="left", fontsize=10)
        panels = row.subplots(2, columns, squeeze=False, height_ratios=[5, 1])
        for column in range(columns):
            shown, spent = panels[:, column]
            shown.axis("off")
            spent.axis("off")
            if column < len(pictures):
                _draw_picture(shown, spent, pictures[column], colours)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[w]) for w in choices]
    names = [_name(width) for width in choices]
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8
    )
    save_figure(figure, path)


def _draw_picture(shown: Any, spent: Any, picture: SheetImage, colours: Mapping[int, Any]) -> None:
    pixels = picture.pixels.permute(1, 2, 0).squeeze(-1).numpy()
    shown.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    shown.set_title(picture.caption, fontsize=7)
    bits = picture.bits.tolist()
    spent.bar(range(len(bits)), [1] * len(bits), width=0.9, color=[colours[b] for b in bits])
    spent.set_ylim(0, 1)


def plot_curves(path: Path, metrics: Sequence[Mapping[str, Any]]) -> bool:
    """The loss of every step, a panel per stage, as a PNG; False if there is none.

    Args:
        metrics: lines of a run's ``metrics.jsonl``.
    """
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in metrics:
        for name in ("loss", "gate_loss"):
            if name in line and not line["final"]:
                curves = stages.setdefault(line["stage"], {})
                curves.setdefault(name, []).append((line["step"], line[name]))
    if not stages:
        return False
    pyplot = pyplot_for_files()
    figure, panels = pyplot.subplots(
        1, len(stages), figsize=(2.6 * len(stages), 2.4), squeeze=False
    )
    for (stage, curves), axis in zip(stages.items(), panels[0], strict=True):
        for i, (name, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, linewidth=0.8, color=PALETTE[i], label=name)
        axis.set_title(stage, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    save_figure(figure, path)
    return True


def plot_spending(path: Path, costs: Tensor, correct: Tensor) -> None:
    """A histogram of what images cost, the misclassified ones apart, as a PNG.

    Args:
        costs: (N,), fractions of full precision.
        correct: bool (N,).
    """
    pyplot = pyplot_for_files()
    figure, axis = pyplot.subplots(figsize=(7, 2.6))
    percent = 100 * costs.double()
    edges = torch.linspace(float(percent.min()), float(percent.max()) + 1e-9, 25).tolist()
    groups = [percent[correct].tolist(), percent[~correct].tolist()]
    axis.hist(groups, edges, stacked=True, color=[PALETTE[0], PALETTE[1]])
    axis.legend(["classified rightly", "wrongly"], frameon=False, fontsize=8)
    axis.set_xlabel("cost of an image, % of full precision")
    axis.set_ylabel("images")
    figure.tight_layout()
    save_figure(figure, path)
