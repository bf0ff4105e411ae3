"""The registered ops: every schema, fake kernel and autograd formula, in one place.

Ops take tensors and scalars only; :mod:`dfs_kernels.functional` flattens the classes into them and
checks what can be checked without reading values. Arguments are passed by name, the tensors among
them positional in the schema because autograd formulas can't see keyword-only tensors.

Width lists are ``int[]``, named after what they index. An ``output_bits`` of -1 stands for each
sample's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dfs_kernels import backends
from dfs_kernels.arguments import is_debugging
from dfs_kernels.block import BlockCall, LayerCall, Stream, run_block
from dfs_kernels.call import (
    ConvCall,
    ConvWeight,
    GradientsWanted,
    check_bits,
    gradient_shapes,
)
from dfs_kernels.gate import GateCall, GateStep, RNNGateWeights
from dfs_kernels.geometry import ConvGeometry, wants_channels_last
from dfs_kernels.packing import (
    PackedActivation,
    PackedConvWeight,
    Quantizer,
    check_scales,
    new_codes,
    new_packed,
    new_packed_codes,
    new_rows,
)

_GEOMETRY = (
    "int in_channels, int out_channels, int kernel_h, int kernel_w, int stride_h, int stride_w, "
    "int pad_left, int pad_right, int pad_top, int pad_bottom, int dilation_h, int dilation_w, "
    "int groups"
)
_GEOMETRY_FIELDS = tuple(ConvGeometry.__annotations__)

# The tensors of a mixed convolution with their schema types. packed_* are a packed input's own
# widths, steps and zero points, residual_* a packed residual's; None for float tensors.
_INPUT_TENSORS = {
    "input": "Tensor",
    "weight": "Tensor",
    "bits": "Tensor",
    "packed_bits": "Tensor?",
    "packed_scale": "Tensor?",
    "packed_zero_point": "Tensor?",
    "input_scale": "Tensor?",
    "input_zero_point": "Tensor?",
    "weight_scale": "Tensor?",
    "weight_tiles": "Tensor?",
    "bias": "Tensor?",
    "mul": "Tensor?",
    "add": "Tensor?",
}
_RESIDUAL_QUANTIZER = {
    "residual_bits": "Tensor?",
    "residual_scale": "Tensor?",
    "residual_zero_point": "Tensor?",
}
_CONV_TENSORS = {
    **_INPUT_TENSORS,
    "residual": "Tensor?",
    **_RESIDUAL_QUANTIZER,
    "output_scale": "Tensor?",
    "output_zero_point": "Tensor?",
}
_INPLACE_TENSORS = {**_INPUT_TENSORS, "residual": "Tensor(a!)", **_RESIDUAL_QUANTIZER}
_CONV_SCALARS = (
    "int[] bit_options, bool[] centred, int[] packed_options, SymInt in_height, SymInt in_width, "
    "int[] residual_options, bool relu, str backend, " + _GEOMETRY
)


def _schema(tensors: dict[str, str], scalars: str, result: str) -> str:
    named = ", ".join(f"{kind} {name}" for name, kind in tensors.items())
    return f"({named}, *, {scalars}) -> {result}"


def _named(tensors: dict[str, str], values: Sequence[Any], scalars: dict[str, Any]) -> Any:
    """Arguments of an op call by name, the geometry gathered."""
    named = SimpleNamespace(**dict(zip(tensors, values, strict=True)), **scalars)
    named.geometry = ConvGeometry(**{name: scalars[name] for name in _GEOMETRY_FIELDS})
    return named


def _may_read(tensor: Tensor) -> bool:
    """Whether looking at values is allowed: always on a CPU, elsewhere only when debugging."""
    return tensor.device.type == "cpu" or is_debugging()


# Packing


@torch.library.custom_op(
    "dfs::pack_bits", mutates_args=(), schema="(Tensor codes, int bits, *, str backend) -> Tensor"
)
def pack_bits_op(codes: Tensor, bits: int, *, backend: str) -> Tensor:
    result: Tensor = backends.load(backend).pack_bits(codes, bits)
    return result


@pack_bits_op.register_fake
def _(codes: Tensor, bits: int, *, backend: str) -> Tensor:
    return new_packed_codes(codes, bits)


@torch.library.custom_op(
    "dfs::unpack_bits",
    mutates_args=(),
    schema="(Tensor packed, int bits, int channels, bool signed, *, str backend) -> Tensor",
)
def unpack_bits_op(
    packed: Tensor, bits: int, channels: int, signed: bool, *, backend: str
) -> Tensor:
    result: Tensor = backends.load(backend).unpack_bits(packed, bits, channels, signed)
    return result


@unpack_bits_op.register_fake
def _(packed: Tensor, bits: int, channels: int, signed: bool, *, backend: str) -> Tensor:
    return new_codes(packed, channels, signed)


@torch.library.custom_op(
    "dfs::quantize_pack",
    mutates_args=(),
    schema="(Tensor input, Tensor bits, Tensor scale, Tensor zero_point, *, int[] bit_options, "
    "str backend) -> Tensor",
)
def quantize_pack_op(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bit_options: Sequence[int],
    backend: str,
) -> Tensor:
    options = tuple(bit_options)
    if _may_read(input):
        check_bits(bits, options)
        Quantizer(options, scale, zero_point).check_values("")
    out = new_packed(input, input.shape, bits, scale, zero_point, options)
    backends.load(backend).quantize_pack(input.detach(), out)
    return out.data


@quantize_pack_op.register_fake
def _(
    input: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bit_options: Sequence[int],
    backend: str,
) -> Tensor:
    return new_rows(input, input.shape, bit_options)


@torch.library.custom_op(
    "dfs::unpack_dequantize",
    mutates_args=(),
    schema="(Tensor data, Tensor bits, Tensor scale, Tensor zero_point, *, int[] bit_options, "
    "int channels, SymInt height, SymInt width, str backend) -> Tensor",
)
def unpack_dequantize_op(
    data: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bit_options: Sequence[int],
    channels: int,
    height: int,
    width: int,
    backend: str,
) -> Tensor:
    options = tuple(bit_options)
    if _may_read(data):
        check_bits(bits, options)
    packed = PackedActivation(data, bits, scale, zero_point, options, channels, height, width)
    result: Tensor = backends.load(backend).unpack_dequantize(packed)
    return result


@unpack_dequantize_op.register_fake
def _(
    data: Tensor,
    bits: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bit_options: Sequence[int],
    channels: int,
    height: int,
    width: int,
    backend: str,
) -> Tensor:
    return data.new_empty((data.shape[0], channels, height, width), dtype=torch.float32)


@torch.library.custom_op(
    "dfs::retile_weight",
    mutates_args=(),
    # The variant keeps a graph compiled for one layout of tiles from being used with another.
    schema="(Tensor buffer, Tensor scale, *, int[] bit_options, bool[] centred, str backend, "
    "str variant, " + _GEOMETRY + ") -> Tensor",
)
def retile_weight_op(
    buffer: Tensor,
    scale: Tensor,
    *,
    bit_options: Sequence[int],
    centred: Sequence[bool],
    backend: str,
    variant: str,
    **geometry: int,
) -> Tensor:
    conv = ConvGeometry(**geometry)
    shape = (conv.out_channels, conv.group_channels, conv.kernel_h, conv.kernel_w)
    levels = tuple("centred" if c else "twos" for c in centred)
    weight = PackedConvWeight(buffer, scale, tuple(bit_options), levels, shape)
    result: Tensor = backends.load(backend).retile_weight(weight, conv)
    return result


@retile_weight_op.register_fake
def _(
    buffer: Tensor,
    scale: Tensor,
    *,
    bit_options: Sequence[int],
    centred: Sequence[bool],
    backend: str,
    variant: str,
    **geometry: int,
) -> Tensor:
    size = backends.load(backend).tile_bytes(
        ConvGeometry(**geometry), tuple(bit_options), tuple(centred)
    )
    return buffer.new_empty(size)


# Quantization in float


@torch.library.custom_op(
    "dfs::fake_quantize",
    mutates_args=(),
    schema="(Tensor input, Tensor scale, Tensor zero_point, *, int bits, str backend) -> Tensor",
)
def fake_quantize_op(
    input: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, backend: str
) -> Tensor:
    if _may_read(input):
        Quantizer((bits,), scale.reshape(1), zero_point.reshape(1)).check_values("")
    module = backends.load(backend)
    result: Tensor = module.fake_quantize(input.detach(), bits, scale.detach(), zero_point)
    return result


@fake_quantize_op.register_fake
def _(input: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, backend: str) -> Tensor:
    return torch.empty_like(input)


@torch.library.custom_op(
    "dfs::fake_quantize_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor input, Tensor scale, Tensor zero_point, *, int bits, "
    "str backend) -> (Tensor, Tensor)",
)
def fake_quantize_backward_op(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = backends.load(backend)
    grad_input, grad_scale = module.fake_quantize_backward(
        grad_output.detach(), input.detach(), bits, scale.detach(), zero_point
    )
    return grad_input, grad_scale


@fake_quantize_backward_op.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(scale)


def _setup_fake_quantize(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.arguments = keyword_only_inputs


def _fake_quantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_input, grad_scale = torch.ops.dfs.fake_quantize_backward(
        grad, *ctx.saved_tensors, **ctx.arguments
    )
    return grad_input, grad_scale, None


fake_quantize_op.register_autograd(_fake_quantize_backward, setup_context=_setup_fake_quantize)


# Mixed convolution


def _new_image(input: Tensor, shape: Sequence[int], like_input: bool) -> Tensor:
    """A float result: in the input's memory format when that is a float tensor."""
    dtype = input.dtype if like_input else torch.float32
    last = like_input and wants_channels_last(input)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=input.device, memory_format=memory_format)


