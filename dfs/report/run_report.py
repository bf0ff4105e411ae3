"""What a run did, on one page: accuracy, costs, decisions, and whether they follow the input."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfs.data import DataSplits, Images
from dfs.latency import LatencyTable
from dfs.report.page import Page
from dfs.report.plots import (
    SheetImage,
    plot_curves,
    plot_decisions,
    plot_sheet,
    plot_spending,
)
from dfs.train.checkpoint import write_beside
from dfs.train.config import TrainConfig
from dfs.train.evaluate import Evaluation, decision_shares, decisions, evaluate
from dfs.train.oracle import permuted_accuracies
from dfs.train.record import CONFIG_NAME, ENVIRONMENT_NAME, METRICS_NAME
from dfs.train.stages import ORACLE
from dfs.train.trainer import Trainer

REPORT_NAME = "report.html"
SHEET_NAME = "sheet.png"
_SHEET_IMAGES = 10
_BATCH = 256


def write_run_report(
    trainer: Trainer, path: Path, latency_table: LatencyTable | None = None
) -> None:
    """The page of a finished run on its test images.

    Raises:
        ValueError: the run is not finished.
        ImportError: matplotlib is not installed.
    """
    if not trainer.done:
        raise ValueError("the run is not finished; dfs train --resume goes on with it")
    config, test = trainer.config, trainer.data.test
    policy = config.static_widths[0] if config.static_widths else None
    plain = evaluate(trainer.plain, test, latency_table=latency_table)
    rows = [("float network", plain)]
    plain_only = config.static_widths == (32,)
    if not plain_only:
        model = evaluate(trainer.model, test, policy, latency_table=latency_table)
        rows.append((_title(config), model))
    page = Page(f"{_title(config)}: {config.model} on {config.dataset}", f"{len(test)} test images")
    _add_results(page, rows)
    with tempfile.TemporaryDirectory() as scratch:
        if not plain_only:
            _add_decisions(page, trainer, rows[-1][1], Path(scratch))
        _add_training(page, trainer, Path(scratch))
    _add_origin(page, trainer)
    write_beside(path, page.html())


def plot_run(trainer: Trainer, folder: Path) -> list[Path]:
    """The pictures of a finished run's page as PNGs: decisions, and its extreme images.

    Raises:
        ValueError: the run is not finished, or the same for every image.
        ImportError: matplotlib is not installed.
    """
    if not trainer.done:
        raise ValueError("the run is not finished; dfs train --resume goes on with it")
    if trainer.config.static_widths:
        raise ValueError(
            "a static network spends the same on every image; there is nothing to plot"
        )
    data, choices = trainer.data, trainer.model.choices
    bits = decisions(trainer.model, data.test)
    costs, _, predicted = _per_image(trainer, bits)
    paths = [folder / "decisions.png", folder / SHEET_NAME]
    plot_decisions(paths[0], [(_title(trainer.config), decision_shares(bits, choices))], choices)
    plot_sheet(paths[1], spending_sheet(data, data.test, bits, costs, predicted), choices)
    return paths


def _title(config: TrainConfig) -> str:
    if config.static_widths:
        return f"static, {'/'.join(map(str, config.static_widths))} bits"
    gate = "" if config.gate == "rnn" else f", {config.gate} gate"
    return f"DFS, target {config.target:.2%}{gate}"


def _add_results(page: Page, rows: Sequence[tuple[str, Evaluation]]) -> None:
    page.heading("Results")
    headings = ["network", "accuracy %", "paper cost %", "BitOPs %"]
    with_latency = any(e.latency is not None for _, e in rows)
    headings += ["latency %"] if with_latency else []
    cells = []
    for name, e in rows:
        costs = [e.paper_cost, e.bitops, *([e.latency or 0.0] if with_latency else [])]
        shown = [f"{100 * value:.2f}" for value in (e.accuracy, *costs)]
        cells.append([name, *shown, f"{e.milliseconds:.3f}"])
    page.table([*headings, "ms per image"], cells)
    page.note(
        "Costs are fractions of the full-precision network. Paper cost: mean of (bits/32)² over "
        "images and gated blocks. BitOPs: multiply-accumulates weighted by bits², everything "
        f"counted. Times are of this machine, in batches of {rows[0][1].batch_size}."
    )


def _add_decisions(page: Page, trainer: Trainer, measured: Evaluation, scratch: Path) -> None:
    config, data, bits = trainer.config, trainer.data, measured.bits
    assert bits is not None
    choices = trainer.model.choices
    page.heading("Decisions")
    plot_decisions(scratch / "decisions.png", [("", measured.shares(choices))], choices)
    page.picture(scratch / "decisions.png", "how often each block takes each width")
    page.note("How often each residual block takes each width, over the test images.")
    if config.static_widths:
        return
    page.text(
        f"The {len(bits)} images get {measured.distinct_decisions} different decision vectors."
    )
    costs, correct, predicted = _per_image(trainer, bits)
    plot_spending(scratch / "spending.png", costs, correct)
    page.picture(scratch / "spending.png", "histogram of what images cost")
    _add_input_dependence(page, trainer, measured)
    page.heading("What the cheapest and the dearest images look like")
    plot_sheet(
        scratch / "sheet.png",
        spending_sheet(data, data.test, bits, costs, predicted),
        choices,
    )
    page.picture(scratch / "sheet.png", "the cheapest and the dearest test images")
    page.note("Below each picture, a bar per gated block in the colour of the bits it took.")


def _add_input_dependence(page: Page, trainer: Trainer, measured: Evaluation) -> None:
    page.heading("Does it matter what the input is?")
    assert measured.bits is not None
    permuted = permuted_accuracies(trainer.model, trainer.data.test, measured.bits)
    mean = statistics.fmean(permuted)
    lost = (measured.accuracy - mean) * 100
    images = round(lost / 100 * len(measured.bits))
    page.text(
        f"With each image's own decisions the accuracy is {measured.accuracy:.2%}; when images are "
        f"given each other's, it is {mean:.2%} on average of {len(permuted)} shuffles "
        f"({min(permuted):.2%} to {max(permuted):.2%}). "
        + (
            f"The decisions are worth {lost:.2f} points, or {images} images."
            if max(permuted) < measured.accuracy
            else "That is no clear fall: the decisions say little about the images."
        )
    )
    oracle = trainer.results.get(ORACLE)
    if not oracle:
        return
    page.text(
        "Before the gate was trained, on validation images: the cheapest uniform width that agrees "
        f"with the float network would cost {oracle['cost']:.2%} and agree on "
        f"{oracle['agreement']:.2%} of the images; the best constant mix of uniform widths at that "
        f"cost agrees on {oracle['constant_agreement']:.2%}. The gap is what looking at the image "
        "could gain at most."
    )
    widths = trainer.model.choices
    page.table(
        ["uniform width", *("skip" if w == 0 else f"{w} bits" for w in widths)],
        [
            ["agrees, %", *(f"{100 * oracle[f'agreement_{w}']:.1f}" for w in widths)],
            ["cheapest that agrees, %", *(f"{100 * oracle[f'share_{w}']:.1f}" for w in widths)],
        ],
    )


def _add_training(page: Page, trainer: Trainer, scratch: Path) -> None:
    page.heading("Training")
    rows = [
        [
            stage.name,
            str(stage.length(trainer.config, trainer.data)),
            _list(trainer.results.get(stage.name, {})),
        ]
        for stage in trainer.stages
    ]
    page.table(("stage", "steps", "at its end"), rows)
    folder = trainer.folder
    metrics = folder / METRICS_NAME if folder is not None else None
    if metrics is not None and metrics.exists():
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        if plot_curves(scratch / "curves.png", lines):
            page.picture(scratch / "curves.png", "training losses")


def _list(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "-"


def _add_origin(page: Page, trainer: Trainer) -> None:
    page.heading("How it was made")
    folder = trainer.folder
    if folder is None:
        return
    for name in (CONFIG_NAME, ENVIRONMENT_NAME):
        if (folder / name).exists():
            page.folded(name, (folder / name).read_text(encoding="utf-8"))
    unverified = trainer.data.record()["unverified"]
    if unverified:
        page.text(f"Data not as published: {', '.join(unverified)}")


@torch.no_grad()
def _per_image(trainer: Trainer, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each test image costs, whether it is classified rightly, and as what."""
    model, test = trainer.model.eval(), trainer.data.test
    widths = torch.tensor(model.choices)
    costs = trainer.cost((bits[:, :, None] == widths).double())
    found = [model(batch.images).argmax(1) for batch in test.batches(_BATCH)]
    predicted = torch.cat(found).cpu()
    return costs, predicted == test.labels.cpu(), predicted


