"""A frozen network run by the library's ops, on whatever device its tensors are.

On a GPU nothing waits for the host, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs.engine.graph import EngineGraph, LayerNode
from dfs.nn.gate import linear64
from dfs.nn.stream import STREAM_BITS, max_pool_codes, pooled_features, pooled_mean
from dfs_kernels import (
    BlockConv,
    BlockOutput,
    PackedActivation,
    PackedConvWeight,
    RNNGateWeights,
    gated_block,
    mixed_conv2d,
    rnn_gate,
)
from dfs_kernels.reference import cheapest_argmax

Stream = Tensor | PackedActivation
Lap = Callable[[], None]


class NetworkOutput(NamedTuple):
    """What a network says of a batch.

    Attributes:
        logits: float32 (N, classes).
        bits: int32 (N, gated blocks).
        cost: float64 (N,).
    """

    logits: Tensor
    bits: Tensor
    cost: Tensor


@dataclass(frozen=True, eq=False)
class _Block:
    """Arguments of :func:`dfs_kernels.gated_block` that stay.

    Attributes:
        output: of the stream that a block with a shortcut writes.
    """

    branch: list[BlockConv]
    shortcut: BlockConv | None
    output: dict[str, Any]


class OpNetwork:
    """A graph with its own copy of the tensors, in the forms that the ops take.

    Args:
        pixel_values: float32 (C, 256), what each pixel level stands for, or None.
    """

    def __init__(
        self,
        graph: EngineGraph,
        tensors: dict[str, Tensor],
        pixel_values: Tensor | None,
        device: torch.device,
    ) -> None:
        self._graph = graph
        self._tensors = {name: value.to(device) for name, value in tensors.items()}
        self._stem = self._conv(graph.stem)
        self._classifier = self._conv(graph.classifier)
        self._blocks = [self._block(i) for i in range(len(graph.architecture.blocks))]
        # Not the tensor itself: set_choice_bias() writes here, where graphs read.
        self._choice_bias = tensors["gate.choice_bias"].to(device, copy=True)
        self._choices = torch.tensor(graph.choices, dtype=torch.int32, device=device)
        recurrent = graph.gated_blocks if graph.gate.kind == "rnn" else 0
        self._rnn_gates = [self._rnn_weights(i) for i in range(recurrent)]
        # A tensor, since dividing by a number multiplies by its rounded reciprocal on a GPU.
        largest = graph.gated_blocks * 32.0**2
        self._largest_cost = torch.tensor(largest, dtype=torch.float64, device=device)
        self._pixel_values = self._pixel_places = None
        if pixel_values is not None:
            self._pixel_values = pixel_values.to(device).flatten()
            places = 256 * torch.arange(len(pixel_values), dtype=torch.int32, device=device)
            self._pixel_places = places.view(-1, 1, 1)

    def weight_bytes(self) -> int:
        """Of all weights as they are held: packed, and re-tiled for the backends used so far."""
        convs = [self._stem, self._classifier]
        for block in self._blocks:
            convs += [*block.branch, *([] if block.shortcut is None else [block.shortcut])]
        held = [conv.weight for conv in convs]
        tiles = [tile.nbytes for weight in held for tile in weight.derived.tiles.values()]
        return sum(weight.nbytes for weight in held) + sum(tiles)

    def set_choice_bias(self, bias: Tensor | None) -> None:
        """Have the gates add this float64 (choices,) from now on; None for the network's own."""
        chosen = self._tensors["gate.choice_bias"] if bias is None else bias
        self._choice_bias.copy_(chosen, non_blocking=True)

    def run(
        self,
        images: Tensor,
        policy: Tensor | None = None,
        count: Tensor | None = None,
        lap: Lap | None = None,
    ) -> NetworkOutput:
        """Classify images.

        A sample with a value that is not finite, or whose policy is not among the choices, gets
        logits of NaN and decisions of 0.

        Args:
            images: float32 (N, C, H, W), or uint8 where pixels have values.
            policy: int32 (gated blocks, N), or None for the gates' decisions.
            count: int64 (), how many samples count; the others are skipped. None: all of them.
            lap: called after the stem, after every block and every gate in turn, and after the
                classifier. A gate is then no part of the block before it.
        """
        images, policy, live = self._prepare(images, policy, count)
        base = live.to(torch.int32) * self._graph.ungated_bits
        stream = self._run_stem(images, base)
        _call(lap)
        # Samples that don't count would decide like others. Those that are not finite go on as
        # zeros: too few to be worth a kernel after every gate.
        mask = live if count is not None and policy is None else None
        fuses = policy is None and lap is None
        bits, state, decided = base, None, []
        for index, block in enumerate(self._blocks):
            is_last = index == self._graph.gated_blocks
            gate = self._rnn_gates[index] if self._rnn_gates and fuses and not is_last else None
            found = self._run_block(block, stream, bits, base, gate, state)
            stream = found.stream
            _call(lap)
            if is_last:
                break
            if policy is not None:
                bits = policy[index]
            elif found.step is not None:
                bits, state = found.step.bits, found.step.state
            else:
                bits, state = self._decide(index, stream, state)
            if mask is not None:
                bits = bits * mask
            decided.append(bits)
            _call(lap)
        logits = self._classify(stream, base)
        _call(lap)
        return self._output(logits, decided, live)

    def _prepare(
        self, images: Tensor, policy: Tensor | None, count: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images in float, the policy of the samples that are to be run, and which are: (N,)."""
        batch, device = images.shape[0], images.device
        if images.dtype == torch.uint8:
            images = self._look_up(images)
            live = torch.ones(batch, dtype=torch.bool, device=device)
        else:
            # One pass, and NaN where there is one.
            largest = torch.linalg.vector_norm(images.flatten(1), torch.inf, 1)
            live = largest < torch.inf
        if count is not None:
            live &= torch.arange(batch, device=device) < count
        if policy is None:
            return images, None, live
        known = (policy[..., None] == self._choices).any(-1)
        live &= known.all(0)
        return images, policy * live, live

    def _look_up(self, pixels: Tensor) -> Tensor:
        assert self._pixel_values is not None
        assert self._pixel_places is not None
        # Neither a division nor a product: a GPU would round some of them differently.
        places = (pixels.to(torch.int32) + self._pixel_places).flatten()
        return self._pixel_values.index_select(0, places).view(pixels.shape)

    def _run_stem(self, images: Tensor, bits: Tensor) -> Stream:
        """Stem, ReLU and max pool."""
        pool = self._graph.architecture.pool
        written = _convolve(
            self._stem, self._graph.stem, images, bits, activation="relu", **self._stored_as(0)
        )
        if pool is None:
            return written
        if isinstance(written, Tensor):
            return F.max_pool2d(written, pool.kernel, pool.stride, pool.padding)
        return max_pool_codes(written, pool)

    def _run_block(
        self,
        block: _Block,
        stream: Stream,
        bits: Tensor,
        ungated: Tensor,
        gate: RNNGateWeights | None,
        state: Tensor | None,
    ) -> BlockOutput:
        around = {} if block.shortcut is None else {"shortcut_bits": ungated, **block.output}
        choices = () if gate is None else self._graph.choices
        return gated_block(
            stream,
            bits,
            block.branch,
            block.shortcut,
            gate=gate,
            choices=choices,
            state=state,
            **around,
        )

    def _decide(
        self, index: int, stream: Stream, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The widths that gate ``index`` chooses, and what the next one is handed."""
        if self._rnn_gates:
            step = rnn_gate(stream, self._rnn_gates[index], self._graph.choices, state)
            return step.bits, step.state
        own = _named(self._tensors, f"gates.{index}")
        if self._graph.gate.kind == "constant":
            logits = own["logits"].double().expand(stream.shape[0], -1)
        else:
            features = pooled_features(stream, self._graph.gate.deviation)
            hidden = torch.relu(linear64(features, own["embed_weight"], own["embed_bias"]))
            logits = linear64(hidden, own["proj_weight"], own["proj_bias"])
        return self._choices[cheapest_argmax(logits + self._choice_bias)], None

    def _classify(self, stream: Stream, bits: Tensor) -> Tensor:
        pooled = pooled_mean(stream).float()[:, :, None, None]
        logits = _convolve(self._classifier, self._graph.classifier, pooled, bits)
        assert isinstance(logits, Tensor)
        return logits.flatten(1)

    def _output(self, logits: Tensor, decided: list[Tensor], live: Tensor) -> NetworkOutput:
        spoilt = ~live[:, None]
        logits = logits.masked_fill(spoilt, torch.nan)
        if decided:
            bits = torch.stack(decided, 1).masked_fill_(spoilt, 0)
        else:
            bits = logits.new_empty((len(logits), 0), dtype=torch.int32)
        cost = bits.double().square_().sum(1).div_(self._largest_cost)
        return NetworkOutput(logits, bits, cost)

    def _conv(self, node: LayerNode) -> BlockConv:
        own = _named(self._tensors, node.name)
        weight = PackedConvWeight(
            own["codes"], own["weight_scale"], node.widths, node.levels, node.weight_shape
        )
        return BlockConv.create(
            weight,
            own["input_scale"],
            own["input_zero_point"],
            mul=own["mul"],
            add=own["add"],
            bias=own.get("bias"),
            **_window(node),
        )

    def _block(self, index: int) -> _Block:
        branch, shortcut = self._graph.block_layers(index)
        stream = self._graph.architecture.streams[index]
        around = None if shortcut is None else self._conv(shortcut)
        return _Block([self._conv(node) for node in branch], around, self._stored_as(stream))

    def _stored_as(self, stream: int) -> dict[str, Any]:
        """What makes an op write a stream, as keyword arguments."""
        if self._graph.stream == "float32":
            return {}
        scale = self._tensors[f"streams.{stream}.scale"]
        zero_point = torch.zeros(1, dtype=torch.int32, device=scale.device)
        return {
            "output_scale": scale,
            "output_zero_point": zero_point,
            "output_bits": STREAM_BITS,
        }

    def _rnn_weights(self, index: int) -> RNNGateWeights:
        named = {
            **_named(self._tensors, f"gates.{index}"),
            **_named(self._tensors, "gate"),
            "choice_bias": self._choice_bias,
        }
        return RNNGateWeights(**named)


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of one part of the network, by their own names."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)
    }


def _window(node: LayerNode) -> dict[str, Any]:
    shape = node.shape
    return {
        "stride": shape.stride,
        "padding": shape.padding,
        "dilation": shape.dilation,
        "groups": shape.groups,
    }


def _convolve(conv: BlockConv, node: LayerNode, x: Tensor, bits: Tensor, **epilogue: Any) -> Stream:
    return mixed_conv2d(
        x,
        conv.weight,
        bits,
        conv.quantizer.scale,
        conv.quantizer.zero_point,
        mul=conv.mul,
        add=conv.add,
        bias=conv.bias,
        **_window(node),
        **epilogue,
    )


def _call(lap: Lap | None) -> None:
    if lap is not None:
        lap()
