"""A frozen network on a CPU: the executor of csrc/engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs.engine.graph import EngineGraph, LayerNode
from dfs_kernels.geometry import ConvGeometry

try:
    import dfs_kernels._cpu as _cpu
except ImportError:  # dfs_kernels.backends.cpu says why
    _cpu = None


class EngineRun(NamedTuple):
    """What an executor gives.

    Attributes:
        logits: float32 (N, classes).
        bits: int32 (N, gated blocks).
        cost: float64 (N,), the mean over gated blocks of (bits/32)^2.
        block_times, gate_times: nanoseconds, (blocks + 2,) with the stem first and the classifier
            last, and (gated blocks,); None unless asked for.
    """

    logits: Tensor
    bits: Tensor
    cost: Tensor
    block_times: Tensor | None = None
    gate_times: Tensor | None = None


class NativeExecutor:
    """Compiled code for one graph, with its own copy of the weights, re-tiled for this machine.

    Args:
        pixel_values: float32 (C, 256), what uint8 pixels stand for, or None to take none.
    """

    device = torch.device("cpu")

    def __init__(
        self, graph: EngineGraph, tensors: dict[str, Tensor], pixel_values: Tensor | None = None
    ) -> None:
        if _cpu is None:
            raise RuntimeError("the compiled module dfs_kernels._cpu is missing")
        self._classes = graph.architecture.num_classes
        self._blocks = len(graph.architecture.blocks)
        self._gates = graph.gated_blocks
        self._engine = _cpu.Engine(_network_spec(graph, tensors, pixel_values))

    def weight_bytes(self) -> int:
        """Of all weights as they are held for running."""
        size: int = self._engine.weight_bytes()
        return size

    def run(
        self,
        images: Tensor,
        policy: Tensor | None,
        choice_bias: Tensor | None,
        timed: bool = False,
        threads: int | None = None,
    ) -> EngineRun:
        """Classify images.

        Args:
            images: float32 or uint8 (N, C, H, W) of any strides.
            policy: int32 (N, gated blocks), or None for the gates' decisions.
            choice_bias: float64 (choices,), or None for the network's own.
            timed: measure blocks and gates; on one thread.
        """
        gates = self._gates
        batch, channels, height, width = images.shape
        logits = torch.empty(batch, self._classes)
        bits = torch.empty(batch, gates, dtype=torch.int32)
        cost = torch.empty(batch, dtype=torch.float64)
        times = gate_times = None
        if timed:
            times = torch.zeros(self._blocks + 2, dtype=torch.float64)
            gate_times = torch.zeros(gates, dtype=torch.float64)
        count = torch.get_num_threads() if threads is None else threads
        values, pixels = images.data_ptr(), 0
        if images.dtype == torch.uint8:
            values, pixels = pixels, values
        self._engine.run(
            _cpu.FeatureMap.of_values(values, channels, height, width, images.stride()),
            pixels,
            batch,
            _address(policy),
            _address(choice_bias),
            logits.data_ptr(),
            bits.data_ptr(),
            cost.data_ptr(),
            _address(times),
            _address(gate_times),
            1 if timed else count,
        )
        return EngineRun(logits, bits, cost, times, gate_times)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _network_spec(
    graph: EngineGraph, tensors: dict[str, Tensor], pixel_values: Tensor | None
) -> Any:
    """The graph for the compiled module, which copies what the addresses lead to."""

    def layer(node: LayerNode) -> Any:
        codes = tensors[f"{node.name}.codes"]
        start, offsets = codes.data_ptr(), node.layout.offsets()
        bias = tensors.get(f"{node.name}.bias")
        native = _cpu.ConvGeometry(**geometry_of(node).fields())
        return _cpu.LayerSpec(
            native,
            node.widths,
            [start + offset for offset in offsets[:-1]],
            [kind == "centred" for kind in node.levels],
            *(
                tensors[f"{node.name}.{part}"].data_ptr()
                for part in ("weight_scale", "input_scale", "input_zero_point")
            ),
            _address(bias),
            tensors[f"{node.name}.mul"].data_ptr(),
            tensors[f"{node.name}.add"].data_ptr(),
        )

    def stream(index: int) -> Any:
        return _cpu.StreamSpec(graph.stream == "uint8", float(tensors[f"streams.{index}.scale"]))

    shape = graph.architecture
    spec = _cpu.NetworkSpec()
    spec.in_channels = shape.in_channels
    spec.height, spec.width = graph.image_size
    spec.pixel_values = _address(pixel_values)
    spec.stem, spec.stem_stream = layer(graph.stem), stream(0)
    if shape.pool is not None:
        spec.pool_size, spec.pool_stride = shape.pool.kernel, shape.pool.stride
        spec.pool_padding = shape.pool.padding
    blocks = []
    for i, index in enumerate(shape.streams):
        branch, shortcut = graph.block_layers(i)
        shortcuts = [] if shortcut is None else [layer(shortcut)]
        fixed = -1 if i else graph.ungated_bits
        blocks.append(
            _cpu.BlockSpec([layer(node) for node in branch], shortcuts, stream(index), fixed)
        )
    spec.blocks = blocks
    spec.classifier = layer(graph.classifier)
    spec.choices, spec.hidden = graph.choices, graph.gate.hidden
    spec.gates = [_gate_spec(graph, tensors, i) for i in range(graph.gated_blocks)]
    spec.choice_bias = tensors["gate.choice_bias"].data_ptr()
    if graph.gate.kind == "rnn":
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "proj_weight", "proj_bias"):
            setattr(spec, name, tensors[f"gate.{name}"].data_ptr())
    return spec


def _gate_spec(graph: EngineGraph, tensors: dict[str, Tensor], index: int) -> Any:
    parts = [
        _address(tensors.get(f"gates.{index}.{name}"))
        for name in ("embed_weight", "embed_bias", "proj_weight", "proj_bias")
    ]
    if graph.gate.kind == "constant":
        parts[3] = tensors[f"gates.{index}.logits"].data_ptr()
    return _cpu.GateSpec(graph.gate.kind, graph.gate.deviation, *parts)


def geometry_of(node: LayerNode) -> ConvGeometry:
    s = node.shape
    return ConvGeometry.create(
        s.in_channels, node.weight_shape, s.stride, s.padding, s.dilation, s.groups
    )
