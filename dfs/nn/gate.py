"""What all gates have in common: the decision, its straight-through gradient, the choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs.nn import replicas
from dfs.nn.stream import pooled_features
from dfs_kernels import PackedActivation
from dfs_kernels.reference import cheapest_argmax

# What a gate hands to the next, such as the output and the memory of an LSTM so far.
State = Tensor

# How close to the cheapest and to the dearest choice a gate may start, as shares of the range.
_LOWER_MARGIN = 0.01
_UPPER_MARGIN = 0.25
# Features that hardly vary are not blown up beyond this share of the mean deviation.
_LEAST_DEVIATION = 0.1


class GateDecision(NamedTuple):
    """What a gate says of one block.

    Attributes:
        bits: int32 (N,), the chosen widths.
        mask: float32 (N, len(choices)), one-hot of the choice; carries the straight-through
            gradient in training.
        logits: float64 (N, len(choices)).
        state: what the next gate is handed.
    """

    bits: Tensor
    mask: Tensor
    logits: Tensor
    state: State | None


def straight_through(logits: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
    """The hard choice (N,), and its one-hot mask with the gradient of the soft one.

    Args:
        temperature: None takes the argmax and the gradient of the softmax (the paper, section
            3.2); a number adds Gumbel noise and divides by it (Jang et al., ICLR 2017).
    """
    if temperature is None:
        soft = logits.softmax(-1)
        choice = cheapest_argmax(logits)
    else:
        uniform = replicas.rand(*logits.shape, dtype=logits.dtype, device=logits.device)
        uniform = uniform.clamp_min(torch.finfo(logits.dtype).tiny)
        noisy = (logits - torch.log(-torch.log(uniform))) / temperature
        soft = noisy.softmax(-1)
        choice = cheapest_argmax(noisy)
    hard = F.one_hot(choice, logits.shape[-1]).to(soft.dtype)
    return choice, hard - soft.detach() + soft


class Gate(nn.Module):
    """Base of the gates, which pick the width of every gated block for every sample.

    Gates compute in float64, so that decisions agree across backends; equal logits go to the
    cheapest choice. Evaluation, which has no temperature, is deterministic.

    Args:
        choices: at least two ascending widths.

    Attributes:
        widths: int32 (len(choices),).
        choice_bias: float64 (len(choices),), added to the logits: moves the cost of a trained gate
            without training it again.
        deviation: whether the features are every channel's mean and deviation, not the mean alone.
        common_gradient: while training, the share that is kept of the gradient that all images of a
            batch have in common; 1 is the plain gradient.
    """

    choice_bias: Tensor
    widths: Tensor
    deviation = False
    common_gradient = 1.0

    def __init__(self, choices: Sequence[int]) -> None:
        super().__init__()
        if len(choices) < 2 or list(choices) != sorted(set(choices)):
            raise ValueError(f"choices must be at least two ascending widths, got {choices}")
        self.choices = tuple(choices)
        self.register_buffer("choice_bias", torch.zeros(len(self.choices), dtype=torch.float64))
        self.register_buffer("widths", torch.tensor(self.choices, dtype=torch.int32))

    def forward(
        self,
        index: int,
        pooled: Tensor,
        state: State | None,
        temperature: float | None = None,
    ) -> GateDecision:
        """Decide one block.

        Args:
            index: which gated block, from 0.
            pooled: float64 (N, F), the features, see
                :func:`dfs.nn.stream.pooled_features`.
            state: the previous gate's, or None at the first.
            temperature: Gumbel temperature while training; None takes the argmax.
        """
        logits, state = self._score(index, pooled, state)
        logits = logits + self.choice_bias
        if self.common_gradient < 1 and logits.requires_grad:
            logits.register_hook(self._without_common)
        choice, mask = straight_through(logits, temperature)
        return GateDecision(self.widths[choice], mask.float(), logits, state)

    def _without_common(self, grad: Tensor) -> Tensor:
        """A gradient (N, choices) with the mean over the batch reduced.

        That mean only says which choice is better for every image. It is far larger than what
        differs between images, drives the gate into saturation, and then all images get the same.
        How much is spent altogether is the business of ``choice_bias``.
        """
        return grad - (1 - self.common_gradient) * replicas.batch_mean(grad)

    def _score(
        self, index: int, pooled: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Logits without the bias, float64 (N, len(choices)), and what the next gate is handed."""
        raise NotImplementedError

    def run(
        self, index: int, features: Tensor | PackedActivation, state: State | None
    ) -> GateDecision:
        """Decide one block as it is deployed: no gradient, no noise.

        Args:
            features: (N, C, H, W), what the blocks before it have left.
            state: the previous gate's, or None at the first.
        """
        with torch.no_grad():
            decision: GateDecision = self(index, pooled_features(features, self.deviation), state)
        return decision

    def macs(self, index: int) -> int:
        """Multiplications for one block's decision."""
        raise NotImplementedError

    def standardise(self, index: int, pooled: Tensor) -> None:
        """Fit one block's gate to the features (N, F) of many images, before it is trained."""
        raise NotImplementedError

    @torch.no_grad()
    def favour_cost(self, target: float, costs: Tensor) -> None:
        """Start with decisions whose expected cost is ``target``, the same for every input.

        A target near or beyond what the choices can cost is brought back inside: from a softmax
        that always takes one choice, nothing would be learned.

        Args:
            costs: (len(choices),), the mean cost of taking each choice everywhere.
        """
        low, high = float(costs.min()), float(costs.max())
        reach = high - low
        target = min(max(target, low + _LOWER_MARGIN * reach), high - _UPPER_MARGIN * reach)
        self._set_output_bias(-_tilt(costs, target) * costs)

    def _set_output_bias(self, bias: Tensor) -> None:
        """Make ``bias`` (len(choices),) what every block's logits start from."""
        raise NotImplementedError


def linear64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map of float32 parameters, in float64."""
    return F.linear(x, weight.double(), bias.double())


@torch.no_grad()
def fold_standardisation(linear: nn.Module, pooled: Tensor) -> None:
    """Fold the mean and deviation of features into the linear map that they enter.

    Channel means differ far more between channels than between images, so without this every
    image starts with the same logits, where nothing pulls their decisions apart.

    Args:
        pooled: float64 (N, F), the features of many images.
    """
    assert isinstance(linear, nn.Linear)
    mean, deviation = pooled.mean(0), pooled.std(0)
    deviation = deviation.clamp_min(float(deviation.mean()) * _LEAST_DEVIATION)
    weight = linear.weight.double() / deviation
    linear.weight.copy_(weight)
    linear.bias.sub_(weight @ mean)


def _tilt(costs: Tensor, target: float) -> float:
    """The beta for which softmax(-beta * costs) costs ``target`` on average."""
    costs = costs.double()
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if float((torch.softmax(-middle * costs, 0) * costs).sum()) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
