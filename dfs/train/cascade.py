"""Run at a low width, and again at a high one where the network is not sure.

The rival that needs no gate: its decision is the confidence, the largest probability of the
softmax (as in Bolukbasi et al., ICML 2017, for early exits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfs.cost import Cost
from dfs.data import Images
from dfs.latency import LatencyTable
from dfs.models import DynamicResNet
from dfs.train.evaluate import Evaluation, costs_of, milliseconds_per_image

_BATCH = 256


@dataclass(frozen=True, eq=False)
class CascadeOutput:
    """Logits (N, classes), and which images (N,) were run again."""

    logits: Tensor
    again: Tensor


@dataclass(frozen=True, eq=False)
class Cascade:
    """Two uniform widths of one network.

    Attributes:
        threshold: images with less confidence at ``low`` bits are run again at ``high``.
    """

    model: DynamicResNet
    low: int
    high: int
    threshold: float

    @torch.no_grad()
    def run(self, images: Tensor) -> CascadeOutput:
        """Classify images (N, C, H, W)."""
        # Not at every call: it packs the weights anew.
        if self.model.training:
            self.model.eval()
        return run_cascade(self.model, self.low, self.high, self.threshold, images)

    def cost(self, again: Tensor, cost: Cost) -> Tensor:
        """What each image (N,) costs; the first run is paid for in any case."""
        low, high = (_uniform_cost(self.model, width, cost) for width in (self.low, self.high))
        return low + again.double() * high


@torch.no_grad()
def evaluate_cascade(
    cascade: Cascade,
    images: Images,
    batch_size: int = 64,
    latency_table: LatencyTable | None = None,
) -> Evaluation:
    """Accuracy, costs and time; ``bits`` holds the width that gave an image's answer."""
    model = cascade.model
    correct, reran = [], []
    for batch in images.batches(batch_size):
        out = cascade.run(batch.images)
        correct.append(out.logits.argmax(1) == batch.labels)
        reran.append(out.again)
    again = torch.cat(reran)
    took = milliseconds_per_image(cascade.run, images, batch_size)
    found = costs_of(model, images.image_size, latency_table)
    costs = {cost.name: float(cascade.cost(again, cost).mean()) for cost in found}
    bits = torch.where(again.cpu(), cascade.high, cascade.low).to(torch.int32)
    answered = bits[:, None].expand(-1, model.gated_blocks)
    return Evaluation.of(torch.cat(correct), costs, took, batch_size, answered)


def run_cascade(
    classify: Callable[[Tensor, int], Tensor],
    low: int,
    high: int,
    threshold: float,
    images: Tensor,
) -> CascadeOutput:
    """Classify images at ``low`` bits, and again at ``high`` those that are not sure.

    Args:
        classify: gives the logits of images (N, C, H, W) at a width.
        threshold: the least confidence that is sure.
    """
    logits = classify(images, low)
    again = confidence(logits) < threshold
    if bool(again.any()):
        logits[again] = classify(images[again], high)
    return CascadeOutput(logits, again)


def confidence(logits: Tensor) -> Tensor:
    """The probability (N,) of the likeliest class."""
    return logits.softmax(1).amax(1)


@torch.no_grad()
def cascade_for_target(
    model: DynamicResNet, low: int, high: int, images: Images, cost: Cost, target: float
) -> Cascade:
    """The cascade whose mean cost on validation images comes closest to ``target`` from below.

    Raises:
        ValueError: even running no image again costs more.
    """
    model.eval()
    first = _uniform_cost(model, low, cost)
    if target < first:
        raise ValueError(
            f"target {target:.3%} is below the {first:.3%} of running everything at {low} bits"
        )
    share = min(1.0, (target - first) / _uniform_cost(model, high, cost))
    found = [confidence(model(batch.images, low)) for batch in images.batches(_BATCH)]
    sure = torch.cat(found).sort().values
    again = int(share * len(sure))
    # Larger than any probability where all are to be run again.
    threshold = float(sure[again]) if again < len(sure) else 2.0
    return Cascade(model, low, high, threshold)


def _uniform_cost(model: DynamicResNet, width: int, cost: Cost) -> float:
    return float(cost.of_choices()[model.choices.index(width)])
