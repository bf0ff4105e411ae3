"""The block as one op against the network in evaluation, which runs it step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dfs.models import DynamicResNet
from dfs.models.architecture import Architecture
from dfs.nn.block import ResidualBlock
from dfs.nn.folded import FoldedConv
from dfs.nn.gates import RNNGate
from dfs_kernels import BlockConv, PackedActivation, RNNGateWeights, gated_block, use_backend
from tests.framework.helpers import small_basic, small_bottlenecks


def as_block_conv(folded: FoldedConv) -> BlockConv:
    return BlockConv.create(
        folded.weight,
        folded.input_scale,
        folded.input_zero_point,
        mul=folded.mul,
        add=folded.add,
        bias=folded.bias,
        stride=folded.stride,
        padding=folded.padding,
        dilation=folded.dilation,
        groups=folded.groups,
    )


def block_arguments(block: ResidualBlock, bits: Tensor) -> dict[str, Any]:
    folded = {name: as_block_conv(conv) for name, conv in block.folded().items()}
    shortcut = folded.pop("shortcut", None)
    arguments: dict[str, Any] = {"branch": list(folded.values()), "shortcut": shortcut}
    if shortcut is not None:
        arguments["shortcut_bits"] = block.shortcut_bits(bits)
        arguments["rectifies_skipped"] = not block.semantics.paper_skipping
        arguments.update(block.stream.output_arguments())
    return arguments


def gate_arguments(gate: RNNGate, index: int) -> dict[str, Any]:
    embed, cell, proj = gate.embed[index], gate.cell, gate.proj
    tensors = (
        embed.weight, embed.bias, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh,
        proj.weight, proj.bias, gate.choice_bias,
    )  # fmt: skip
    return {"gate": RNNGateWeights(*tensors), "choices": gate.choices}  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (small_basic(), {}),
        (small_bottlenecks(), {}),
        (small_basic(), {"stream": "float32"}),
        (small_basic(), {"stream": "float32", "skipping": "paper", "choices": (0, 2, 8)}),
    ],
    ids=["basic", "bottlenecks", "float stream", "paper skipping"],
)
def test_every_block_of_a_network_gives_the_same_bits(
    architecture: Architecture, options: dict[str, Any], backend: str
) -> None:
    model = DynamicResNet(architecture, **options).eval()
    assert isinstance(model.gate, RNNGate)
    # One backend for both: a shortcut at 32 bits has sums of its own on each.
    with torch.no_grad(), use_backend(backend):
        for parameter in model.gate.parameters():
            parameter.mul_(3)  # so that decisions differ
        stream = model.start(torch.randn(6, 3, 33, 32))
        decision = model.decide(0, stream, None)
        for index in range(model.gated_blocks):
            block = model.blocks[index + 1]
            assert isinstance(block, ResidualBlock)
            bits = torch.tensor((0, *model.choices, 0, 8)[:6], dtype=torch.int32)
            given = stream.clone()
            expected = model.step(index, stream, decision._replace(bits=bits))
            last = index + 1 == model.gated_blocks
            gate = {} if last else gate_arguments(model.gate, index + 1)
            found = gated_block(
                given, bits, **block_arguments(block, bits), **gate, state=decision.state
            )  # fmt: skip
            assert torch.equal(values(found.stream), values(expected))
            stream = expected
            if found.step is None:
                break
            decision = model.decide(index + 1, stream, decision.state)
            assert torch.equal(found.step.bits, decision.bits)
            torch.testing.assert_close(found.step.state, decision.state, rtol=1e-11, atol=1e-12)


def values(stream: Tensor | PackedActivation) -> Tensor:
    return stream.data if isinstance(stream, PackedActivation) else stream.view(torch.int32)
