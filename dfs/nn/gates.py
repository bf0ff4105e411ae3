"""Gates: what looks at the features so far and picks the next block's bitwidth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfs.nn.gate import (
    Gate,
    GateDecision,
    State,
    fold_standardisation,
    linear64,
)
from dfs_kernels import PackedActivation, RNNGateWeights, rnn_gate


class RNNGate(Gate):
    """The paper's gate: one LSTM shared by all blocks.

    Global average pool, a linear map (a 1x1 convolution) of the block's own to ``hidden``, one
    LSTM step, and a linear map to the choices. The gate after block i decides block i + 1. Computes
    in float64, so that decisions agree across backends; equal logits go to the cheapest choice.
    Source: Shen et al., AAAI 2020, section 3.2, after SkipNet (Wang et al., ECCV 2018).

    Args:
        in_channels: per gated block, the channels of the features that its gate sees.
        choices: ascending widths.
    """

    def __init__(
        self, in_channels: Sequence[int], choices: Sequence[int], hidden: int = 10
    ) -> None:
        super().__init__(choices)
        self.hidden = hidden
        self.embed = nn.ModuleList(nn.Linear(channels, hidden) for channels in in_channels)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.proj = nn.Linear(hidden, len(self.choices))

    def macs(self, index: int) -> int:
        embed = self.embed[index]
        assert isinstance(embed, nn.Linear)
        cell = 4 * self.hidden * 2 * self.hidden
        return embed.in_features * self.hidden + cell + self.hidden * len(self.choices)

    def run(
        self, index: int, features: Tensor | PackedActivation, state: State | None
    ) -> GateDecision:
        """:meth:`Gate.run`, in one kernel."""
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

    def _score(
        self, index: int, pooled: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        if state is None:
            state = pooled.new_zeros(2, pooled.shape[0], self.hidden)
        embed = self.embed[index]
        assert isinstance(embed, nn.Linear)
        x = linear64(pooled, embed.weight, embed.bias)
        mixed = linear64(x, self.cell.weight_ih, self.cell.bias_ih)
        mixed = mixed + linear64(state[0], self.cell.weight_hh, self.cell.bias_hh)
        enter, forget, update, leave = mixed.chunk(4, -1)
        memory = forget.sigmoid() * state[1] + enter.sigmoid() * update.tanh()
        output = leave.sigmoid() * memory.tanh()
        logits = linear64(output, self.proj.weight, self.proj.bias)
        return logits, torch.stack((output, memory))

    def standardise(self, index: int, pooled: Tensor) -> None:
        fold_standardisation(self.embed[index], pooled)

    def _set_output_bias(self, bias: Tensor) -> None:
        self.proj.bias.copy_(bias)


class FeedForwardGate(Gate):
    """A small network of its own for every block: one hidden layer with a ReLU.

    After SkipNet's feed-forward gates (Wang et al., ECCV 2018, section 3.1), on pooled features
    instead of convolutions.

    Args:
        in_channels: per gated block, the channels of the features that its gate sees.
        choices: ascending widths.
        deviation: see every channel's deviation beside its mean.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        choices: Sequence[int],
        hidden: int = 16,
        deviation: bool = False,
    ) -> None:
        super().__init__(choices)
        self.hidden = hidden
        self.deviation = deviation
        features = [channels * (2 if deviation else 1) for channels in in_channels]
        self.embed = nn.ModuleList(nn.Linear(count, hidden) for count in features)
        self.proj = nn.ModuleList(nn.Linear(hidden, len(self.choices)) for _ in features)

    def macs(self, index: int) -> int:
        embed = self.embed[index]
        assert isinstance(embed, nn.Linear)
        return embed.in_features * self.hidden + self.hidden * len(self.choices)

    def _score(
        self, index: int, pooled: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        embed, proj = self.embed[index], self.proj[index]
        assert isinstance(embed, nn.Linear)
        assert isinstance(proj, nn.Linear)
        hidden = torch.relu(linear64(pooled, embed.weight, embed.bias))
        return linear64(hidden, proj.weight, proj.bias), None

    def standardise(self, index: int, pooled: Tensor) -> None:
        fold_standardisation(self.embed[index], pooled)

    def _set_output_bias(self, bias: Tensor) -> None:
        for proj in self.proj:
            assert isinstance(proj, nn.Linear)
            proj.bias.copy_(bias)


class ConstantGate(Gate):
    """Learned logits for every block, the same for every input.

    The rival of the gates that look: what they gain over it is what the inputs are worth.

    Args:
        in_channels: one entry per gated block.
        choices: ascending widths.
    """

    def __init__(self, in_channels: Sequence[int], choices: Sequence[int]) -> None:
        super().__init__(choices)
        self.logits = nn.Parameter(torch.zeros(len(in_channels), len(self.choices)))

    def macs(self, index: int) -> int:
        return 0

    def _score(
        self, index: int, pooled: Tensor, state: State | None
    ) -> tuple[Tensor, State | None]:
        return self.logits[index].double().expand(pooled.shape[0], -1), None

    def standardise(self, index: int, pooled: Tensor) -> None:
        """Nothing: the features are not looked at."""

    def _set_output_bias(self, bias: Tensor) -> None:
        self.logits.copy_(bias.expand_as(self.logits))


GATES: dict[str, Callable[..., Gate]] = {
    "rnn": RNNGate,
    "feedforward": FeedForwardGate,
    "constant": ConstantGate,
}


def make_gate(
    kind: str, in_channels: Sequence[int], choices: Sequence[int], **options: Any
) -> Gate:
    """A gate by name: "rnn", "feedforward" or "constant".

    Args:
        in_channels: per gated block, the channels of the features that its gate sees.
        options: ``hidden``, and ``deviation`` of the feed-forward gate.
    """
    if kind not in GATES:
        raise ValueError(f"gate must be one of {tuple(GATES)}, got {kind!r}")
    return GATES[kind](in_channels, choices, **options)
