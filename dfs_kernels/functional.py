"""The public functions over the ops: they check their arguments, then call one op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dfs_kernels import backends, direct, ops  # noqa: F401  (ops registers torch.ops.dfs)
from dfs_kernels.arguments import (
    PerWidth,
    PerWidthInt,
    bias_of,
    infer_options,
    only_entry,
    quantizer_of,
    widths_of,
)
from dfs_kernels.backends.measured import ConvProblem
from dfs_kernels.block import (
    BlockConv,
    BlockOutput,
    Stream,
    check_block,
    costliest_convolution,
    flatten_block,
    offered_widths,
    stored_bits,
)
from dfs_kernels.gate import GateStep, RNNGateWeights, check_choices
from dfs_kernels.geometry import ConvGeometry, IntPair
from dfs_kernels.packing import (
    PackedActivation,
    PackedConvWeight,
    Quantizer,
    check_float_weight,
    check_packable,
    per_width,
    resolve_levels,
)
from dfs_kernels.triton.tuning import tuning
from dfs_kernels.widths import INTEGER_WIDTHS, KERNEL_WIDTHS, check_accumulator


def pack_bits(codes: Tensor, bits: int, *, backend: str | None = None) -> Tensor:
    """Pack integer codes, the lowest channel in the lowest bits of a byte.

    Args:
        codes: int8 or uint8 (..., C); the low ``bits`` bits of each are kept.
        bits: 2, 4 or 8.

    Returns:
        uint8 (..., ceil(C*bits/8)); codes beyond C are zero.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_pack_width(bits)
    _check_tensor(codes, "codes")
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"codes must be int8 or uint8, got {codes.dtype}")
    if codes.dim() < 1 or codes.shape[-1] == 0:
        raise ValueError(f"codes must be (..., C) with C > 0, got {tuple(codes.shape)}")
    name = backends.select_name("pack_bits", backend, codes.device, (bits,))
    result: Tensor = torch.ops.dfs.pack_bits(codes, bits, backend=name)
    return result


def unpack_bits(
    packed: Tensor, bits: int, channels: int, signed: bool, *, backend: str | None = None
) -> Tensor:
    """Undo :func:`pack_bits`.

    Args:
        packed: uint8 (..., ceil(channels*bits/8)).

    Returns:
        (..., channels): int8 in two's complement if ``signed``, else uint8.
    """
    _check_pack_width(bits)
    _check_tensor(packed, "packed")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels must be a positive int, got {channels!r}")
    expected = (channels * bits + 7) // 8
    if packed.dim() < 1 or packed.shape[-1] != expected:
        raise ValueError(
            f"packed must have {expected} bytes for {channels} channels at {bits} bits, "
            f"got shape {tuple(packed.shape)}"
        )
    name = backends.select_name("unpack_bits", backend, packed.device, (bits,))
    result: Tensor = torch.ops.dfs.unpack_bits(packed, bits, channels, bool(signed), backend=name)
    return result


def quantize_pack(
    input: Tensor,
    bits: int | Tensor,
    scale: PerWidth,
    zero_point: PerWidthInt | None = None,
    *,
    bit_options: Sequence[int] | None = None,
    backend: str | None = None,
) -> PackedActivation:
    """Quantize and pack a batch, each sample at its own width.

    Args:
        input: floating (N, C, H, W).
        bits: an int, or an integer tensor (N,) on the input's device; 0 leaves a row unspecified.
        scale, zero_point: per width: a tensor indexed like ``bit_options``, a dict keyed by width,
            or a number when ``bits`` is an int. Zero points default to 0.
        bit_options: the widths on offer; taken from a dict's keys, from ``bits`` if it is an int
            and the scale a single value, and else from the length (3: 2/4/8, 4: 2/4/8/32).

    Raises:
        TypeError, ValueError: naming the argument; for a CPU also for a width in ``bits`` that is
            no option and for scales outside [2^-126, 2^126].
    """
    if _may_bypass_ops():
        packed = direct.quantize_pack(input, bits, scale, zero_point, bit_options, backend)
        if packed is not None:
            return packed
    _check_image(input, "input")
    single = (bits,) if isinstance(bits, int) and bits != 0 else None
    options = check_packable(infer_options(scale, bit_options, single, "scale"), "bit_options")
    quantizer = quantizer_of(scale, zero_point, options, "scale", "zero_point", input.device)
    samples = widths_of(bits, input.shape[0], input.device)
    name = backends.select_name("quantize_pack", backend, input.device, options)
    data = torch.ops.dfs.quantize_pack(
        input.detach().to(torch.float32),
        samples,
        quantizer.scale.detach(),
        quantizer.zero_point,
        bit_options=options,
        backend=name,
    )
    return PackedActivation(
        data, samples, quantizer.scale.detach(), quantizer.zero_point, options, *input.shape[1:]
    )


