"""A whole residual block: two convolutions at the chosen width, and the gate of the next block."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.device import machine
from bench.gpu.ours import bind, stream_input
from bench.gpu.prepared import GpuPrepared
from bench.layers import Layer, layer_weights
from bench.ours import (
    assert_same,
    output_steps,
    output_zero_points,
    repeated_bits,
    steps,
    zero_points,
)
from bench.prepared import Prepared
from dfs_kernels import BlockConv, PackedActivation, RNNGateWeights
from dfs_kernels import gated_block as gated_block_op

_CHOICES = (0, 2, 4, 8)
_HIDDEN = 10


def gated_block(layer: Layer, batch: int, implementation: str) -> GpuPrepared:
    """The 8-bit stream read and updated in place at 8 bits, then pooled by a recurrent gate."""
    device = machine().device
    stream = stream_input(layer, batch)
    bits = repeated_bits((8,), batch, device)
    weight = layer_weights(layer, device).packed
    # What the first convolution packs, the second one reads.
    quantizers = (
        (steps(layer, device), zero_points(layer, device)),
        (output_steps(device), output_zero_points(device)),
    )
    branch = [BlockConv.create(weight, *own, padding=layer.padding) for own in quantizers]
    weights = _gate_weights(layer.out_channels, device)
    state = torch.zeros(2, batch, _HIDDEN, dtype=torch.float64, device=device)

    def run(stream: PackedActivation, backend: str | None = None) -> Any:
        _, step = gated_block_op(
            stream, bits, branch, gate=weights, choices=_CHOICES, state=state, backend=backend
        )
        return step

    bound = bind(run, implementation)

    def check() -> None:
        streams = stream.clone(), stream.clone()
        got, expected = bound(streams[0]), run(streams[1], backend="reference")
        assert_same(*streams)
        assert torch.equal(got.bits, expected.bits)
        torch.testing.assert_close(got.logits, expected.logits)

    return GpuPrepared(Prepared(lambda: bound(stream), check))


def _gate_weights(channels: int, device: torch.device) -> RNNGateWeights:
    shapes = {
        "embed_weight": (_HIDDEN, channels),
        "embed_bias": (_HIDDEN,),
        "weight_ih": (4 * _HIDDEN, _HIDDEN),
        "weight_hh": (4 * _HIDDEN, _HIDDEN),
        "bias_ih": (4 * _HIDDEN,),
        "bias_hh": (4 * _HIDDEN,),
        "proj_weight": (len(_CHOICES), _HIDDEN),
        "proj_bias": (len(_CHOICES),),
    }
    generator = torch.Generator(device).manual_seed(13)
    values = {
        name: 0.3 * torch.randn(shape, generator=generator, device=device)
        for name, shape in shapes.items()
    }
    no_bias = torch.zeros(len(_CHOICES), dtype=torch.float64, device=device)
    return RNNGateWeights(**values, choice_bias=no_bias)
