"""Random recurrent gates, and features for them."""

from __future__ import annotations

import torch
from torch import Tensor

from dfs_kernels import GateStep, PackedActivation, RNNGateWeights, quantize_pack

CHOICES = (0, 2, 4, 8)
# Sums in another order, and another exponential.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}


def gate_weights(channels: int, choices: int = 4, hidden: int = 10) -> RNNGateWeights:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape) / shape[-1] ** 0.5

    return RNNGateWeights(
        draw(hidden, channels),
        draw(hidden),
        draw(4 * hidden, hidden),
        draw(4 * hidden, hidden),
        draw(4 * hidden),
        draw(4 * hidden),
        draw(choices, hidden) * 3,
        draw(choices),
        torch.randn(choices, dtype=torch.float64) / 10,
    )


def packed_features(
    batch: int, channels: int, height: int, width: int, options: tuple[int, ...] = (8,)
) -> PackedActivation:
    """Every option and 0 in turn, or all samples at the only option."""
    offered = options if len(options) == 1 else (0, *options)
    bits = torch.tensor([offered[n % len(offered)] for n in range(batch)], dtype=torch.int32)
    scale = {b: 0.013 * 2 ** (8 - b) if b != 32 else 1.0 for b in options}
    zeros = {b: 1 if b != 32 else 0 for b in options}
    x = torch.rand(batch, channels, height, width) * 3
    # The reference's rows, for 0 bits leave theirs as they are.
    packed = quantize_pack(x, bits, scale, zeros, bit_options=options, backend="reference")
    packed.data[bits == 0] = 0xA5
    return packed


def assert_same_step(got: GateStep, expected: GateStep) -> None:
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(got.state, expected.state, **TOLERANCE)
    if expected.logits.shape[-1] > 1:
        best = expected.logits.topk(2).values
        # Decisions can only be told apart where the logits are.
        assert float((best[:, 0] - best[:, 1]).abs().min()) > 1e-9
    assert torch.equal(got.bits, expected.bits)