def fake_quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, backend: str | None = None
) -> Tensor:
    """The values that storing a tensor at one width leaves, with straight-through gradients.

    Args:
        input: floating, any shape. Its gradient passes where the value is in range.
        scale: floating, 0-dimensional. It gets the gradient of Esser et al. (ICLR 2020), section
            2.1, scaled by 1/sqrt(elements * (2^bits - 1)); the sum over the elements is in float64,
            in an order that the number of threads does not change.
        zero_point: int32, 0-dimensional.
        bits: 1 to 16.
        backend: one of :func:`available_backends`, or None for the default. The
            reference serves those for GPUs.

    Returns:
        float32, of the input's shape.

    Raises:
        TypeError, ValueError: naming the argument; for a CPU also for a scale outside
            [2^-126, 2^126] and a zero point outside [0, 2^bits - 1].
    """
    for value, name in ((input, "input"), (scale, "scale"), (zero_point, "zero_point")):
        _check_tensor(value, name)
    for value, name in ((input, "input"), (scale, "scale")):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if zero_point.dtype != torch.int32:
        raise TypeError(f"zero_point must be int32, got {zero_point.dtype}")
    for value, name in ((scale, "scale"), (zero_point, "zero_point")):
        if value.dim() != 0:
            raise ValueError(f"{name} must be 0-dimensional, got {tuple(value.shape)}")
    if isinstance(bits, bool) or bits not in INTEGER_WIDTHS:
        raise ValueError(f"bits must be 1 to 16, got {bits!r}")
    # Any width will do, so that none is named.
    name = backends.select_name("fake_quantize", backend, input.device, ())
    if name != "cpu":
        name = "reference"
    result: Tensor = torch.ops.dfs.fake_quantize(
        input.to(torch.float32), scale.to(torch.float32), zero_point, bits=bits, backend=name
    )
    return result


def unpack_dequantize(packed: PackedActivation, *, backend: str | None = None) -> Tensor:
    """The float32 (N, C, H, W) values that a packed activation stands for.

    A sample stored at 0 bits gives zeros.
    """
    if _may_bypass_ops():
        values = direct.unpack_dequantize(packed, backend)
        if values is not None:
            return values
    if not isinstance(packed, PackedActivation):
        raise TypeError(f"packed must be a PackedActivation, got {type(packed).__name__}")
    name = backends.select_name("unpack_dequantize", backend, packed.device, packed.bit_options)
    result: Tensor = torch.ops.dfs.unpack_dequantize(
        packed.data,
        packed.bits,
        packed.scale,
        packed.zero_point,
        bit_options=packed.bit_options,
        channels=packed.channels,
        height=packed.height,
        width=packed.width,
        backend=name,
    )
    return result


