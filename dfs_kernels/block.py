"""A gated residual block in evaluation: its convolutions, and the gate of the block after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfs_kernels.arguments import PerWidth, PerWidthInt, bias_of, quantizer_of
from dfs_kernels.backends.measured import ConvProblem
from dfs_kernels.call import ConvCall, ConvWeight
from dfs_kernels.gate import GateCall, GateStep, RNNGateWeights
from dfs_kernels.geometry import ConvGeometry, IntPair
from dfs_kernels.packing import (
    PackedActivation,
    PackedConvWeight,
    Quantizer,
    new_packed,
    per_width,
)
from dfs_kernels.widths import check_accumulator

Stream = Tensor | PackedActivation


@dataclass(frozen=True, eq=False)
class BlockConv:
    """One convolution of a residual block with its BatchNorm folded in, ready to be run.

    Attributes:
        quantizer: of its input; widths equal to the weight's.
        mul, add: float32 (len(bit_options), O). bias: float32 (O,). Each may be None.
    """

    weight: PackedConvWeight
    geometry: ConvGeometry
    quantizer: Quantizer
    mul: Tensor | None = None
    add: Tensor | None = None
    bias: Tensor | None = None

    @staticmethod
    def create(
        weight: PackedConvWeight,
        input_scale: PerWidth,
        input_zero_point: PerWidthInt | None = None,
        *,
        mul: PerWidth | None = None,
        add: PerWidth | None = None,
        bias: Tensor | None = None,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
    ) -> BlockConv:
        """Check the arguments of a convolution once, for any number of calls.

        Args: those of :func:`dfs_kernels.mixed_conv2d`.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if not isinstance(weight, PackedConvWeight):
            raise TypeError(f"weight must be a PackedConvWeight, got {type(weight).__name__}")
        options, device, outputs = weight.bit_options, weight.device, weight.shape[:1]
        channels = weight.shape[1] * groups
        geometry = ConvGeometry.create(channels, weight.shape, stride, padding, dilation, groups)
        check_accumulator(geometry.taps, options, weight.centred)
        quantizer = quantizer_of(
            input_scale, input_zero_point, options, "input_scale", "input_zero_point", device
        )

        def affine(value: PerWidth | None, name: str) -> Tensor | None:
            if value is None:
                return None
            return per_width(value, options, name, torch.float32, device, outputs).detach()

        if bias is not None:
            bias = bias_of(bias, weight.shape[0], torch.float32, device).detach()
        return BlockConv(
            weight,
            geometry,
            Quantizer(options, quantizer.scale.detach(), quantizer.zero_point),
            affine(mul, "mul"),
            affine(add, "add"),
            bias,
        )


