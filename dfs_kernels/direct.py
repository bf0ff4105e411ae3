"""Calls of the compiled CPU kernels that pass by the dispatcher.

A registered op costs a hundred microseconds and more before it does anything, several times what a
small convolution takes. So the public functions come here first. What is found here is held to the
same rules as on the way through the ops, and anything out of the ordinary is left to that way: a
declined call gives None or False, with nothing done. So every error message is the ops' own.

Nothing that depends on a tensor's values is kept from call to call; only what follows from the
shape of a convolution is, beside the packed weight (:class:`ConvPlan`).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dfs_kernels import backends
from dfs_kernels.arguments import infer_options, only_entry, widths_of
from dfs_kernels.backends import cpu, native
from dfs_kernels.gate import GateStep, RNNGateWeights, check_choices
from dfs_kernels.geometry import ConvGeometry, wants_channels_last
from dfs_kernels.packing import (
    DerivedWeights,
    PackedActivation,
    PackedConvWeight,
    per_width,
    row_bytes,
)
from dfs_kernels.widths import KERNEL_WIDTHS, check_accumulator

with contextlib.suppress(ImportError):  # backends.cpu says why, and every call is declined
    import dfs_kernels._cpu as _cpu

# Convolutions of different stride, padding, dilation or groups that share one weight.
_MAX_PLANS = 8
_MAX_ZERO_POINT = 255
_CPU = torch.device("cpu")
_PLAIN = (Tensor, Parameter)

# The dispatch keys that a thread includes in eager and in inference mode. Dispatch modes, function
# transforms and tracers each add their own.
_EAGER_KEYS = frozenset(
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).raw_repr() | more
    for more in (0, torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr())
)
_included_keys = torch._C._dispatch_tls_local_include_set
_count_function_modes = torch._C._len_torch_function_stack
_is_profiling = torch._C._autograd._profiler_enabled


class _DeclinedError(Exception):
    """The call is one for the ops."""


def is_unwatched() -> bool:
    """Whether no mode, transform, tracer or profiler wants to see which ops are called."""
    return (
        _included_keys().raw_repr() in _EAGER_KEYS
        and not _count_function_modes()
        and not _is_profiling()
    )


def quantize_pack(
    input: Any, bits: Any, scale: Any, zero_point: Any, bit_options: Any, backend: str | None
) -> PackedActivation | None:
    """:func:`dfs_kernels.quantize_pack`, or None if the call is one for the ops."""
    if not backends.is_compiled_cpu(backend):
        return None
    try:
        values = _float_image(input)
        batch, channels, height, width = values.shape
        single = (bits,) if type(bits) is int and bits != 0 else None
        options = _options(scale, bit_options, single)
        stored = _widths(bits, batch)
        steps, zeros = _quantizer(scale, zero_point, options)
    except _DeclinedError:
        return None
    out = _new_packed(stored, steps.detach(), zeros, options, batch, channels, height, width)
    done = _cpu.try_quantize_pack(_values(values), _codes(out), batch, torch.get_num_threads())
    return out if done else None


def unpack_dequantize(packed: Any, backend: str | None) -> Tensor | None:
    """:func:`dfs_kernels.unpack_dequantize`, or None if the call is one for the ops."""
    if not backends.is_compiled_cpu(backend):
        return None
    try:
        batch, channels, height, width = _check_packed(packed)
    except _DeclinedError:
        return None
    if torch.is_grad_enabled() and packed.scale.requires_grad:
        return None
    out = torch.empty(batch, channels, height, width, dtype=torch.float32, device=_CPU)
    done = _cpu.try_unpack_dequantize(_codes(packed), _values(out), batch, torch.get_num_threads())
    return out if done else None


def rnn_gate(
    input: Any, weights: RNNGateWeights, choices: Any, state: Any, backend: str | None
) -> GateStep | None:
    """:func:`dfs_kernels.rnn_gate`, or None if the call is one for the ops."""
    embed = weights.embed_weight
    if not backends.is_compiled_cpu(backend) or type(embed) not in _PLAIN or embed.dim() != 2:
        return None
    try:
        if type(input) is PackedActivation:
            batch, channels, _, _ = _check_packed(input)
            features = _codes(input)
        else:
            image = _float_image(input)
            batch, channels = image.shape[:2]
            features = _values(image)
        widths = check_choices(choices)
        shapes = weights.shapes(channels, len(widths))
    except (_DeclinedError, TypeError, ValueError):
        return None
    *floats, bias = weights
    if not all(
        _is_ready(value, torch.float32, shape) for value, shape in zip(floats, shapes, strict=False)
    ) or not _is_ready(bias, torch.float64, shapes[-1]):
        return None
    hidden = shapes[0][0]
    if state is not None and not _is_ready(state, torch.float64, (2, batch, hidden)):
        return None
    out = GateStep.empty(bias, batch, len(widths), hidden)
    args = native.gate_args(_cpu, features, weights, widths, state, out)
    return out if _cpu.try_rnn_gate(args, torch.get_num_threads()) else None


def mixed_conv2d(
    input: Any,
    weight: Any,
    bits: Any,
    input_scale: Any,
    input_zero_point: Any,
    mul: Any,
    add: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    residual: Any,
    activation: Any,
    output_scale: Any,
    output_zero_point: Any,
    output_bits: Any,
    bit_options: Any,
    backend: str | None,
) -> Tensor | PackedActivation | None:
    """:func:`dfs_kernels.mixed_conv2d`, or None if the call is one for the ops."""
    if type(weight) is not PackedConvWeight or not backends.is_compiled_cpu(backend):
        return None
    try:
        call = _Convolution(
            input,
            weight,
            bits,
            input_scale,
            input_zero_point,
            mul,
            add,
            bias,
            (stride, padding, dilation, groups),
            activation,
            bit_options,
        )
        added = None if residual is None else call.read_residual(residual)
        if output_scale is None:
            if output_bits is not None or output_zero_point is not None:
                return None
            image = call.new_image()
            return image if call.run(added, _values(image)) else None
        if output_bits is None:
            options, stored = call.plan.options, call.bits
        elif type(output_bits) is int:
            options = _packable((output_bits,))
            # A dict's entry is found without help.
            if type(output_scale) is not dict:
                output_scale = only_entry(output_scale, output_bits, call.plan.options)
            if output_zero_point is not None and type(output_zero_point) is not dict:
                output_zero_point = only_entry(output_zero_point, output_bits, call.plan.options)
            stored = torch.full((call.shape[0],), output_bits, dtype=torch.int32, device=_CPU)
        else:
            return None
        steps, zeros = _quantizer(output_scale, output_zero_point, options)
    except _DeclinedError:
        return None
    packed = _new_packed(stored, steps.detach(), zeros, options, *call.shape)
    return packed if call.run(added, _codes(packed)) else None


def mixed_conv2d_(
    input: Any,
    weight: Any,
    bits: Any,
    input_scale: Any,
    input_zero_point: Any,
    mul: Any,
    add: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    residual: Any,
    activation: Any,
    bit_options: Any,
    backend: str | None,
) -> bool:
    """:func:`dfs_kernels.mixed_conv2d_`; False, with nothing done, if the call is for the ops."""
    if type(weight) is not PackedConvWeight or not backends.is_compiled_cpu(backend):
        return False
    try:
        call = _Convolution(
            input,
            weight,
            bits,
            input_scale,
            input_zero_point,
            mul,
            add,
            bias,
            (stride, padding, dilation, groups),
            activation,
            bit_options,
        )
        target = call.read_residual(residual)
    except _DeclinedError:
        return False
    changed = residual
    if type(residual) is PackedActivation:
        changed = residual.data
    elif residual.dtype != torch.float32 or 0 in residual.stride():
        return False
    source = call.source
    if changed.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
        return False
    if not call.run(target, None):
        return False
    torch.autograd.graph.increment_version(changed)
    return True


class ConvPlan:
    """What calls with one packed weight and the same shape arguments have in common.

    Attributes:
        arguments: stride, padding, dilation and groups, as they were given.
        variant: the layout that ``tiles`` have, see ``tile_variant``.
        native_geometry, native_weight: for the compiled module; the weight is without its steps,
            which are a tensor that may change.
        size: H, W of the last input, and the OH, OW that follow.
        zeros: the zero points of whoever gives none.
    """

    __slots__ = (
        "arguments",
        "geometry",
        "native_geometry",
        "native_weight",
        "options",
        "size",
        "tiles",
        "variant",
        "zeros",
    )

    def __init__(
        self, weight: PackedConvWeight, in_channels: int, arguments: tuple[Any, ...], variant: str
    ) -> None:
        options = weight.bit_options
        geometry = ConvGeometry.create(in_channels, weight.shape, *arguments)
        check_accumulator(geometry.taps, options, weight.centred)
        tiles = weight.tiles("cpu", geometry)
        assert tiles is not None
        self.arguments = arguments
        self.geometry = geometry
        self.variant = variant
        self.options = options
        self.tiles = tiles
        self.native_geometry, self.native_weight = cpu.native_parts(
            geometry, options, weight.centred, tiles
        )
        self.size = (0, 0, 0, 0)
        self.zeros = torch.zeros(len(options), dtype=torch.int32, device=_CPU)

    @staticmethod
    def of(weight: PackedConvWeight, in_channels: int, arguments: tuple[Any, ...]) -> ConvPlan:
        """The plan for a call, new or kept with the weight."""
        variant: str = _cpu.tile_variant()
        derived = weight.derived
        plan: ConvPlan | None = derived.last_plan
        # By identity, as 1 == True: what is the same object was checked when the plan was made.
        # Lists never get to be the last plan's, since they may change.
        if (
            plan is None
            or plan.arguments[0] is not arguments[0]
            or plan.arguments[1] is not arguments[1]
            or plan.arguments[2] is not arguments[2]
            or plan.arguments[3] is not arguments[3]
            or plan.variant != variant
        ):
            plan = _find_plan(derived, weight, in_channels, arguments, variant)
        if plan.geometry.in_channels != in_channels:
            raise _DeclinedError
        return plan

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        in_height, in_width, out_height, out_width = self.size
        if in_height != height or in_width != width:
            try:
                out_height, out_width = self.geometry.output_size(height, width)
            except ValueError as error:
                raise _DeclinedError from error
            self.size = (height, width, out_height, out_width)
        return out_height, out_width


def _find_plan(
    derived: DerivedWeights,
    weight: PackedConvWeight,
    in_channels: int,
    arguments: tuple[Any, ...],
    variant: str,
) -> ConvPlan:
    for argument in arguments:
        if type(argument) is not int and not (
            type(argument) is tuple and all(type(value) is int for value in argument)
        ):
            raise _DeclinedError
    key = (variant, *arguments)
    plan: ConvPlan | None = derived.plans.get(key)
    if plan is None:
        steps = (len(weight.bit_options), weight.shape[0])
        if (
            type(weight.buffer) not in _PLAIN
            or not weight.buffer.is_cpu
            or not _is_ready(weight.scales, torch.float32, steps)
        ):
            raise _DeclinedError
        try:
            plan = ConvPlan(weight, in_channels, arguments, variant)
        except ValueError as error:
            raise _DeclinedError from error
        # Replaced rather than changed: another thread may be looking into it.
        kept = list(derived.plans.items())[1 - _MAX_PLANS :]
        derived.plans = {**dict(kept), key: plan}
    plan.arguments = arguments
    derived.last_plan = plan
    return plan


class _Convolution:
    """The arguments of a convolution, each of them something that the kernels can read.

    Attributes:
        source: the tensor with the input's values or codes.
        image: the float input, or None for a packed one.
        shape: (N, O, OH, OW).
        bits: int32 (N,).
    """

    __slots__ = (
        "add",
        "bias",
        "bits",
        "image",
        "input_scale",
        "input_zero_point",
        "map",
        "mul",
        "plan",
        "relu",
        "residual",
        "shape",
        "source",
        "tracks_gradients",
        "weight_scale",
    )

    def __init__(
        self,
        input: Any,
        weight: PackedConvWeight,
        bits: Any,
        input_scale: Any,
        input_zero_point: Any,
        mul: Any,
        add: Any,
        bias: Any,
        arguments: tuple[Any, ...],
        activation: Any,
        bit_options: Any,
    ) -> None:
        if activation is not None and activation != "relu":
            raise _DeclinedError
        if type(input) is PackedActivation:
            batch, in_channels, height, width = _check_packed(input)
            self.source, self.image = input.data, None
            self.map = _codes(input)
            differentiable = [input.scale]
        else:
            image = _float_image(input)
            batch, in_channels, height, width = image.shape
            self.source = self.image = image
            self.map = _values(image)
            differentiable = [image]
        self.plan = plan = ConvPlan.of(weight, in_channels, arguments)
        options = plan.options
        if bit_options is not None and bit_options is not options:
            if type(bit_options) not in (tuple, list) or tuple(bit_options) != options:
                raise _DeclinedError
        self.relu = activation is not None
        self.bits = _widths(bits, batch)
        out_channels = plan.geometry.out_channels
        self.shape = (batch, out_channels, *plan.output_size(height, width))
        per_channel = (len(options), out_channels)
        self.weight_scale = scales = weight.scales
        differentiable.append(scales)
        self.input_scale = self.input_zero_point = None
        if input_scale is not None:
            if input_zero_point is None:
                input_zero_point = plan.zeros
            self.input_scale, self.input_zero_point = _quantizer(
                input_scale, input_zero_point, options
            )
            differentiable.append(self.input_scale)
        elif input_zero_point is not None:
            raise _DeclinedError
        elif self.image is not None and options != (32,):
            if type(bits) is not int or bits != 32:
                raise _DeclinedError
        self.mul = self.add = self.bias = None
        self.residual: Tensor | PackedActivation | None = None
        if mul is not None:
            self.mul = _per_width(mul, options, torch.float32, per_channel, None)
            differentiable.append(self.mul)
        if add is not None:
            self.add = _per_width(add, options, torch.float32, per_channel, None)
            differentiable.append(self.add)
        if bias is not None:
            self.bias = _bias(bias, out_channels)
            differentiable.append(self.bias)
        self.tracks_gradients = torch.is_grad_enabled()
        if self.tracks_gradients:
            for tensor in differentiable:
                if tensor.requires_grad:
                    raise _DeclinedError

    def read_residual(self, residual: Any) -> Any:
        """The residual's native form; it stays alive with this object."""
        if type(residual) is PackedActivation:
            shape = _check_packed(residual)
            self.residual = residual
            native, differentiable = _codes(residual), residual.scale
        else:
            self.residual = image = _float_image(residual)
            batch, channels, height, width = image.shape
            shape = (batch, channels, height, width)
            native, differentiable = _values(image), image
        if shape != self.shape or (self.tracks_gradients and differentiable.requires_grad):
            raise _DeclinedError
        return native

    def new_image(self) -> Tensor:
        """The float result: in the input's memory format when that is a float tensor."""
        last = self.image is not None and wants_channels_last(self.image)
        memory_format = torch.channels_last if last else torch.contiguous_format
        return torch.empty(
            *self.shape, dtype=torch.float32, device=_CPU, memory_format=memory_format
        )

    def run(self, residual: Any, output: Any) -> bool:
        """Compute into ``output``, or into the residual without one. False: values are refused."""
        plan = self.plan
        done: bool = _cpu.try_mixed_conv2d(
            plan.native_geometry,
            plan.native_weight,
            self.weight_scale.data_ptr(),
            self.shape[0],
            self.bits.data_ptr(),
            self.map,
            _address(self.input_scale),
            _address(self.input_zero_point),
            _address(self.bias),
            _address(self.mul),
            _address(self.add),
            residual,
            self.relu,
            output,
            torch.get_num_threads(),
        )
        return done


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_ready(value: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether the kernels can read a tensor where it lies."""
    return (
        type(value) in _PLAIN
        and value.dtype is dtype
        and value.shape == shape
        and value.is_cpu
        and value.is_contiguous()
        and (dtype is not torch.float32 or not value.is_neg())
    )


def _float_image(value: Any) -> Tensor:
    """A batch of images with any strides, in float32."""
    if (
        type(value) not in _PLAIN
        or not value.is_cpu
        or value.layout is not torch.strided
        or value.is_neg()
    ):
        raise _DeclinedError
    if value.dtype is not torch.float32:
        if not value.is_floating_point():
            raise _DeclinedError
        value = value.to(torch.float32)
    shape = value.shape
    if len(shape) != 4 or 0 in shape:
        raise _DeclinedError
    image: Tensor = value
    return image


def _check_packed(packed: Any) -> tuple[int, int, int, int]:
    """(N, C, H, W) of a packed activation, checked again: its tensors may have been changed."""
    if type(packed) is not PackedActivation:
        raise _DeclinedError
    data, count = packed.data, (len(packed.bit_options),)
    if type(data) is not Tensor or data.dtype is not torch.uint8 or not data.is_cpu:
        raise _DeclinedError
    shape = data.shape
    if len(shape) != 2 or shape[0] == 0 or not data.is_contiguous():
        raise _DeclinedError
    if (
        not _is_ready(packed.bits, torch.int32, shape[:1])
        or not _is_ready(packed.scale, torch.float32, count)
        or not _is_ready(packed.zero_point, torch.int32, count)
    ):
        raise _DeclinedError
    return shape[0], packed.channels, packed.height, packed.width


def _values(image: Tensor) -> Any:
    _, channels, height, width = image.shape
    return _cpu.FeatureMap.of_values(image.data_ptr(), channels, height, width, image.stride())


def _codes(packed: PackedActivation) -> Any:
    return _cpu.FeatureMap.of_codes(
        packed.data.data_ptr(),
        packed.channels,
        packed.height,
        packed.width,
        packed.data.shape[1],
        packed.bits.data_ptr(),
        packed.bit_options,
        packed.scale.data_ptr(),
        packed.zero_point.data_ptr(),
    )


def _new_packed(
    bits: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    options: tuple[int, ...],
    batch: int,
    channels: int,
    height: int,
    width: int,
) -> PackedActivation:
    size = row_bytes(options, channels, height, width)
    data = torch.empty(batch, size, dtype=torch.uint8, device=_CPU)
    return PackedActivation.unchecked(
        data, bits, scale, zero_point, options, channels, height, width
    )


def _widths(bits: Any, batch: int) -> Tensor:
    """``bits`` as an int32 (N,) tensor."""
    if _is_ready(bits, torch.int32, (batch,)):
        ready: Tensor = bits
        return ready
    try:
        found = widths_of(bits, batch, _CPU)
    except (TypeError, ValueError) as error:
        raise _DeclinedError from error
    if type(found) is not Tensor:
        raise _DeclinedError
    return found


def _options(scale: Any, bit_options: Any, single: tuple[int, ...] | None) -> tuple[int, ...]:
    try:
        return _packable(infer_options(scale, bit_options, single, "scale"))
    except (TypeError, ValueError) as error:
        raise _DeclinedError from error


def _packable(options: tuple[int, ...]) -> tuple[int, ...]:
    """The ``options`` that :func:`check_packable` lets through."""
    last = 0
    for bits in options:
        if type(bits) is not int or bits <= last or bits not in KERNEL_WIDTHS:
            raise _DeclinedError
        last = bits
    if last == 0:
        raise _DeclinedError
    return options


def _quantizer(scale: Any, zero_point: Any, options: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    shape = (len(options),)
    steps = _per_width(scale, options, torch.float32, shape, 1.0)
    if zero_point is None:
        return steps, torch.zeros(shape, dtype=torch.int32, device=_CPU)
    return steps, _per_width(zero_point, options, torch.int32, shape, 0)


def _per_width(
    values: Any,
    options: tuple[int, ...],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    fill: float | None,
) -> Tensor:
    """Per-width values as one tensor of ``shape``: the one given, where it is that."""
    if type(values) is dict:
        found = _stacked(values, options, dtype, shape[1:], fill)
        if found is not None:
            return found
    if not _is_ready(values, dtype, shape):
        try:
            values = per_width(values, options, "", dtype, _CPU, shape[1:], fill)
        except (TypeError, ValueError) as error:
            raise _DeclinedError from error
        if not _is_ready(values, dtype, shape):
            raise _DeclinedError
    ready: Tensor = values
    return ready


def _stacked(
    values: dict[Any, Any],
    options: tuple[int, ...],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    fill: float | None,
) -> Tensor | None:
    """What :func:`per_width` makes of a dict with nothing to convert, else None."""
    rows: list[Any] = [values.get(bits, fill if bits == 32 else None) for bits in options]
    kinds = {type(row) for row in rows}
    if kinds == {float} and not shape and dtype is torch.float32:
        # A default dtype of half precision would round the numbers to that first.
        if torch.get_default_dtype() is torch.float32:
            return torch.tensor(rows, dtype=dtype, device=_CPU)
    elif kinds == {int} and not shape and dtype is torch.int32:
        if all(0 <= row <= _MAX_ZERO_POINT for row in rows):
            return torch.tensor(rows, dtype=dtype, device=_CPU)
    elif all(_is_ready(row, dtype, shape) for row in rows):
        return torch.stack(rows)
    return None


def _bias(bias: Any, out_channels: int) -> Tensor:
    if not _is_ready(bias, torch.float32, (out_channels,)):
        if type(bias) not in _PLAIN or not bias.is_floating_point():
            raise _DeclinedError
        bias = bias.to(torch.float32).contiguous()
        if not _is_ready(bias, torch.float32, (out_channels,)):
            raise _DeclinedError
    found: Tensor = bias
    return found