def _build_call(a: Any, residual: Tensor | PackedActivation | None) -> ConvCall:
    """The call that the named arguments ``a`` of an op describe."""
    geometry: ConvGeometry = a.geometry
    options = tuple(a.bit_options)
    source: Tensor | PackedActivation = a.input.detach()
    if a.packed_bits is not None:
        source = PackedActivation(
            a.input,
            a.packed_bits,
            a.packed_scale,
            a.packed_zero_point,
            tuple(a.packed_options),
            geometry.in_channels,
            a.in_height,
            a.in_width,
        )
    quantizer = None
    if a.input_scale is not None:
        quantizer = Quantizer(options, a.input_scale.detach(), a.input_zero_point)
    weight = ConvWeight(
        a.weight.detach(),
        geometry.weight_shape,
        options,
        tuple(a.centred),
        _detached(a.weight_scale),
        a.weight_tiles,
    )
    return ConvCall(
        source,
        weight,
        a.bits,
        geometry,
        quantizer,
        _detached(a.bias),
        _detached(a.mul),
        _detached(a.add),
        residual,
        a.relu,
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_call(call: ConvCall) -> None:
    """Everything that needs a look at values. Only where that costs no synchronisation."""
    if not _may_read(call.bits):
        return
    check_bits(call.bits, call.weight.options)
    if call.input_quantizer is not None:
        call.input_quantizer.check_values("input")
    weight = call.weight
    if not weight.is_packed:
        if weight.scale is not None:
            check_scales(weight.scale, weight.options, "weight_scale")
        if not bool(torch.isfinite(weight.data).all()):
            raise ValueError("weight holds values that are not finite")
    if isinstance(call.input, PackedActivation):
        check_bits_stored(call)
    if isinstance(call.residual, PackedActivation):
        check_bits(call.residual.bits, call.residual.bit_options, "residual.bits")


def check_bits_stored(call: ConvCall) -> None:
    """Refuse samples whose packed input is not stored at a width that can serve them."""
    assert isinstance(call.input, PackedActivation)
    as_is = call.input_quantizer is None
    for index, (wanted, stored) in enumerate(
        zip(call.bits.tolist(), call.input.bits.tolist(), strict=True)
    ):
        if wanted == 0:
            continue
        if stored == 0:
            raise ValueError(f"input: sample {index} is stored at 0 bits but needed at {wanted}")
        if as_is and stored != wanted:
            raise ValueError(
                f"bits[{index}] is {wanted}, but the packed input stores that sample at {stored} "
                "bits; give input_scale to quantize it again"
            )
        if stored not in call.input.bit_options:
            raise ValueError(
                f"input: bits[{index}] is {stored}, not one of {call.input.bit_options}"
            )


def _residual_of(a: Any) -> Tensor | PackedActivation | None:
    if a.residual_bits is None:
        return _detached(a.residual)
    height, width = a.geometry.output_size(a.in_height, a.in_width)
    return PackedActivation(
        a.residual,
        a.residual_bits,
        a.residual_scale,
        a.residual_zero_point,
        tuple(a.residual_options),
        a.geometry.out_channels,
        height,
        width,
    )


def _output_shape(a: Any) -> tuple[int, int, int, int]:
    height, width = a.geometry.output_size(a.in_height, a.in_width)
    return a.bits.shape[0], a.geometry.out_channels, height, width


@torch.library.custom_op(
    "dfs::mixed_conv2d",
    mutates_args=(),
    schema=_schema(
        _CONV_TENSORS,
        "int[] output_options, int output_bits, str backward_backend, " + _CONV_SCALARS,
        "Tensor",
    ),
)
def mixed_conv2d_op(*tensors: Any, **scalars: Any) -> Tensor:
    a = _named(_CONV_TENSORS, tensors, scalars)
    call = _build_call(a, _residual_of(a))
    _check_call(call)
    module = backends.load(a.backend)
    shape = _output_shape(a)
    if a.output_scale is None:
        image = _new_image(a.input, shape, a.packed_bits is None)
        module.mixed_conv2d(call, image)
        return image
    stored = a.bits if a.output_bits < 0 else torch.full_like(a.bits, a.output_bits)
    options = tuple(a.output_options)
    if _may_read(a.bits):
        Quantizer(options, a.output_scale, a.output_zero_point).check_values("output")
    out = new_packed(a.input, shape, stored, a.output_scale, a.output_zero_point, options)
    module.mixed_conv2d(call, out)
    return out.data


@mixed_conv2d_op.register_fake
def _(*tensors: Any, **scalars: Any) -> Tensor:
    a = _named(_CONV_TENSORS, tensors, scalars)
    if a.output_scale is None:
        return _new_image(a.input, _output_shape(a), a.packed_bits is None)
    return new_rows(a.input, _output_shape(a), a.output_options)


@torch.library.custom_op(
    "dfs::mixed_conv2d_",
    mutates_args=("residual",),
    schema=_schema(_INPLACE_TENSORS, _CONV_SCALARS, "()"),
)
def mixed_conv2d_inplace_op(*tensors: Any, **scalars: Any) -> None:
    a = _named(_INPLACE_TENSORS, tensors, scalars)
    target = _residual_of(a)
    assert target is not None
    memory = a.residual.untyped_storage().data_ptr()
    if memory != 0 and memory == a.input.untyped_storage().data_ptr():
        raise ValueError("residual shares memory with the input, which is still being read")
    call = _build_call(a, target)
    _check_call(call)
    backends.load(a.backend).mixed_conv2d(call, target)


@mixed_conv2d_inplace_op.register_fake
def _(*tensors: Any, **scalars: Any) -> None:
    return None


# The gate


_GATE_TENSORS = {
    "input": "Tensor",
    "packed_bits": "Tensor?",
    "packed_scale": "Tensor?",
    "packed_zero_point": "Tensor?",
    "state": "Tensor?",
    **dict.fromkeys(RNNGateWeights._fields, "Tensor"),
}


@torch.library.custom_op(
    "dfs::rnn_gate",
    mutates_args=(),
    schema=_schema(
        _GATE_TENSORS,
        "int[] packed_options, int channels, SymInt height, SymInt width, int[] choices, "
        "str backend",
        "(Tensor, Tensor, Tensor)",
    ),
)
def rnn_gate_op(*tensors: Any, **scalars: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = SimpleNamespace(**dict(zip(_GATE_TENSORS, tensors, strict=True)), **scalars)
    source: Tensor | PackedActivation = a.input.detach()
    if a.packed_bits is not None:
        options = tuple(a.packed_options)
        if _may_read(a.input):
            check_bits(a.packed_bits, options, "input.bits")
        source = PackedActivation(
            a.input,
            a.packed_bits,
            a.packed_scale,
            a.packed_zero_point,
            options,
            a.channels,
            a.height,
            a.width,
        )
    weights = RNNGateWeights(*(getattr(a, name).detach() for name in RNNGateWeights._fields))
    out = GateStep.empty(a.input, a.input.shape[0], len(a.choices), weights.hidden)
    call = GateCall(source, weights, tuple(a.choices), _detached(a.state))
    backends.load(a.backend).rnn_gate(call, out)
    return out.bits, out.logits, out.state


@rnn_gate_op.register_fake
def _(*tensors: Any, **scalars: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = SimpleNamespace(**dict(zip(_GATE_TENSORS, tensors, strict=True)), **scalars)
    hidden = a.embed_weight.shape[0]
    out = GateStep.empty(a.input, a.input.shape[0], len(a.choices), hidden)
    return out.bits, out.logits, out.state


# A gated block


# Of the convolutions of a block, each in the order of the branch; a shortcut comes last.
_LAYER_TENSORS = {
    "weight": "Tensor[]",
    "weight_scale": "Tensor[]",
    "weight_tiles": "Tensor?[]",
    "input_scale": "Tensor[]",
    "input_zero_point": "Tensor[]",
    "mul": "Tensor?[]",
    "add": "Tensor?[]",
    "bias": "Tensor?[]",
}
# stream_* are a packed stream's own; gate holds RNNGateWeights, or nothing.
_BLOCK_TENSORS = {
    "stream": "Tensor",
    "stream_bits": "Tensor?",
    "stream_scale": "Tensor?",
    "stream_zero_point": "Tensor?",
    "bits": "Tensor",
    **_LAYER_TENSORS,
    "gate": "Tensor[]",
    "state": "Tensor?",
}
_DOWNSAMPLING_TENSORS = {
    **_BLOCK_TENSORS,
    "shortcut_bits": "Tensor",
    "output_scale": "Tensor?",
    "output_zero_point": "Tensor?",
}
_BLOCK_SCALARS = (
    "int[] bit_options, bool[] centred, int[] stream_options, SymInt in_height, SymInt in_width, "
    "int[] choices, str backend, " + ", ".join(f"int[] {name}" for name in _GEOMETRY_FIELDS)
)
_DOWNSAMPLING_SCALARS = (
    "int[] shortcut_options, bool[] shortcut_centred, int[] output_options, "
    "bool rectifies_skipped, " + _BLOCK_SCALARS
)


def _block_geometry(a: Any, index: int) -> ConvGeometry:
    return ConvGeometry(*(getattr(a, name)[index] for name in _GEOMETRY_FIELDS))


def _layer_call(a: Any, index: int, options: Sequence[int], centred: Sequence[bool]) -> LayerCall:
    """One convolution of a block: entry ``index`` of the lists that the named arguments hold."""
    geometry = _block_geometry(a, index)
    own = SimpleNamespace(**{name: getattr(a, name)[index] for name in _LAYER_TENSORS})
    weight = ConvWeight(
        own.weight,
        geometry.weight_shape,
        tuple(options),
        tuple(centred),
        own.weight_scale,
        own.weight_tiles,
    )
    quantizer = Quantizer(tuple(options), own.input_scale, own.input_zero_point)
    return LayerCall(weight, geometry, quantizer, own.mul, own.add, own.bias)


def _block_stream(a: Any) -> Stream:
    if a.stream_bits is None:
        stream: Tensor = a.stream
        return stream
    options = tuple(a.stream_options)
    channels = a.in_channels[0]
    return PackedActivation(
        a.stream,
        a.stream_bits,
        a.stream_scale,
        a.stream_zero_point,
        options,
        channels,
        a.in_height,
        a.in_width,
    )


def _run_block(a: Any, branch: range, **shortcut: Any) -> tuple[Stream, Tensor, Tensor, Tensor]:
    """What the block leaves in the stream, and bits, logits and state of the next decision."""
    call = BlockCall(
        _block_stream(a),
        a.bits,
        tuple(_layer_call(a, i, a.bit_options, a.centred) for i in branch),
        gate=RNNGateWeights(*a.gate) if a.gate else None,
        choices=tuple(a.choices),
        state=a.state,
        **shortcut,
    )
    if _may_read(a.bits):
        for layer in call.branch:
            layer.quantizer.check_values("input")
        if call.output is not None:
            call.output.check_values("output")
        if call.shortcut is not None and call.shortcut_bits is not None:
            check_bits(call.shortcut_bits, call.shortcut.weight.options, "shortcut_bits")
    stream, step = run_block(backends.load(a.backend), call, _check_call)
    return (stream, *(_empty_step(a) if step is None else step))


def _empty_step(a: Any) -> GateStep:
    """The step of a block; of one without a gate there is nothing in it."""
    batch = a.bits.shape[0]
    if a.gate:
        return GateStep.empty(a.bits, batch, len(a.choices), RNNGateWeights(*a.gate).hidden)
    return GateStep.empty(a.bits, 0, 0, 0)


@torch.library.custom_op(
    "dfs::gated_block_",
    mutates_args=("stream",),
    schema=_schema(
        {**_BLOCK_TENSORS, "stream": "Tensor(a!)"}, _BLOCK_SCALARS, "(Tensor, Tensor, Tensor)"
    ),
)
def gated_block_inplace_op(*tensors: Any, **scalars: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = SimpleNamespace(**dict(zip(_BLOCK_TENSORS, tensors, strict=True)), **scalars)
    _, bits, logits, state = _run_block(a, range(len(a.weight)))
    return bits, logits, state


@gated_block_inplace_op.register_fake
def _(*tensors: Any, **scalars: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = SimpleNamespace(**dict(zip(_BLOCK_TENSORS, tensors, strict=True)), **scalars)
    bits, logits, state = _empty_step(a)
    return bits, logits, state


@torch.library.custom_op(
    "dfs::gated_block",
    mutates_args=(),
    schema=_schema(
        _DOWNSAMPLING_TENSORS, _DOWNSAMPLING_SCALARS, "(Tensor, Tensor, Tensor, Tensor)"
    ),
)
def gated_block_op(*tensors: Any, **scalars: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = SimpleNamespace(**dict(zip(_DOWNSAMPLING_TENSORS, tensors, strict=True)), **scalars)
    output = None
    if a.output_scale is not None:
        output = Quantizer(tuple(a.output_options), a.output_scale, a.output_zero_point)
    last = len(a.weight) - 1
    stream, bits, logits, state = _run_block(
        a,
        range(last),
        shortcut=_layer_call(a, last, a.shortcut_options, a.shortcut_centred),
        shortcut_bits=a.shortcut_bits,
        output=output,
        rectifies_skipped=a.rectifies_skipped,
    )
    return stream if isinstance(stream, Tensor) else stream.data, bits, logits, state


@gated_block_op.register_fake
def _(*tensors: Any, **scalars: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = SimpleNamespace(**dict(zip(_DOWNSAMPLING_TENSORS, tensors, strict=True)), **scalars)
    shortcut = _block_geometry(a, -1)
    size = shortcut.output_size(a.in_height, a.in_width)
    shape = (a.bits.shape[0], shortcut.out_channels, *size)
    if a.output_scale is None:
        stream = a.bits.new_empty(shape, dtype=torch.float32)
    else:
        stream = new_rows(a.bits, shape, a.output_options)
    bits, logits, state = _empty_step(a)
    return stream, bits, logits, state


# Gradients


_BACKWARD_TENSORS = {
    "grad_output": "Tensor",
    "input": "Tensor",
    "weight": "Tensor",
    "bits": "Tensor",
    "input_scale": "Tensor?",
    "input_zero_point": "Tensor?",
    "weight_scale": "Tensor?",
    "bias": "Tensor?",
    "mul": "Tensor?",
}
# What dfs::mixed_conv2d_backward returns, in this order; empty where not needed.
_BACKWARD_RESULTS = ("input", "weight", "input_scale", "weight_scale", "mul", "add")


@torch.library.custom_op(
    "dfs::mixed_conv2d_backward",
    mutates_args=(),
    schema=_schema(
        _BACKWARD_TENSORS,
        "bool needs_input, bool needs_weight, bool needs_input_scale, bool needs_weight_scale, "
        "bool needs_mul, bool needs_add, int[] bit_options, bool[] centred, str backend, "
        + _GEOMETRY,
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
)
def mixed_conv2d_backward_op(*tensors: Any, **scalars: Any) -> tuple[Tensor, ...]:
    a = _named(_BACKWARD_TENSORS, tensors, scalars)
    a.packed_bits = a.weight_tiles = a.add = None
    a.relu = False
    call = _build_call(a, None)
    wanted = GradientsWanted(*(scalars[f"needs_{name}"] for name in _BACKWARD_RESULTS))
    found = backends.load(a.backend).mixed_conv2d_backward(call, a.grad_output.detach(), wanted)
    values = (getattr(found, name) for name in _BACKWARD_RESULTS)
    return tuple(a.input.new_empty(0) if v is None else v.contiguous() for v in values)


@mixed_conv2d_backward_op.register_fake
def _(*tensors: Any, **scalars: Any) -> tuple[Tensor, ...]:
    a = _named(_BACKWARD_TENSORS, tensors, scalars)
    shapes = gradient_shapes(a.input.shape, a.geometry.weight_shape, len(a.bit_options))
    return tuple(
        a.input.new_empty(shapes[name] if scalars[f"needs_{name}"] else (0,))
        for name in _BACKWARD_RESULTS
    )


# The tensors of dfs::mixed_conv2d that can get a gradient.
_DIFFERENTIABLE = (
    "input",
    "weight",
    "input_scale",
    "weight_scale",
    "bias",
    "mul",
    "add",
    "residual",
)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    a = _named(_CONV_TENSORS, inputs, keyword_only_inputs)
    ctx.arguments = keyword_only_inputs
    ctx.packed_input = a.packed_bits is not None
    # Where the ReLU was open is seen in the output; a packed output carries no gradient.
    active = output if a.relu and output.is_floating_point() else None
    ctx.save_for_backward(
        a.input,
        a.weight,
        a.bits,
        a.input_scale,
        a.input_zero_point,
        a.weight_scale,
        a.bias,
        a.mul,
        active,
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *saved, active = ctx.saved_tensors
    bits, mul = saved[2], saved[7]
    if ctx.packed_input:
        raise RuntimeError("gradients of a mixed convolution need a float input, got a packed one")
    needs = dict(zip(_CONV_TENSORS, ctx.needs_input_grad, strict=False))
    if active is not None:
        # A skipped sample passes its residual on without an activation.
        grad = grad * ((active > 0) | (bits == 0).view(-1, 1, 1, 1))
    gradients: dict[str, Tensor | None] = {"residual": grad if needs["residual"] else None}
    if any(needs[name] for name in _DIFFERENTIABLE if name != "residual"):
        scalars = ctx.arguments
        found = torch.ops.dfs.mixed_conv2d_backward(
            grad,
            *saved,
            needs_input=needs["input"],
            needs_weight=needs["weight"],
            needs_input_scale=needs["input_scale"],
            needs_weight_scale=needs["weight_scale"],
            needs_mul=needs["mul"],
            needs_add=needs["add"] or needs["bias"],
            bit_options=scalars["bit_options"],
            centred=scalars["centred"],
            backend=scalars["backward_backend"],
            **{name: scalars[name] for name in _GEOMETRY_FIELDS},
        )
        for name, value in zip(_BACKWARD_RESULTS, found, strict=True):
            gradients[name] = value if needs[name] else None
        if needs["bias"]:
            add = found[_BACKWARD_RESULTS.index("add")]
            gradients["bias"] = (add if mul is None else add * mul).sum(0)
    return tuple(gradients.get(name) for name in _CONV_TENSORS)


# No autocast rule: functional.py passes float32, which a custom op gets as it is.
mixed_conv2d_op.register_autograd(_backward, setup_context=_setup_context)