class BlockOutput(NamedTuple):
    """What a gated block leaves.

    Attributes:
        stream: the one that was given, updated, of an identity block; else a new one.
        step: the decision for the next block, or None where no gate was given.
    """

    stream: Stream
    step: GateStep | None


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One convolution of a block as the backends see it; attributes as in :class:`BlockConv`."""

    weight: ConvWeight
    geometry: ConvGeometry
    quantizer: Quantizer
    mul: Tensor | None
    add: Tensor | None
    bias: Tensor | None

    def convolution(
        self,
        x: Stream,
        bits: Tensor,
        *,
        as_codes: bool = False,
        residual: Stream | None = None,
        relu: bool = True,
    ) -> ConvCall:
        """The call that convolves ``x``, whose codes are used as they are if ``as_codes``."""
        return ConvCall(
            x,
            self.weight,
            bits,
            self.geometry,
            None if as_codes else self.quantizer,
            self.bias,
            self.mul,
            self.add,
            residual,
            relu,
        )

    def output_shape(self, x: Stream) -> tuple[int, int, int, int]:
        """(N, O, OH, OW)."""
        size = self.geometry.output_size(*x.shape[2:])
        return (x.shape[0], self.geometry.out_channels, *size)


@dataclass(frozen=True, eq=False)
class BlockCall:
    """Arguments of a gated block.

    Attributes:
        stream: float32 (N, C, H, W), or packed.
        bits: int32 (N,), of the branch.
        branch: two convolutions or more, all of the same widths.
        shortcut: the convolution around the branch, or None for the identity.
        shortcut_bits: int32 (N,), or None without a shortcut.
        output: of one width, that of the stream which a block with a shortcut writes; None for
            float32.
        rectifies_skipped: whether ReLU holds for a skipped sample's shortcut too.
        gate: what decides the next block, or None. choices, state: as in :class:`GateCall`.
    """

    stream: Stream
    bits: Tensor
    branch: tuple[LayerCall, ...]
    shortcut: LayerCall | None = None
    shortcut_bits: Tensor | None = None
    output: Quantizer | None = None
    rectifies_skipped: bool = True
    gate: RNNGateWeights | None = None
    choices: tuple[int, ...] = ()
    state: Tensor | None = None


def run_block(
    module: ModuleType, call: BlockCall, check: Callable[[ConvCall], None]
) -> BlockOutput:
    """The block on one backend: nothing but its kernels, one launch each on a GPU.

    Args:
        check: what has to be checked of every convolution before it is run.
    """

    def convolve(conv: ConvCall, out: Stream) -> None:
        check(conv)
        module.mixed_conv2d(conv, out)

    hidden = call.stream
    for layer, following in pairwise(call.branch):
        out = _new_codes(call.bits, layer.output_shape(hidden), call.bits, following.quantizer)
        convolve(layer.convolution(hidden, call.bits, as_codes=hidden is not call.stream), out)
        hidden = out
    last = call.branch[-1]
    result = call.stream if call.shortcut is None else _new_stream(call, last.output_shape(hidden))
    residual = call.stream if call.shortcut is None else _shortcut(call, convolve)
    convolve(last.convolution(hidden, call.bits, as_codes=True, residual=residual), result)
    if call.shortcut is not None and call.rectifies_skipped and isinstance(result, Tensor):
        # The kernels leave a skipped sample without an activation. Codes with zero point 0 hold no
        # negatives anyway.
        result.relu_()
    if call.gate is None:
        return BlockOutput(result, None)
    step = GateStep.empty(call.bits, result.shape[0], len(call.choices), call.gate.hidden)
    module.rnn_gate(GateCall(result, call.gate, call.choices, call.state), step)
    return BlockOutput(result, step)


def check_block(
    shape: tuple[int, ...] | torch.Size,
    branch: Sequence[BlockConv],
    shortcut: BlockConv | None,
    device: torch.device,
) -> tuple[int, int, int, int]:
    """(N, O, OH, OW) of a block whose convolutions fit each other and a stream of ``shape``.

    Raises:
        TypeError, ValueError: naming the convolution that does not fit.
    """
    if len(branch) < 2:
        raise ValueError(f"branch must have two convolutions or more, got {len(branch)}")
    named = {f"branch[{i}]": conv for i, conv in enumerate(branch)}
    if shortcut is not None:
        named["shortcut"] = shortcut
    for name, conv in named.items():
        if not isinstance(conv, BlockConv):
            raise TypeError(f"{name} must be a BlockConv, got {type(conv).__name__}")
        if conv.weight.device != device:
            raise ValueError(f"{name} is on {conv.weight.device}, but the stream on {device}")
    batch, *found = shape
    for i, conv in enumerate(branch):
        found = _after(f"branch[{i}]", conv, found)
        held = (conv.weight.bit_options, conv.weight.centred)
        if held != (branch[0].weight.bit_options, branch[0].weight.centred):
            raise ValueError(
                f"branch[{i}] must have the widths and levels of branch[0], got "
                f"{conv.weight.bit_options} {conv.weight.levels}"
            )
    carried = list(shape[1:]) if shortcut is None else _after("shortcut", shortcut, shape[1:])
    if found != carried:
        raise ValueError(
            f"branch gives {tuple(found)} (C, H, W), but {tuple(carried)} is what it is added to"
        )
    channels, height, width = found
    return batch, channels, height, width


def _after(name: str, conv: BlockConv, shape: Sequence[int]) -> list[int]:
    """(C, H, W) behind a convolution."""
    channels, height, width = shape
    if conv.geometry.in_channels != channels:
        raise ValueError(
            f"{name} takes {conv.geometry.in_channels} channels, but is given {channels}"
        )
    return [conv.geometry.out_channels, *conv.geometry.output_size(height, width)]


def costliest_convolution(
    shape: tuple[int, ...] | torch.Size, branch: Sequence[BlockConv]
) -> ConvProblem:
    """The convolution with the most products, which decides the time of a block."""
    batch, _, height, width = shape
    costliest, most = ConvProblem(branch[0].geometry, height, width, batch), 0
    # A loop rather than max() with a key, which torch.compile can't follow.
    for conv in branch:
        after = conv.geometry.output_size(height, width)
        products = conv.geometry.taps * conv.geometry.out_channels * after[0] * after[1]
        if products > most:
            costliest, most = ConvProblem(conv.geometry, height, width, batch), products
        height, width = after
    return costliest


def offered_widths(branch: Sequence[BlockConv], shortcut: BlockConv | None) -> list[int]:
    """Those of all convolutions of a block, ascending."""
    own = () if shortcut is None else shortcut.weight.bit_options
    return sorted({*branch[0].weight.bit_options, *own})


def flatten_block(
    stream: Stream, branch: Sequence[BlockConv], shortcut: BlockConv | None, backend: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and scalars of a block for the ops but for the stream's values.

    Those of its convolutions are lists with an entry for each of them, the shortcut's last.
    """
    layers = [*branch, *([] if shortcut is None else [shortcut])]
    packed = stream if isinstance(stream, PackedActivation) else None
    tensors: dict[str, Any] = {
        "stream_bits": packed.bits if packed else None,
        "stream_scale": packed.scale if packed else None,
        "stream_zero_point": packed.zero_point if packed else None,
        "weight": [layer.weight.buffer for layer in layers],
        "weight_scale": [layer.weight.scales for layer in layers],
        "weight_tiles": [layer.weight.tiles(backend, layer.geometry) for layer in layers],
        "input_scale": [layer.quantizer.scale for layer in layers],
        "input_zero_point": [layer.quantizer.zero_point for layer in layers],
        "mul": [layer.mul for layer in layers],
        "add": [layer.add for layer in layers],
        "bias": [layer.bias for layer in layers],
    }
    fields = [layer.geometry.fields() for layer in layers]
    scalars: dict[str, Any] = {
        "bit_options": branch[0].weight.bit_options,
        "centred": branch[0].weight.centred,
        "stream_options": packed.bit_options if packed else (),
        "in_height": stream.shape[2],
        "in_width": stream.shape[3],
        **{name: [f[name] for f in fields] for name in fields[0]},
    }
    if shortcut is not None:
        scalars["shortcut_options"] = shortcut.weight.bit_options
        scalars["shortcut_centred"] = shortcut.weight.centred
    return tensors, scalars


