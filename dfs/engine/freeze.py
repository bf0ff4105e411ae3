"""From a trained network to what an engine runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfs.engine.graph import EngineGraph, GateNode
from dfs.models import DynamicResNet
from dfs.nn.block import ResidualBlock
from dfs.nn.folded import FoldedConv
from dfs.nn.gates import ConstantGate, FeedForwardGate, RNNGate
from dfs.nn.stream import StreamQuantizer
from dfs_kernels import PackedConvWeight
from dfs_kernels.widths import default_levels

_GATE_KINDS = {RNNGate: "rnn", FeedForwardGate: "feedforward", ConstantGate: "constant"}


def freeze_network(
    model: DynamicResNet, image_size: tuple[int, int]
) -> tuple[EngineGraph, dict[str, Tensor]]:
    """The graph of a trained network, and its tensors on the CPU.

    Raises:
        ValueError: naming what can't be frozen: widths or a quantizer that only simulate, a
            network in training mode, the paper's skipping.
    """
    if model.training:
        raise ValueError("model is in training mode; call model.eval() before freezing it")
    model.check_packable()
    if model.semantics.paper_skipping:
        raise ValueError("skipping='paper' only simulates in float and can't be frozen")
    widths = sorted({*model.choices, model.ungated_bits} - {0})
    graph = EngineGraph(
        model.architecture,
        (int(image_size[0]), int(image_size[1])),
        model.choices,
        model.ungated_bits,
        model.semantics.stream,
        _gate_node(model),
        tuple((bits, default_levels(bits)) for bits in widths),
    )
    tensors: dict[str, Tensor] = {}
    folded = {"stem": FoldedConv(model.stem, model.bn_stem)}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, ResidualBlock)
        for name, conv in block.folded().items():
            folded[f"blocks.{i}.{name}"] = conv
    for layer in graph.layers():
        if layer.name == "classifier":
            continue
        tensors.update(_layer_tensors(layer.name, folded[layer.name]))
    tensors.update(_classifier_tensors(model))
    for i, stream in enumerate(model.streams):
        assert isinstance(stream, StreamQuantizer)
        tensors[f"streams.{i}.scale"] = stream.scale().detach().reshape(1)
    tensors.update(_gate_tensors(model))
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    graph.check_tensors(own)
    return graph, own


def _layer_tensors(name: str, conv: FoldedConv) -> dict[str, Tensor]:
    weight = conv.weight
    floats = [b == 32 for b in weight.bit_options]
    parts = {
        "codes": weight.buffer,
        "weight_scale": weight.scales,
        # Nothing is quantized at 32 bits.
        "input_scale": _with_floats(conv.input_scale, floats, 1),
        "input_zero_point": _with_floats(conv.input_zero_point, floats, 0),
        "mul": conv.mul,
        "add": conv.add,
    }
    return {f"{name}.{part}": value for part, value in parts.items()}


def _with_floats(values: Tensor, floats: list[bool], fill: int) -> Tensor:
    """Per-width values with an entry for 32 bits, which comes last."""
    if not any(floats):
        return values
    return torch.cat([values, values.new_full((1,), fill)])


def _classifier_tensors(model: DynamicResNet) -> dict[str, Tensor]:
    conv, widths = model.classifier, (model.ungated_bits,)
    index = [conv.bit_options.index(b) for b in widths if b != 32]
    steps = conv.quantizer.weight_scale(conv.weight).detach()[index]
    packed = PackedConvWeight.from_float(conv.weight, steps, widths)
    floats = [b == 32 for b in widths]
    assert conv.bias is not None
    parts = {
        "codes": packed.buffer,
        "weight_scale": packed.scales,
        "input_scale": _with_floats(conv.quantizer.input_scale()[index], floats, 1),
        "input_zero_point": _with_floats(conv.quantizer.input_zero_point()[index], floats, 0),
        # No BatchNorm follows.
        "mul": torch.ones_like(packed.scales),
        "add": torch.zeros_like(packed.scales),
        "bias": conv.bias,
    }
    return {f"classifier.{part}": value for part, value in parts.items()}


def _gate_node(model: DynamicResNet) -> GateNode:
    gate = model.gate
    kind = _GATE_KINDS.get(type(gate))
    if kind is None:
        raise ValueError(f"a gate of type {type(gate).__name__} can't be frozen")
    return GateNode(kind, int(getattr(gate, "hidden", 0)), gate.deviation)


def _gate_tensors(model: DynamicResNet) -> dict[str, Tensor]:
    gate = model.gate
    tensors = {"gate.choice_bias": gate.choice_bias}
    for i in range(model.gated_blocks):
        if isinstance(gate, ConstantGate):
            tensors[f"gates.{i}.logits"] = gate.logits[i]
            continue
        assert isinstance(gate, (RNNGate, FeedForwardGate))
        maps = {"embed": gate.embed[i]}
        if isinstance(gate, FeedForwardGate):
            maps["proj"] = gate.proj[i]
        for name, linear in maps.items():
            assert isinstance(linear, nn.Linear)
            tensors[f"gates.{i}.{name}_weight"] = linear.weight
            tensors[f"gates.{i}.{name}_bias"] = linear.bias
    if isinstance(gate, RNNGate):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            tensors[f"gate.{name}"] = getattr(gate.cell, name)
        tensors["gate.proj_weight"] = gate.proj.weight
        tensors["gate.proj_bias"] = gate.proj.bias
    return tensors
