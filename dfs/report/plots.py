"""Plots of what was decided."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

# Pale for a skip, darker with every bit spent; readable in grey and by colour-blind readers.
_COLOURS = {0: "#e8e8e8", 2: "#a6cee3", 4: "#5aa5cf", 8: "#2171b5", 32: "#08306b"}


def require_plotting() -> None:
    """Find out before long work whether there will be plots: ImportError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib; pip install matplotlib")


def plot_decisions(
    path: Path, decisions: Sequence[tuple[str, Tensor]], choices: Sequence[int]
) -> None:
    """How often each block took each width, one panel per network, as a PNG.

    Args:
        decisions: (title, bits (N, gated blocks)) per network.
        choices: ascending widths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_plotting()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(decisions), 1, figsize=(7, 0.6 + 2.2 * len(decisions)), squeeze=False, sharex=True
    )
    for (title, bits), axis in zip(decisions, panels[:, 0], strict=True):
        _stack(axis, bits, choices)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("share of images")
        axis.set_ylim(0, 1)
    blocks = decisions[0][1].shape[1]
    panels[-1, 0].set_xticks(range(blocks), [str(i + 2) for i in range(blocks)])
    panels[-1, 0].set_xlabel("residual block (the first is not gated)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title="bits")
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(beside, dpi=150, format="png")
    os.replace(beside, path)
    pyplot.close(figure)


def _stack(axis: Any, bits: Tensor, choices: Sequence[int]) -> None:
    blocks = bits.shape[1]
    bottom = [0.0] * blocks
    for width in choices:
        share = (bits == width).double().mean(0).tolist()
        label = "skip" if width == 0 else str(width)
        axis.bar(range(blocks), share, bottom=bottom, color=_COLOURS.get(width), label=label)
        bottom = [b + s for b, s in zip(bottom, share, strict=True)]