def spending_sheet(
    data: DataSplits,
    images: Images,
    bits: Tensor,
    costs: Tensor,
    predicted: Tensor,
    count: int = _SHEET_IMAGES,
) -> dict[str, list[SheetImage]]:
    """The images that cost least and most, with what each spent.

    Args:
        bits: (N, gated blocks); costs, predicted: (N,).
    """
    order = costs.argsort(stable=True).tolist()
    picked = {"the cheapest": order[:count], "the dearest": order[::-1][:count]}
    wanted = {index for group in picked.values() for index in group}
    pixels = _pixels(data, images, wanted)
    return {
        title: [
            SheetImage(
                pixels[i],
                bits[i],
                _caption(data, int(images.labels[i]), int(predicted[i]), costs[i]),
            )
            for i in group
        ]
        for title, group in picked.items()
    }


def _caption(data: DataSplits, label: int, predicted: int, cost: Tensor) -> str:
    names = data.preprocessing.class_names if data.preprocessing is not None else None
    shown = [names[c] if names else str(c) for c in (label, predicted)]
    what = shown[0] if label == predicted else f"{shown[0]}, taken for {shown[1]}"
    return f"{what}\n{100 * float(cost):.2f} %"


def _pixels(data: DataSplits, images: Images, wanted: set[int]) -> dict[int, Tensor]:
    """Some images, their normalization undone: (C, H, W) in 0..1."""
    found, start = {}, 0
    for batch in images.batches(_BATCH):
        for i in wanted:
            if start <= i < start + len(batch):
                found[i] = _undo(data, batch.images[i - start].cpu())
        start += len(batch)
    return found


def _undo(data: DataSplits, image: Tensor) -> Tensor:
    preprocessing: Any = data.preprocessing
    if preprocessing is None:
        low, high = image.min(), image.max()
        return (image - low) / (high - low).clamp_min(1e-8)
    mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
    std = torch.tensor(preprocessing.std).view(-1, 1, 1)
    return (image * std + mean).clamp(0, 1)
