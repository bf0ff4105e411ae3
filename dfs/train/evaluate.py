"""Accuracy, cost and time of a network on a set of images."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dfs.cost import BitOps, Cost, PaperCost
from dfs.data import Images
from dfs.models import DynamicResNet, PlainResNet, Policy

_TIMED_PASSES = 5
_TIMED_IMAGES = 1024


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured.

    Attributes:
        accuracy: fraction of the images classified rightly.
        paper_cost, bitops: fractions of the full-precision network.
        milliseconds: per image, median over passes through up to 1,024 images in batches.
        batch_size: what those batches held.
        bits: int32 (N, gated blocks), every decision; None for a plain network.
    """

    accuracy: float
    paper_cost: float
    bitops: float
    milliseconds: float
    batch_size: int
    bits: Tensor | None

    @property
    def widths_used(self) -> tuple[int, ...]:
        return () if self.bits is None else tuple(sorted(set(self.bits.flatten().tolist())))

    @property
    def distinct_decisions(self) -> int:
        """How many different decision vectors the images got."""
        return 1 if self.bits is None else len(torch.unique(self.bits, dim=0))


@torch.no_grad()
def evaluate(
    model: DynamicResNet | PlainResNet,
    images: Images,
    policy: Policy = None,
    batch_size: int = 64,
) -> Evaluation:
    """Run a network in evaluation mode, kernels and all, and time it.

    Args:
        policy: None asks the gate; an int forces every gated block to that width.
    """
    if len(images) == 0:
        raise ValueError("images must not be empty")
    model.eval()
    correct = 0
    bits, masks = [], []
    for batch in images.batches(batch_size):
        if isinstance(model, DynamicResNet):
            out = model.run(batch.images, policy)
            bits.append(out.bits)
            masks.append(out.mask)
            logits = out.logits
        else:
            logits = model(batch.images)
        correct += int((logits.argmax(1) == batch.labels).sum())
    # Decoded beforehand: the network's time is meant.
    timed = list(itertools.islice(images.batches(batch_size), -(-_TIMED_IMAGES // batch_size)))
    passes = []
    for _ in range(_TIMED_PASSES):
        start = time.perf_counter()
        for batch in timed:
            _logits(model, batch.images, policy)
        count = sum(map(len, timed))
        passes.append((time.perf_counter() - start) / count * 1e3)
    paper = bitops = 1.0
    if isinstance(model, DynamicResNet):
        mask = torch.cat(masks)
        paper = float(PaperCost(model)(mask).double().mean())
        bitops = float(BitOps(model, images.image_size)(mask).double().mean())
    return Evaluation(
        correct / len(images),
        paper,
        bitops,
        statistics.median(passes),
        batch_size,
        torch.cat(bits) if bits else None,
    )


@torch.no_grad()
def accuracy(
    model: DynamicResNet | PlainResNet,
    images: Images,
    policy: Policy = None,
    batch_size: int = 256,
) -> float:
    """Fraction of ``images`` classified rightly."""
    model.eval()
    correct = 0
    for batch in images.batches(batch_size):
        logits = _logits(model, batch.images, policy)
        correct += int((logits.argmax(1) == batch.labels).sum())
    return correct / len(images)


@torch.no_grad()
def mean_cost(model: DynamicResNet, images: Images, cost: Cost, batch_size: int = 256) -> float:
    """Mean cost of the gate's hard decisions."""
    model.eval()
    total = 0.0
    for batch in images.batches(batch_size):
        total += float(cost(model.run(batch.images).mask).double().sum())
    return total / len(images)


def _logits(model: DynamicResNet | PlainResNet, images: Tensor, policy: Policy) -> Tensor:
    result: Tensor = model(images, policy) if isinstance(model, DynamicResNet) else model(images)
    return result
