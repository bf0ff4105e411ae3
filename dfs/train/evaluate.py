"""Accuracy, cost and time of a network on a set of images."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfs.cost import Cost, make_cost
from dfs.data import Images
from dfs.latency import LatencyTable
from dfs.models import DynamicResNet, PlainResNet, Policy

_TIMED_PASSES = 5
_TIMED_IMAGES = 1024


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured.

    Attributes:
        paper_cost, bitops: fractions of the full-precision network.
        milliseconds: per image, median over passes through up to 1,024 images in batches.
        batch_size: what those batches held.
        bits: int32 (N, gated blocks), every decision; None for a plain network.
        correct: bool (N,), the images that were classified rightly.
        latency: by a table of measured parts, as a fraction of full precision; None without one.
    """

    paper_cost: float
    bitops: float
    milliseconds: float
    batch_size: int
    bits: Tensor | None
    correct: Tensor
    latency: float | None = None

    @staticmethod
    def of(
        correct: Tensor,
        costs: Mapping[str, float],
        milliseconds: float,
        batch_size: int,
        bits: Tensor | None,
    ) -> Evaluation:
        """With costs by their names; the latency may be missing."""
        named = (costs["paper"], costs["bitops"])
        measured = (*named, milliseconds, batch_size, bits, correct.cpu())
        return Evaluation(*measured, costs.get("latency"))

    @property
    def accuracy(self) -> float:
        """Fraction of the images classified rightly."""
        return int(self.correct.sum()) / len(self.correct)

    @property
    def widths_used(self) -> tuple[int, ...]:
        return () if self.bits is None else tuple(sorted(set(self.bits.flatten().tolist())))

    def shares(self, choices: Sequence[int]) -> Tensor:
        """How often each block took each of the choices, float64 (gated blocks, choices)."""
        assert self.bits is not None
        return decision_shares(self.bits, choices)

    @property
    def distinct_decisions(self) -> int:
        """How many different decision vectors the images got."""
        return 1 if self.bits is None else len(torch.unique(self.bits, dim=0))


def decision_shares(bits: Tensor, choices: Sequence[int]) -> Tensor:
    """How often each block took each width, float64 (gated blocks, choices).

    Args:
        bits: (N, gated blocks).
    """
    widths = torch.tensor(choices, device=bits.device)
    return (bits[:, :, None] == widths).double().mean(0)


@torch.no_grad()
def evaluate(
    model: DynamicResNet | PlainResNet,
    images: Images,
    policy: Policy = None,
    batch_size: int = 64,
    latency_table: LatencyTable | None = None,
) -> Evaluation:
    """Run a network in evaluation mode, kernels and all, and time it.

    Args:
        policy: None asks the gate; an int forces every gated block to that width.
        latency_table: adds the latency that it gives.
    """
    if len(images) == 0:
        raise ValueError("images must not be empty")
    model.eval()
    bits, masks, correct = [], [], []
    for batch in images.batches(batch_size):
        if isinstance(model, DynamicResNet):
            out = model.run(batch.images, policy)
            bits.append(out.bits)
            masks.append(out.mask)
            logits = out.logits
        else:
            logits = model(batch.images)
        correct.append(logits.argmax(1) == batch.labels)
    took = milliseconds_per_image(lambda x: _logits(model, x, policy), images, batch_size)
    costs = {"paper": 1.0, "bitops": 1.0, "latency": 1.0}
    if isinstance(model, DynamicResNet):
        mask = torch.cat(masks).double()
        found = costs_of(model, images.image_size, latency_table)
        costs = {cost.name: float(cost(mask).mean()) for cost in found}
    if latency_table is None:
        costs.pop("latency", None)
    decided = torch.cat(bits).cpu() if bits else None
    return Evaluation.of(torch.cat(correct), costs, took, batch_size, decided)


def costs_of(
    model: DynamicResNet, image_size: tuple[int, int], latency_table: LatencyTable | None = None
) -> list[Cost]:
    """Every cost that reports show."""
    names = ("paper", "bitops") if latency_table is None else ("paper", "bitops", "latency")
    return [make_cost(name, model, image_size, latency_table) for name in names]


def milliseconds_per_image(
    run: Callable[[Tensor], object], images: Images, batch_size: int
) -> float:
    """Median over passes through up to 1,024 images."""
    # Decoded beforehand: the network's time is meant.
    timed = list(itertools.islice(images.batches(batch_size), -(-_TIMED_IMAGES // batch_size)))
    count = sum(map(len, timed))
    passes = []
    for _ in range(_TIMED_PASSES):
        start = time.perf_counter()
        for batch in timed:
            run(batch.images)
        if timed[0].images.is_cuda:
            torch.cuda.synchronize(timed[0].images.device)
        passes.append((time.perf_counter() - start) / count * 1e3)
    return statistics.median(passes)


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
def decisions(model: DynamicResNet, images: Images, batch_size: int = 256) -> Tensor:
    """The width of every gated block for every image, int32 (N, gated blocks), on the CPU."""
    model.eval()
    return torch.cat([model.run(batch.images).bits for batch in images.batches(batch_size)]).cpu()


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
