"""What there is to be gained from looking at the input, before a gate is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfs.cost import Cost
from dfs.data import Images
from dfs.models import DynamicResNet, PlainResNet

_BATCH = 256


@torch.no_grad()
def uniform_oracle(
    model: DynamicResNet, teacher: PlainResNet, images: Images, cost: Cost
) -> dict[str, float]:
    """The cheapest uniform width of every image that agrees with the teacher's class.

    An image that no width gets to agree is given the cheapest. What decisions that look at the
    image can gain shows beside a constant mix of the uniform widths at the same mean cost: the
    upper hull of their agreements over their costs.

    Returns:
        Fractions: ``cost`` and ``agreement`` of the oracle, ``constant_agreement`` of the mix, and
        ``agreement_B`` and ``share_B`` for each choice B: how often it agrees, and how often the
        oracle takes it.
    """
    model.eval()
    teacher.eval()
    found = []
    for batch in images.batches(_BATCH):
        taught = teacher(batch.images).argmax(1)
        found.append(
            torch.stack(
                [model(batch.images, c).argmax(1) == taught for c in model.choices], 1
            ).cpu()
        )
    agrees = torch.cat(found)
    costs = cost.of_choices()
    order = costs.argsort()
    # The first that agrees in the order of cost, or the cheapest where none does.
    taken = order[agrees[:, order].int().argmax(1)]
    spent = float(costs[taken].mean())
    each = agrees.double().mean(0)
    result = {
        "cost": spent,
        "agreement": float(agrees.any(1).double().mean()),
        "constant_agreement": best_mix(costs.tolist(), each.tolist(), spent),
    }
    for i, width in enumerate(model.choices):
        result[f"agreement_{width}"] = float(each[i])
        result[f"share_{width}"] = float((taken == i).double().mean())
    return result


def best_mix(costs: Sequence[float], values: Sequence[float], budget: float) -> float:
    """The largest mean value of a random mix of options whose mean cost is within ``budget``."""
    points = sorted(zip(costs, values, strict=True))
    best = max(value for cost, value in points if cost <= points[0][0] or cost <= budget)
    for low_cost, low in points:
        for high_cost, high in points:
            if low_cost <= budget < high_cost:
                share = (budget - low_cost) / (high_cost - low_cost)
                best = max(best, low + share * (high - low))
    return best


@torch.no_grad()
def permuted_accuracies(
    model: DynamicResNet, images: Images, bits: Tensor, seed: int = 0, rounds: int = 5
) -> list[float]:
    """Accuracy when images are given each other's decisions, once per random permutation.

    If it does not fall below the accuracy of the images' own decisions, those say nothing about
    the images.

    Args:
        bits: (N, gated blocks), the images' own decisions.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(rounds):
        given = bits[torch.randperm(len(bits), generator=generator)]
        correct, start = 0, 0
        for batch in images.batches(_BATCH):
            policy = given[start : start + len(batch)].to(batch.images.device)
            correct += int((model(batch.images, policy).argmax(1) == batch.labels).sum())
            start += len(batch)
        results.append(correct / len(images))
    return results