def mixed_conv2d(
    input: Tensor | PackedActivation,
    weight: Tensor | PackedConvWeight,
    bits: int | Tensor,
    input_scale: PerWidth | None = None,
    input_zero_point: PerWidthInt | None = None,
    *,
    weight_scale: PerWidth | None = None,
    mul: PerWidth | None = None,
    add: PerWidth | None = None,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    residual: Tensor | PackedActivation | None = None,
    activation: str | None = None,
    output_scale: PerWidth | None = None,
    output_zero_point: PerWidthInt | None = None,
    output_bits: int | None = None,
    bit_options: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor | PackedActivation:
    """Convolve every sample of a batch at its own bitwidth.

    A sample at 2, 4 or 8 bits is quantized and convolved in integers; at 32 bits it is a float32
    convolution; at 0 bits nothing is computed, and its result is 0 or its residual, untouched.
    Then, in this order: times ``mul`` plus ``add``, plus ``residual``, ``activation``,
    requantization. Differentiable with respect to the float tensors unless the input or the output
    is packed. On a GPU nothing waits for the host if per-width values are tensors there: numbers
    and dicts of numbers are copied from the host, which waits and can't be captured in a graph.

    Args:
        input: floating (N, C, H, W), or packed. A packed input's codes are used as they are, at
            the samples' own widths, unless ``input_scale`` is given to quantize them again.
        weight: packed, or floating (O, C/groups, KH, KW) together with ``weight_scale``.
        bits: an int, or an integer tensor (N,) on the input's device, of 0 and the options.
        input_scale: the step per width, (len(options),) or a dict keyed by width; entries for 32
            are ignored. Not needed where every sample is at 32 bits.
        input_zero_point: integers in [0, 2^b - 1] per width; 0 by default.
        weight_scale: steps of a float weight, (len(options), O) or a dict of (O,).
        mul, add: per width and output channel, (len(options), O) or a dict of (O,), 32 included.
        bias: (O,).
        stride, dilation: an int or a pair (vertical, horizontal).
        padding: an int, a pair, or (left, right, top, bottom).
        residual: floating (N, O, OH, OW), or packed.
        activation: None or "relu".
        output_scale, output_zero_point: given, the result is packed with them.
        output_bits: one width for all samples of a packed result; None for each sample's own.
        bit_options: the widths of a float weight, by default a dict's keys, and else from the
            length of the per-width tensors (3: 2/4/8, 4: 2/4/8/32). A float weight offers 32 too.
        backend: one of :func:`available_backends`, or None for the default.

    Returns:
        float32 (N, O, OH, OW), channels_last if the input is that and not contiguous; or a
        :class:`PackedActivation`.

    Raises:
        TypeError, ValueError: naming the argument. On a CPU also for a width in ``bits`` that is no
            option, with its index; on a GPU that sample's result is NaN (0xFF if packed) instead.
    """
    if weight_scale is None and _may_bypass_ops():
        found = direct.mixed_conv2d(
            input,
            weight,
            bits,
            input_scale,
            input_zero_point,
            mul,
            add,
            bias,
            stride,
            padding,
            dilation,
            groups,
            residual,
            activation,
            output_scale,
            output_zero_point,
            output_bits,
            bit_options,
            backend,
        )
        if found is not None:
            return found
    call = _Prepared(
        input,
        weight,
        bits,
        input_scale,
        input_zero_point,
        weight_scale,
        mul,
        add,
        bias,
        ConvArguments(stride, padding, dilation, groups),
        residual,
        activation,
        bit_options,
        backend,
    )
    output_options: tuple[int, ...] = ()
    scale = zero_point = None
    if output_scale is not None:
        if output_bits is None:
            output_options = check_packable(call.options, "bit_options")
        else:
            output_options = check_packable((output_bits,), "output_bits")
            output_scale = only_entry(output_scale, output_bits, call.options)
            if output_zero_point is not None:
                output_zero_point = only_entry(output_zero_point, output_bits, call.options)
        out = quantizer_of(
            output_scale,
            output_zero_point,
            output_options,
            "output_scale",
            "output_zero_point",
            call.device,
        )
        scale, zero_point = out.scale.detach(), out.zero_point
    elif output_bits is not None or output_zero_point is not None:
        raise ValueError("output_bits and output_zero_point need output_scale")
    result: Tensor = torch.ops.dfs.mixed_conv2d(
        **call.tensors,
        output_scale=scale,
        output_zero_point=zero_point,
        output_options=output_options,
        output_bits=-1 if output_bits is None else output_bits,
        backward_backend=call.select_backward(backend),
        **call.scalars,
    )
    if scale is None or zero_point is None:
        return result
    stored = call.bits if output_bits is None else torch.full_like(call.bits, output_bits)
    return PackedActivation(
        result, stored, scale, zero_point, output_options, *call.output_shape[1:]
    )


def mixed_conv2d_(
    input: Tensor | PackedActivation,
    weight: Tensor | PackedConvWeight,
    bits: int | Tensor,
    input_scale: PerWidth | None = None,
    input_zero_point: PerWidthInt | None = None,
    *,
    residual: Tensor | PackedActivation,
    weight_scale: PerWidth | None = None,
    mul: PerWidth | None = None,
    add: PerWidth | None = None,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: str | None = None,
    bit_options: Sequence[int] | None = None,
    backend: str | None = None,
) -> None:
    """:func:`mixed_conv2d`, adding into ``residual`` in place.

    A packed residual keeps its widths, steps and zero points; a skipped sample's row or values are
    not touched. Not differentiable.

    Raises:
        RuntimeError: a tensor requires a gradient and gradients are enabled.
    """
    if weight_scale is None and _may_bypass_ops():
        if direct.mixed_conv2d_(
            input,
            weight,
            bits,
            input_scale,
            input_zero_point,
            mul,
            add,
            bias,
            stride,
            padding,
            dilation,
            groups,
            residual,
            activation,
            bit_options,
            backend,
        ):
            return
    if residual is None:
        raise TypeError("residual must be a tensor or a PackedActivation, got None")
    if isinstance(residual, Tensor) and residual.dtype != torch.float32:
        raise TypeError(f"residual must be float32 to be added into, got {residual.dtype}")
    if isinstance(residual, Tensor) and _is_expanded(residual):
        raise ValueError("residual must not be expanded to be added into: its values share memory")
    call = _Prepared(
        input,
        weight,
        bits,
        input_scale,
        input_zero_point,
        weight_scale,
        mul,
        add,
        bias,
        ConvArguments(stride, padding, dilation, groups),
        residual,
        activation,
        bit_options,
        backend,
    )
    if torch.is_grad_enabled():
        for name, tensor in call.tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"mixed_conv2d_ is not differentiable, but {name} requires a gradient; "
                    "use mixed_conv2d, or torch.no_grad()"
                )
    torch.ops.dfs.mixed_conv2d_(**call.tensors, **call.scalars)


