"""Gates: what looks at the features so far and picks the next block's bitwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfs_kernels import PackedActivation, RNNGateWeights, rnn_gate
from dfs_kernels.reference import cheapest_argmax

# The output and the memory of the LSTM so far: float64 (2, N, hidden).
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
        uniform = torch.rand_like(logits).clamp_min(torch.finfo(logits.dtype).tiny)
        noisy = (logits - torch.log(-torch.log(uniform))) / temperature
        soft = noisy.softmax(-1)
        choice = cheapest_argmax(noisy)
    hard = F.one_hot(choice, logits.shape[-1]).to(soft.dtype)
    return choice, hard - soft.detach() + soft


class RNNGate(nn.Module):
    """The paper's gate: one LSTM shared by all blocks.

    Global average pool, a linear map (a 1x1 convolution) of the block's own to ``hidden``, one
    LSTM step, and a linear map to the choices. The gate after block i decides block i + 1. Computes
    in float64, so that decisions agree across backends; equal logits go to the cheapest choice.
    Source: Shen et al., AAAI 2020, section 3.2, after SkipNet (Wang et al., ECCV 2018).

    Args:
        in_channels: per gated block, the channels of the features that its gate sees.
        choices: ascending widths.
    """

    choice_bias: Tensor
    widths: Tensor

    def __init__(
        self, in_channels: Sequence[int], choices: Sequence[int], hidden: int = 10
    ) -> None:
        super().__init__()
        if len(choices) < 2 or list(choices) != sorted(set(choices)):
            raise ValueError(f"choices must be at least two ascending widths, got {choices}")
        self.choices = tuple(choices)
        self.hidden = hidden
        self.embed = nn.ModuleList(nn.Linear(channels, hidden) for channels in in_channels)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.proj = nn.Linear(hidden, len(self.choices))
        # Added to the logits: moves the cost of a trained gate without training it again.
        self.register_buffer("choice_bias", torch.zeros(len(self.choices), dtype=torch.float64))
        self.register_buffer("widths", torch.tensor(self.choices, dtype=torch.int32))

    def macs(self, index: int) -> int:
        """Multiplications for one block's decision."""
        embed = self.embed[index]
        assert isinstance(embed, nn.Linear)
        cell = 4 * self.hidden * 2 * self.hidden
        return embed.in_features * self.hidden + cell + self.hidden * len(self.choices)

    def run(
        self, index: int, features: Tensor | PackedActivation, state: State | None
    ) -> GateDecision:
        """Decide one block as it is deployed, in one kernel: no gradient, no noise.

        Args:
            features: (N, C, H, W), what the blocks before it have left.
            state: the previous gate's, or None at the first.
        """
        embed = self.embed[index]
        assert isinstance(embed, nn.Linear)
        weights = RNNGateWeights(
            embed.weight,
            embed.bias,
            self.cell.weight_ih,
            self.cell.weight_hh,
            self.cell.bias_ih,
            self.cell.bias_hh,
            self.proj.weight,
            self.proj.bias,
            self.choice_bias,
        )
        step = rnn_gate(features, weights, self.choices, state)
        mask = (step.bits[:, None] == self.widths).float()
        return GateDecision(step.bits, mask, step.logits, step.state)

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
            pooled: float64 (N, C), the channel means of the features.
            state: the previous gate's, or None at the first.
            temperature: Gumbel temperature while training; None takes the argmax.
        """
        if state is None:
            state = pooled.new_zeros(2, pooled.shape[0], self.hidden)
        embed = self.embed[index]
        assert isinstance(embed, nn.Linear)
        x = _linear64(pooled, embed.weight, embed.bias)
        mixed = _linear64(x, self.cell.weight_ih, self.cell.bias_ih)
        mixed = mixed + _linear64(state[0], self.cell.weight_hh, self.cell.bias_hh)
        enter, forget, update, leave = mixed.chunk(4, -1)
        memory = forget.sigmoid() * state[1] + enter.sigmoid() * update.tanh()
        output = leave.sigmoid() * memory.tanh()
        logits = _linear64(output, self.proj.weight, self.proj.bias) + self.choice_bias
        choice, mask = straight_through(logits, temperature)
        state = torch.stack((output, memory))
        return GateDecision(self.widths[choice], mask.float(), logits, state)

    @torch.no_grad()
    def standardise(self, index: int, pooled: Tensor) -> None:
        """Fold the mean and deviation of one gate's features into its linear map.

        Channel means differ far more between channels than between images, so without this every
        image starts with the same logits, where nothing pulls their decisions apart.

        Args:
            pooled: float64 (N, C), the features of many images.
        """
        embed = self.embed[index]
        assert isinstance(embed, nn.Linear)
        mean, deviation = pooled.mean(0), pooled.std(0)
        deviation = deviation.clamp_min(float(deviation.mean()) * _LEAST_DEVIATION)
        weight = embed.weight.double() / deviation
        embed.weight.copy_(weight)
        embed.bias.sub_(weight @ mean)

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
        self.proj.bias.copy_(-_tilt(costs, target) * costs)


def _linear64(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.double(), bias.double())


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
