"""One step of a recurrent gate: what decides the width of every sample for the next block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dfs_kernels.packing import PackedActivation


class RNNGateWeights(NamedTuple):
    """The parameters of one gate; C are the channels it sees, H its hidden units, K its choices.

    Attributes:
        embed_weight, embed_bias: float32 (H, C) and (H,), of the block's own linear map.
        weight_ih, weight_hh: float32 (4H, H), of an LSTM cell, in the order of
            :class:`torch.nn.LSTMCell`: input, forget, cell, output.
        bias_ih, bias_hh: float32 (4H,).
        proj_weight, proj_bias: float32 (K, H) and (K,).
        choice_bias: float64 (K,), added to the logits.
    """

    embed_weight: Tensor
    embed_bias: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    choice_bias: Tensor

    @property
    def hidden(self) -> int:
        return int(self.embed_weight.shape[0])

    def shapes(self, channels: int, choices: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that the tensors must have, in their order."""
        hidden = self.hidden
        return (
            (hidden, channels),
            (hidden,),
            (4 * hidden, hidden),
            (4 * hidden, hidden),
            (4 * hidden,),
            (4 * hidden,),
            (choices, hidden),
            (choices,),
            (choices,),
        )

    def check(self, channels: int, choices: int, device: torch.device) -> None:
        """Refuse tensors of another shape, type or place.

        Raises:
            TypeError, ValueError: naming the tensor.
        """
        for name, value in zip(self._fields, self, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"weights.{name} must be a tensor, got {type(value).__name__}")
        if self.embed_weight.dim() != 2 or self.hidden == 0:
            raise ValueError(
                f"weights.embed_weight must be (hidden, {channels}), "
                f"got {tuple(self.embed_weight.shape)}"
            )
        shapes = self.shapes(channels, choices)
        for name, value, shape in zip(self._fields, self, shapes, strict=True):
            dtype = torch.float64 if name == "choice_bias" else torch.float32
            if value.dtype != dtype:
                raise TypeError(f"weights.{name} must be {dtype}, got {value.dtype}")
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"weights.{name} must have shape {shape}, got {tuple(value.shape)}"
                )
            if value.device != device:
                raise ValueError(f"weights.{name} is on {value.device}, but the input on {device}")


class GateStep(NamedTuple):
    """What a gate says of a batch.

    Attributes:
        bits: int32 (N,), the chosen widths.
        logits: float64 (N, K).
        state: float64 (2, N, H), the LSTM's output and memory, for the next gate.
    """

    bits: Tensor
    logits: Tensor
    state: Tensor

    @staticmethod
    def empty(like: Tensor, batch: int, choices: int, hidden: int) -> GateStep:
        """Results to be written, where ``like`` is."""
        return GateStep(
            like.new_empty(batch, dtype=torch.int32),
            like.new_empty((batch, choices), dtype=torch.float64),
            like.new_empty((2, batch, hidden), dtype=torch.float64),
        )


@dataclass(frozen=True, eq=False)
class GateCall:
    """Arguments of a gate.

    Attributes:
        input: the features, float32 (N, C, H, W) or packed.
        choices: ascending widths, K of them.
        state: the previous gate's, or None at the first.
    """

    input: Tensor | PackedActivation
    weights: RNNGateWeights
    choices: tuple[int, ...]
    state: Tensor | None = None


def check_choices(choices: Sequence[int]) -> tuple[int, ...]:
    """``choices`` as a tuple, checked to be ascending widths from 0 to 32."""
    values = tuple(choices)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"choices must hold ints, got {value!r}")
        if not 0 <= value <= 32:
            raise ValueError(f"choices must be widths from 0 to 32, got {values}")
    if not values or list(values) != sorted(set(values)):
        raise ValueError(f"choices must be ascending widths without repeats, got {values}")
    return values