class ConvArguments:
    """Stride, padding, dilation and groups as they were given."""

    def __init__(self, stride: IntPair, padding: IntPair, dilation: IntPair, groups: int) -> None:
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups


class _Prepared:
    """The arguments of a mixed convolution, checked and flattened for the ops."""

    def __init__(
        self,
        input: Tensor | PackedActivation,
        weight: Tensor | PackedConvWeight,
        bits: int | Tensor,
        input_scale: PerWidth | None,
        input_zero_point: PerWidthInt | None,
        weight_scale: PerWidth | None,
        mul: PerWidth | None,
        add: PerWidth | None,
        bias: Tensor | None,
        conv: ConvArguments,
        residual: Tensor | PackedActivation | None,
        activation: str | None,
        bit_options: Sequence[int] | None,
        backend: str | None,
    ) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f"activation must be None or 'relu', got {activation!r}")
        if not isinstance(input, PackedActivation):
            _check_image(input, "input")
        self.device = device = input.device
        all_32 = isinstance(bits, int) and bits == 32
        if isinstance(weight, PackedConvWeight):
            if weight_scale is not None:
                raise ValueError("weight_scale goes with a float weight; a packed one has its own")
            if bit_options is not None and tuple(bit_options) != weight.bit_options:
                raise ValueError(
                    f"bit_options {tuple(bit_options)} differ from weight's {weight.bit_options}"
                )
            options = weight.bit_options
            shape = weight.shape
            centred = weight.centred
            if weight.device != device:
                raise ValueError(f"weight is on {weight.device}, but the input is on {device}")
            data, scale = weight.buffer, weight.scales
        else:
            check_float_weight(weight)
            if weight.device != device:
                raise ValueError(f"weight is on {weight.device}, but the input is on {device}")
            options = _float_weight_options(
                weight_scale, input_scale, mul, add, bit_options, all_32
            )
            shape = (weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3])
            centred = tuple(kind == "centred" for kind in resolve_levels(options))
            data = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
            scale = None
            if weight_scale is not None:
                scale = per_width(
                    weight_scale, options, "weight_scale", torch.float32, device, shape[:1], 1.0
                )
            elif options != (32,):
                raise ValueError("weight_scale is needed with a float weight")
        self.options = options
        self.geometry = geometry = ConvGeometry.create(
            input.shape[1], shape, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        check_accumulator(geometry.taps, options, centred)
        self.bits = widths_of(bits, input.shape[0], device)
        height, width = input.shape[2:]
        self.output_shape = (input.shape[0], shape[0], *geometry.output_size(height, width))
        out_channels = shape[:1]

        if not isinstance(input, PackedActivation):
            float_weight = not isinstance(weight, PackedConvWeight)
            allowed = all_32 and float_weight and input.dtype == torch.float64
            values = input if allowed else input.to(torch.float32)
            if allowed and data.dtype != torch.float64:
                raise TypeError(f"weight must be float64 like the input, got {data.dtype}")
        else:
            values = input.data
        if data.dtype == torch.float64 and values.dtype != torch.float64:
            data = data.to(torch.float32)
        real = values.dtype if values.dtype == torch.float64 else torch.float32

        quantizer = None
        if input_scale is not None:
            quantizer = quantizer_of(
                input_scale, input_zero_point, options, "input_scale", "input_zero_point", device
            )
        elif input_zero_point is not None:
            raise ValueError("input_zero_point needs input_scale")
        elif not isinstance(input, PackedActivation) and options != (32,) and not all_32:
            raise ValueError("input_scale is needed to quantize a float input")

        # An implied 32-bit option has no entry in mul and add; what they would hold is not used.
        def affine(value: PerWidth | None, name: str) -> Tensor | None:
            if value is None:
                return None
            return per_width(value, options, name, real, device, out_channels)

        if bias is not None:
            bias = bias_of(bias, shape[0], real, device)
        added = self._residual(residual, real)
        packed = input if isinstance(input, PackedActivation) else None
        into = residual if isinstance(residual, PackedActivation) else None
        # Float weights are quantized in every call, which no table knows of.
        problem = None
        if isinstance(weight, PackedConvWeight):
            problem = ConvProblem(geometry, height, width, input.shape[0])
        name = self.select("mixed_conv2d", backend, problem)
        self.in_double = values.dtype == torch.float64
        if self.in_double and name != "reference":
            if backend is not None:
                raise TypeError(f"backend {backend!r} does not take float64; the reference does")
            name = "reference"
        tiles = None
        if isinstance(weight, PackedConvWeight):
            tiles = weight.tiles(name, geometry)
        elif name != "reference":
            data = data.contiguous()
        self.tensors: dict[str, Tensor | None] = {
            "input": values,
            "weight": data,
            "bits": self.bits,
            "packed_bits": packed.bits if packed else None,
            "packed_scale": packed.scale if packed else None,
            "packed_zero_point": packed.zero_point if packed else None,
            "input_scale": quantizer.scale if quantizer else None,
            "input_zero_point": quantizer.zero_point if quantizer else None,
            "weight_scale": scale,
            "weight_tiles": tiles,
            "bias": bias,
            "mul": affine(mul, "mul"),
            "add": affine(add, "add"),
            "residual": added,
            "residual_bits": into.bits if into else None,
            "residual_scale": into.scale if into else None,
            "residual_zero_point": into.zero_point if into else None,
        }
        self.scalars = {
            "bit_options": options,
            "centred": centred,
            "packed_options": packed.bit_options if packed else (),
            "in_height": height,
            "in_width": width,
            "residual_options": into.bit_options if into else (),
            "relu": activation == "relu",
            "backend": name,
            **geometry.fields(),
        }

    def select(self, op: str, backend: str | None, problem: ConvProblem | None = None) -> str:
        return backends.select_name(op, backend, self.device, self.options, problem)

    def select_backward(self, backend: str | None) -> str:
        if self.in_double:
            return "reference"
        return self.select("mixed_conv2d_backward", backend)

    def _residual(
        self, residual: Tensor | PackedActivation | None, real: torch.dtype
    ) -> Tensor | None:
        if residual is None:
            return None
        if tuple(residual.shape) != self.output_shape:
            raise ValueError(
                f"residual must have the output's shape {self.output_shape}, "
                f"got {tuple(residual.shape)}"
            )
        if residual.device != self.device:
            raise ValueError(f"residual is on {residual.device}, but the input is on {self.device}")
        if isinstance(residual, PackedActivation):
            return residual.data
        if not residual.is_floating_point():
            raise TypeError(f"residual must be floating point, got {residual.dtype}")
        return residual.to(real)


def rnn_gate(
    input: Tensor | PackedActivation,
    weights: RNNGateWeights,
    choices: Sequence[int],
    state: Tensor | None = None,
    *,
    backend: str | None = None,
) -> GateStep:
    """Choose a width for every sample: global average pool, linear map, LSTM step, argmax.

    Computes in float64, from exact sums where the features are packed integers. Equal logits go to
    the cheapest choice. Not differentiable. Source: Shen et al., AAAI 2020, section 3.2.

    Args:
        input: the features, floating (N, C, H, W) or packed.
        weights: the gate's parameters.
        choices: ascending widths from 0 to 32.
        state: the ``state`` of the previous gate's result, float64 (2, N, H); None at the first.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(weights, RNNGateWeights):
        raise TypeError(f"weights must be RNNGateWeights, got {type(weights).__name__}")
    if _may_bypass_ops():
        step = direct.rnn_gate(input, weights, choices, state, backend)
        if step is not None:
            return step
    packed = input if isinstance(input, PackedActivation) else None
    if packed is None:
        _check_image(input, "input")
    batch, channels, height, width = input.shape
    widths, state = _check_gate(weights, choices, state, batch, channels, input.device)
    options = packed.bit_options if packed else ()
    name = backends.select_name("rnn_gate", backend, input.device, options)
    values = packed.data if packed else input.detach().to(torch.float32)  # type: ignore[union-attr]
    found = torch.ops.dfs.rnn_gate(
        values,
        packed.bits if packed else None,
        packed.scale if packed else None,
        packed.zero_point if packed else None,
        state,
        *(value.detach() for value in weights),
        packed_options=options,
        channels=channels,
        height=height,
        width=width,
        choices=widths,
        backend=name,
    )
    return GateStep(*found)


def _check_gate(
    weights: RNNGateWeights,
    choices: Sequence[int],
    state: Tensor | None,
    batch: int,
    channels: int,
    device: torch.device,
) -> tuple[tuple[int, ...], Tensor | None]:
    """The choices and the state of a gate that sees so many channels, as the ops take them."""
    widths = check_choices(choices)
    weights.check(channels, len(widths), device)
    if state is None:
        return widths, None
    _check_tensor(state, "state")
    expected = (2, batch, weights.hidden)
    if tuple(state.shape) != expected or state.dtype != torch.float64:
        raise ValueError(
            f"state must be float64 {expected}, got {state.dtype} {tuple(state.shape)}"
        )
    if state.device != device:
        raise ValueError(f"state is on {state.device}, but the input is on {device}")
    return widths, state.detach().contiguous()


def gated_block(
    stream: Stream,
    bits: int | Tensor,
    branch: Sequence[BlockConv],
    shortcut: BlockConv | None = None,
    *,
    shortcut_bits: int | Tensor = 8,
    output_scale: PerWidth | None = None,
    output_zero_point: PerWidthInt | None = None,
    output_bits: int = 8,
    rectifies_skipped: bool = True,
    gate: RNNGateWeights | None = None,
    choices: Sequence[int] = (),
    state: Tensor | None = None,
    backend: str | None = None,
) -> BlockOutput:
    """A residual block in evaluation, and the width that its gate chooses for the next block.

    ReLU(carried + branch), each sample at its own width: the first convolution quantizes the
    stream, the others read what the one before them packed at the sample's width, with a ReLU
    between them; the last adds to what is carried, rectifies and stores. Then :func:`rnn_gate`
    of what the stream has become. It is what :func:`mixed_conv2d`, :func:`mixed_conv2d_` and
    :func:`rnn_gate` give one by one, bit for bit, as one op. Not differentiable.

    **Identity block** (no ``shortcut``): the stream is carried and updated in place. A skipped
    sample's is not touched. **Down-sampling block**: its ``shortcut`` is computed for every sample
    and carried, and the stream is a new one; that of a skipped sample is the shortcut's, with a
    ReLU unless ``rectifies_skipped`` says otherwise.

    On a GPU every convolution and the gate are one launch each on the backend "cuda", so three for
    a basic identity block; convolutions that offer 32 bits too take one more. Nothing waits for the
    host, and the call can be captured in a CUDA graph if ``bits``, ``shortcut_bits``,
    ``output_scale`` and ``output_zero_point`` are tensors there, and one call came before it,
    which re-tiles the weights. The next block's call takes ``step.bits`` and ``step.state`` as they
    are, so a graph can hold a whole network. (On a CPU the functions one by one take less time,
    since they pass by the dispatcher.)

    Args:
        stream: float32 (N, C, H, W), or packed; contents of an identity block are overwritten.
        bits: an int, or an integer tensor (N,), of 0 and the widths of ``branch``.
        branch: two convolutions (a basic block), three (a bottleneck) or more, all of the same
            widths.
        shortcut: the convolution around the branch.
        shortcut_bits: its width, alike.
        output_scale, output_zero_point: of the packed stream that a block with a shortcut writes,
            one value each; without them it is float32.
        output_bits: the width of that stream.
        rectifies_skipped: see above. It is a float32 stream that is rectified: codes with the zero
            point 0 hold no negatives, those with another keep a skipped sample's.
        gate: of the next block, seeing this one's output. None: no decision.
        choices, state: as in :func:`rnn_gate`.

    Raises:
        TypeError, ValueError: naming the argument; for widths that are no option as
            :func:`mixed_conv2d`.
        RuntimeError: the stream requires a gradient and gradients are enabled.
    """
    device, batch = stream.device, stream.shape[0]
    values = _stream_values(stream, is_written=shortcut is None)
    shape = check_block(stream.shape, branch, shortcut, device)
    widths: tuple[int, ...] = ()
    if gate is None:
        state = None
    else:
        if not isinstance(gate, RNNGateWeights):
            raise TypeError(f"gate must be RNNGateWeights, got {type(gate).__name__}")
        widths, state = _check_gate(gate, choices, state, batch, shape[1], device)
    name = backends.select_name(
        "gated_block",
        backend,
        device,
        offered_widths(branch, shortcut),
        costliest_convolution(stream.shape, branch),
    )
    tensors, scalars = flatten_block(stream, branch, shortcut, name)
    tensors.update(
        stream=values,
        bits=widths_of(bits, batch, device),
        gate=[] if gate is None else [value.detach() for value in gate],
        state=state,
    )
    scalars.update(choices=widths, backend=name)
    result: Stream
    if shortcut is None:
        if output_scale is not None or output_zero_point is not None:
            raise ValueError("output_scale and output_zero_point need a shortcut")
        result, step = stream, torch.ops.dfs.gated_block_(**tensors, **scalars)
    else:
        output = _stream_quantizer(output_scale, output_zero_point, output_bits, device)
        written, *step = torch.ops.dfs.gated_block(
            **tensors,
            shortcut_bits=widths_of(shortcut_bits, batch, device),
            output_scale=output.scale if output else None,
            output_zero_point=output.zero_point if output else None,
            output_options=output.options if output else (),
            rectifies_skipped=rectifies_skipped,
            **scalars,
        )
        result = written
        if output is not None:
            stored = stored_bits(stream, tensors["bits"], output_bits)
            result = PackedActivation(
                written, stored, output.scale, output.zero_point, output.options, *shape[1:]
            )
    return BlockOutput(result, None if gate is None else GateStep(*step))


def _stream_quantizer(
    scale: PerWidth | None, zero_point: PerWidthInt | None, bits: int, device: torch.device
) -> Quantizer | None:
    """Of the stream that a block writes; None for a float one."""
    if scale is None:
        if zero_point is not None:
            raise ValueError("output_zero_point needs output_scale")
        return None
    options = check_packable((bits,), "output_bits")
    found = quantizer_of(scale, zero_point, options, "output_scale", "output_zero_point", device)
    return Quantizer(options, found.scale.detach(), found.zero_point)


def _stream_values(stream: Stream, is_written: bool) -> Tensor:
    """A stream as the ops take it: a float one that is written has to be float32 as it is."""
    if isinstance(stream, PackedActivation):
        return stream.data
    _check_image(stream, "stream")
    if stream.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "gated_block is not differentiable, but stream requires a gradient; use torch.no_grad()"
        )
    if not is_written:
        return stream.to(torch.float32)
    if stream.dtype != torch.float32:
        raise TypeError(f"stream must be float32 to be added into, got {stream.dtype}")
    if _is_expanded(stream):
        raise ValueError("stream must not be expanded to be added into: its values share memory")
    return stream


def _is_expanded(x: Tensor) -> bool:
    """Whether several elements are one place in memory, by a stride of 0."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def warmup(
    device: torch.device | str | None = None,
    run: Callable[[], object] | None = None,
    *,
    autotune: bool = False,
) -> None:
    """Pay for the first call ahead of time: load the backends, start the threads, compile kernels.

    Args:
        device: where; a CPU by default.
        run: makes the calls to be ready for, such as ``lambda: model(images)``. By default one
            small convolution at every width.
        autotune: measure which launch configuration suits each Triton kernel that ``run`` calls.
            Takes seconds to minutes, is kept on disk (see README, DFS_CACHE_DIR) and serves all
            later runs with the same sizes on GPUs of the same name. Results do not change.

    Raises:
        ValueError: there is nothing to tune on this device, or ``run`` is missing.
    """
    target = torch.device(device or "cpu")
    if not autotune:
        (run or functools.partial(_run_every_width, target))()
        return
    triton = backends.load("triton")
    reason = triton.unavailable_reason()
    if reason is not None or not triton.supports(target.type, KERNEL_WIDTHS):
        raise ValueError(
            "autotune: only Triton's kernels have something to tune, and they don't run on "
            f"{target}" + (f": {reason}" if reason else "")
        )
    if run is None:
        raise ValueError("run must be given with autotune: it makes the calls to tune for")
    with tuning():
        run()