def _new_stream(call: BlockCall, shape: tuple[int, int, int, int]) -> Stream:
    if call.output is None:
        return torch.empty(shape, dtype=torch.float32, device=call.bits.device)
    bits = stored_bits(call.stream, call.bits, call.output.options[0])
    return _new_codes(call.bits, shape, bits, call.output)


def _new_codes(
    like: Tensor, shape: Sequence[int], bits: Tensor, quantizer: Quantizer
) -> PackedActivation:
    return new_packed(like, shape, bits, quantizer.scale, quantizer.zero_point, quantizer.options)


def stored_bits(stream: Stream, bits: Tensor, width: int) -> Tensor:
    """int32 (N,), ``width`` throughout: the one that says so of ``stream``, if there is one."""
    if isinstance(stream, PackedActivation) and stream.bit_options == (width,):
        return stream.bits
    return torch.full_like(bits, width)


def _shortcut(call: BlockCall, convolve: Callable[[ConvCall, Stream], None]) -> Tensor:
    """What is added to the branch: float32, a pixel's channels together as those of codes are."""
    assert call.shortcut is not None
    assert call.shortcut_bits is not None
    shape = call.shortcut.output_shape(call.stream)
    out = torch.empty(
        shape,
        dtype=torch.float32,
        device=call.bits.device,
        memory_format=torch.channels_last,
    )
    convolve(call.shortcut.convolution(call.stream, call.shortcut_bits, relu=False), out)
    return out