def _run_every_width(device: torch.device) -> None:
    x = torch.zeros(2, 8, 4, 4, device=device)
    weight = PackedConvWeight.from_float(
        torch.zeros(8, 8, 3, 3, device=device), {b: torch.ones(8, device=device) for b in (2, 4, 8)}
    )
    for bits in weight.bit_options:
        mixed_conv2d(x, weight, bits, {2: 1.0, 4: 1.0, 8: 1.0, 32: 1.0}, padding=1)


# As registered; what takes their place for a while wants to see the calls.
_REGISTERED_OPS = torch.ops.dfs


def _may_bypass_ops() -> bool:
    """Whether nobody will notice that an op is not called."""
    # The compiler comes first: it reads this function too, and can follow it no further.
    return (
        not torch.compiler.is_dynamo_compiling()
        and torch.ops.dfs is _REGISTERED_OPS
        and direct.is_unwatched()
    )


def _check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_pack_width(bits: int) -> None:
    if isinstance(bits, bool) or bits not in KERNEL_WIDTHS or bits == 32:
        raise ValueError(f"bits must be 2, 4 or 8, got {bits!r}")


def _check_image(value: object, name: str) -> None:
    _check_tensor(value, name)
    assert isinstance(value, Tensor)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.dim() != 4:
        raise ValueError(f"{name} must be (N, C, H, W), got {tuple(value.shape)}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must not be empty but for N, got {tuple(value.shape)}")


def _float_weight_options(
    weight_scale: PerWidth | None,
    input_scale: PerWidth | None,
    mul: PerWidth | None,
    add: PerWidth | None,
    bit_options: Sequence[int] | None,
    all_32: bool,
) -> tuple[int, ...]:
    """The widths of a float weight. 32 is among them, as it needs no steps."""
    known = weight_scale if weight_scale is not None else input_scale
    if known is None and bit_options is None and all_32:
        return (32,)
    options = infer_options(known, bit_options, None, "weight_scale")
    if 32 in options:
        return options
    # Without an entry for 32, a folded affine says nothing about that width.
    for values in (mul, add):
        if isinstance(values, Mapping) and 32 not in values:
            return options
        if isinstance(values, Tensor) and len(values) == len(options):
            return options
    return (*options, 32)
