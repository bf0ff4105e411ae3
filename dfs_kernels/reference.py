"""The truth: quantization, packing and mixed-bitwidth convolution in plain PyTorch.

Written to be checked by eye against the formulas, not to be fast. For a sample at b bits::

    t = x * (1 / s)
    q_x = round_half_even(min(max(t, -z), 2^b - 1 - z)) + z                max(NaN, lo) = lo
    acc = sum over the window of (q_x - z) * level(q_w)                    exact
    y = float32(acc) * m + c                                               two roundings
    m = float32(double(s_x) * s_w * mul)     c = float32(double(bias) * mul + add)

Integer sums are taken in float64, which is exact below 2^53, and never by a library convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dfs_kernels.call import ConvCall, ConvGradients, ConvWeight, GradientsWanted
from dfs_kernels.gate import GateCall, GateStep
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import PackedActivation, row_bytes
from dfs_kernels.widths import activation_max, weight_range

# Packing


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Integer codes (..., C) -> uint8 (..., ceil(C*bits/8)), lowest channel in the lowest bits."""
    per_byte = 8 // bits
    low = codes.to(torch.int64) & ((1 << bits) - 1)
    low = F.pad(low, (0, -low.shape[-1] % per_byte))
    parts = low.unflatten(-1, (low.shape[-1] // per_byte, per_byte))
    shifts = torch.arange(per_byte, device=codes.device) * bits
    return (parts << shifts).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, channels: int, signed: bool) -> Tensor:
    """uint8 (..., ceil(C*bits/8)) -> codes (..., C), int8 if signed, else uint8."""
    shifts = torch.arange(8 // bits, device=packed.device) * bits
    parts = (packed.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    codes = parts.flatten(-2)[..., :channels]
    if not signed:
        return codes.to(torch.uint8)
    sign = 1 << (bits - 1)
    return ((codes ^ sign) - sign).to(torch.int8)


# Quantization


def quantize_activation(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float32 values -> unsigned codes, as int32."""
    t = x * (1.0 / scale)
    lo = -zero_point.to(x.dtype)
    hi = activation_max(bits) - zero_point.to(x.dtype)
    clamped = torch.fmin(torch.fmax(t, lo), hi)  # fmax gives lo for a NaN
    return torch.round(clamped).to(torch.int32) + zero_point


def dequantize_activation(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Unsigned codes -> float32((q - z)) * s."""
    return (codes.to(torch.int32) - zero_point).to(torch.float32) * scale


def quantize_weight(weight: Tensor, bits: int, scale: Tensor, centred: bool) -> Tensor:
    """float32 (O, ...) values and steps (O,) -> signed codes, as int32."""
    lo, hi = weight_range(bits)
    t = weight * (1.0 / scale).view(-1, *[1] * (weight.dim() - 1))
    q = torch.floor(t).clamp(lo, hi) if centred else torch.round(t.clamp(lo, hi))
    return q.to(torch.int32)


def weight_levels(codes: Tensor, centred: bool) -> Tensor:
    """Signed codes -> the integers that are multiplied: q, or 2q + 1 with half the step."""
    codes = codes.to(torch.int32)
    return 2 * codes + 1 if centred else codes


def unpack_weight_levels(packed: Tensor, bits: int, channels: int, centred: bool) -> Tensor:
    """Canonical codes (O, KH, KW, bytes) -> integer levels (O, C/groups, KH, KW)."""
    codes = unpack_bits(packed, bits, channels, signed=True)
    return weight_levels(codes, centred).permute(0, 3, 1, 2)


def dequantize_weight(levels: Tensor, scale: Tensor, centred: bool) -> Tensor:
    """Levels (O, ...) as float64 and steps (O,) -> the values they stand for, in float64."""
    step = scale.double() * (0.5 if centred else 1.0)
    return levels * step.view(-1, *[1] * (levels.dim() - 1))


def fake_quantize(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The float32 values that quantizing leaves."""
    codes = quantize_activation(x, bits, scale, zero_point)
    return dequantize_activation(codes, scale, zero_point)


# Packed activations: rows of one sample each


def pack_rows(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float32 (n, C, H, W) -> canonical rows uint8 (n, bytes) at one width."""
    pixels = x.permute(0, 2, 3, 1)
    if bits == 32:
        return float_bytes(pixels).flatten(1)
    return pack_bits(quantize_activation(pixels, bits, scale, zero_point), bits).flatten(1)


def float_bytes(x: Tensor) -> Tensor:
    """float32 (..., C) -> its bytes, uint8 (..., 4*C).

    A copy, since contiguous() may keep strides of sides of length 1 that view() does not take.
    """
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unpack_rows(rows: Tensor, bits: int, channels: int, height: int, width: int) -> Tensor:
    """Canonical rows -> codes (n, C, H, W), or the float32 values at 32 bits."""
    used = height * width * ((channels * bits + 7) // 8)
    pixels = rows[:, :used].reshape(-1, height, width, used // (height * width))
    if bits == 32:
        values = pixels.clone(memory_format=torch.contiguous_format).view(torch.float32)
        return values.permute(0, 3, 1, 2)
    return unpack_bits(pixels, bits, channels, signed=False).permute(0, 3, 1, 2)


# Convolution


def conv2d_integer(x: Tensor, levels: Tensor, geometry: ConvGeometry) -> Tensor:
    """Exact sums of integer-valued x (n, C, H, W), zero in the padding, with integer levels."""
    windows = _windows(x.double(), geometry)
    weight = levels.double().reshape(geometry.groups, -1, geometry.taps)
    return _image(weight @ windows, x, geometry)


def conv2d_float(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """Convolution in x's precision, every product rounded, then added in a fixed order."""
    windows = _windows(x, geometry)
    weight = weight.to(x.dtype).reshape(geometry.groups, -1, geometry.taps)
    total = x.new_zeros(*windows.shape[:2], weight.shape[1], windows.shape[3])
    for k in range(geometry.taps):
        total = total + weight[:, :, k, None] * windows[:, :, None, k]
    return _image(total, x, geometry)


def _windows(x: Tensor, geometry: ConvGeometry) -> Tensor:
    """(n, C, H, W) -> (n, groups, K, OH*OW)."""
    kernel = (geometry.kernel_h, geometry.kernel_w)
    dilation = (geometry.dilation_h, geometry.dilation_w)
    stride = (geometry.stride_h, geometry.stride_w)
    columns = F.unfold(geometry.pad(x), kernel, dilation=dilation, stride=stride)
    return columns.unflatten(1, (geometry.groups, geometry.taps))


def _image(columns: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    height, width = geometry.output_size(x.shape[2], x.shape[3])
    return columns.reshape(-1, geometry.out_channels, height, width)


def affine(
    acc: Tensor,
    step: Tensor | float,
    bias: Tensor | None,
    mul: Tensor | None,
    add: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """acc (n, O, OH, OW) * m + c, with ``step`` = s_x * s_w (1 at 32 bits) in float64, (O,)."""
    out_channels = acc.shape[1]
    one = torch.ones(out_channels, dtype=torch.float64, device=acc.device)
    gain = one if mul is None else mul.double()
    m = (one * step * gain).to(dtype)
    offset = 0.0 * gain if bias is None else bias.double() * gain
    # Adding 0 too: it makes the -0 of a negative gain 0.
    c = (offset + (0.0 if add is None else add.double())).to(dtype)
    return acc.to(dtype) * m.view(1, -1, 1, 1) + c.view(1, -1, 1, 1)


# Gradients


def input_gradient(
    grad_xq: Tensor, x: Tensor, bits: int, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """Straight-through gradient of x, and of its step (LSQ, Esser et al. 2020, section 2.1).

    Args:
        grad_xq: gradient of the dequantized input, (n, C, H, W).
    """
    t = x * (1.0 / scale)
    lo = -zero_point.to(x.dtype)
    hi = activation_max(bits) - zero_point.to(x.dtype)
    inside = (lo <= t) & (t <= hi)
    slope = torch.where(inside, torch.round(t) - t, t.clamp(lo, hi))
    total = (grad_xq * slope).sum(dtype=torch.float64)
    return grad_xq * inside, total.to(x.dtype) * step_share(x.numel(), bits)


def step_share(count: int, bits: int) -> float:
    """What the gradient of an input step is scaled by, of ``count`` values (section 2.2 there)."""
    return (max(count, 1) * activation_max(bits)) ** -0.5


def weight_gradient(
    grad_wq: Tensor, weight: Tensor, bits: int, scale: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """Straight-through gradient of the weight (O, ...), and of its steps (O,).

    Centred levels lie half a step off the integers, so their formula is that of the usual levels
    with t' = t - 1/2: inside means that t' is between the outermost codes.
    """
    lo, hi = weight_range(bits)
    t = weight * (1.0 / scale).view(-1, *[1] * (weight.dim() - 1))
    offset = 0.5 if centred else 0.0
    shifted = t - offset
    inside = (lo <= shifted) & (shifted <= hi)
    rounded = torch.floor(t) + offset if centred else torch.round(t)
    slope = torch.where(inside, rounded - t, shifted.clamp(lo, hi) + offset)
    share = (weight[0].numel() << (bits - 1)) ** -0.5
    return grad_wq * inside, (grad_wq * slope).flatten(1).sum(1, dtype=torch.float64).to(
        weight.dtype
    ) * share


def conv2d_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    needs_x: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradients of a float convolution with respect to x and weight; zeros where not needed."""
    padded = geometry.pad(x)
    grad_padded, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output.contiguous(),
        padded,
        weight,
        None,
        (geometry.stride_h, geometry.stride_w),
        (0, 0),
        (geometry.dilation_h, geometry.dilation_w),
        False,
        (0, 0),
        geometry.groups,
        (needs_x, needs_weight, False),
    )
    return (
        geometry.unpad(grad_padded) if needs_x else torch.zeros_like(x),
        grad_weight if needs_weight else torch.zeros_like(weight),
    )


# The whole operations, over a batch of mixed widths


def quantize_pack(x: Tensor, out: PackedActivation) -> None:
    """Pack float32 (N, C, H, W), each sample at its own ``out.bits``."""
    for bits in out.bit_options:
        rows = _rows(out.bits, bits)
        if rows.numel():
            _write_rows(out, rows, bits, pack_rows(x[rows], bits, *out.quantizer.at(bits)))
    out.data[_unknown(out.bits, out.bit_options)] = 0xFF


def unpack_dequantize(packed: PackedActivation) -> Tensor:
    """Float32 (N, C, H, W); a sample stored at 0 bits gives zeros."""
    result = torch.zeros(packed.shape, dtype=torch.float32, device=packed.device)
    for bits in packed.bit_options:
        rows = _rows(packed.bits, bits)
        if rows.numel():
            values = unpack_rows(packed.data[rows], bits, *packed.shape[1:])
            if bits != 32:
                values = dequantize_activation(values, *packed.quantizer.at(bits))
            result[rows] = values
    result[_unknown(packed.bits, packed.bit_options)] = torch.nan
    return result


def mixed_conv2d(call: ConvCall, out: Tensor | PackedActivation) -> None:
    """Write y of every sample into ``out``, which may be the residual itself."""
    for bits in (0, *call.weight.options):
        rows = _rows(call.bits, bits)
        if not rows.numel():
            continue
        if bits == 0:
            _skip(call, rows, out)
            continue
        y = _convolve(call, rows, bits)
        if call.residual is not None:
            y = y + _values(call.residual, rows).to(y.dtype)
        if call.relu:
            y = torch.relu(y)
        _store(out, rows, y)
    unknown = _unknown(call.bits, call.weight.options)
    if isinstance(out, Tensor):
        out[unknown] = torch.nan
    else:
        out.data[unknown] = 0xFF


def mixed_conv2d_backward(
    call: ConvCall, grad_output: Tensor, wanted: GradientsWanted
) -> ConvGradients:
    """Gradients given that of y before residual and activation, (N, O, OH, OW).

    Every width's weight gradient is taken over that width's own samples.
    """
    x, weight = call.input, call.weight
    if not isinstance(x, Tensor):
        raise ValueError("gradients of a mixed convolution need a float input, got a packed one")
    count, out_channels = len(weight.options), weight.shape[0]
    quantizer = call.input_quantizer
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_weight = x.new_zeros(weight.shape)
    grad_input_scale = x.new_zeros(count)
    grad_weight_scale = x.new_zeros(count, out_channels)
    grad_mul = x.new_zeros(count, out_channels)
    grad_add = x.new_zeros(count, out_channels)
    for i, bits in enumerate(weight.options):
        rows = _rows(call.bits, bits)
        if not rows.numel():
            continue
        xb, gb = x[rows], grad_output[rows]
        gain = xb.new_ones(out_channels) if call.mul is None else call.mul[i].to(x.dtype)
        if bits == 32 or quantizer is None:
            xq = xb
        else:
            scale, zero_point = quantizer.at(bits)
            xq = dequantize_activation(
                quantize_activation(xb, bits, scale, zero_point), scale, zero_point
            )
        wq = _weight_values(weight, i).to(x.dtype)
        grad_xq, grad_conv = conv2d_backward(
            gb,
            xq,
            wq * gain.view(-1, 1, 1, 1),
            call.geometry,
            wanted.input or wanted.input_scale,
            wanted.weight or wanted.weight_scale or wanted.mul,
        )
        grad_wq = grad_conv * gain.view(-1, 1, 1, 1)
        if wanted.add or wanted.mul:
            grad_add[i] = gb.sum((0, 2, 3), dtype=torch.float64).to(x.dtype)
        if wanted.mul:
            grad_mul[i] = (wq * grad_conv).flatten(1).sum(1, dtype=torch.float64).to(x.dtype)
            if call.bias is not None:
                grad_mul[i] += call.bias.to(x.dtype) * grad_add[i]
        if bits == 32:
            grad_x[rows] = grad_xq
            grad_weight += grad_wq
            continue
        if quantizer is not None:
            grad_x[rows], grad_input_scale[i] = input_gradient(grad_xq, xb, bits, scale, zero_point)
        if not weight.is_packed:
            grad_w, grad_weight_scale[i] = weight_gradient(
                grad_wq, weight.data, bits, weight.step(bits), weight.centred[i]
            )
            grad_weight += grad_w
    return ConvGradients(
        grad_x if wanted.input else None,
        grad_weight if wanted.weight else None,
        grad_input_scale if wanted.input_scale else None,
        grad_weight_scale if wanted.weight_scale else None,
        grad_mul if wanted.mul else None,
        grad_add if wanted.add else None,
    )


def _convolve(call: ConvCall, rows: Tensor, bits: int) -> Tensor:
    """y of the samples ``rows``, all at one non-zero width, before residual and activation."""
    weight = call.weight
    index = weight.options.index(bits)
    mul = None if call.mul is None else call.mul[index]
    add = None if call.add is None else call.add[index]
    if bits == 32:
        x = _values(call.input, rows)
        acc = conv2d_float(x, _weight_values(weight, index), call.geometry)
        return affine(acc, 1.0, call.bias, mul, add, x.dtype)
    if call.input_quantizer is not None:
        scale, zero_point = call.input_quantizer.at(bits)
        codes = quantize_activation(_values(call.input, rows), bits, scale, zero_point)
    else:
        packed = call.input
        assert not isinstance(packed, Tensor)
        scale, zero_point = packed.quantizer.at(bits)
        codes = unpack_rows(packed.data[rows], bits, *packed.shape[1:]).to(torch.int32)
    centred = weight.centred[index]
    acc = conv2d_integer(codes - zero_point, _weight_levels(weight, index), call.geometry)
    step = scale.double() * dequantize_weight(
        torch.ones_like(weight.step(bits), dtype=torch.float64), weight.step(bits), centred
    )
    return affine(acc, step, call.bias, mul, add)


def _weight_levels(weight: ConvWeight, index: int) -> Tensor:
    bits, centred = weight.options[index], weight.centred[index]
    if weight.is_packed:
        codes = weight.layout.segment(weight.data, bits)
        return unpack_weight_levels(codes, bits, weight.shape[1], centred)
    return weight_levels(quantize_weight(weight.data, bits, weight.step(bits), centred), centred)


def _weight_values(weight: ConvWeight, index: int) -> Tensor:
    """The values that a width stands for: float32, or the float weight as it is at 32 bits."""
    bits = weight.options[index]
    if bits != 32:
        levels = _weight_levels(weight, index).double()
        return dequantize_weight(levels, weight.step(bits), weight.centred[index]).float()
    if weight.is_packed:
        return weight.layout.segment(weight.data, 32).view(torch.float32).permute(0, 3, 1, 2)
    return weight.data


def _skip(call: ConvCall, rows: Tensor, out: Tensor | PackedActivation) -> None:
    """0 bits: y is the residual, untouched, or 0."""
    residual = call.residual
    if residual is out:
        return
    if residual is None:
        _store(out, rows, torch.zeros(rows.numel(), *out.shape[1:], device=rows.device))
        return
    _store(out, rows, _values(residual, rows))
    if isinstance(residual, Tensor) or isinstance(out, Tensor):
        return
    for bits in set(residual.bit_options) & set(out.bit_options):
        same = torch.ones_like(rows, dtype=torch.bool)
        if bits != 32:
            there, here = residual.quantizer.at(bits), out.quantizer.at(bits)
            same &= (there[0] == here[0]) & (there[1] == here[1])
        same &= (residual.bits[rows] == bits) & (out.bits[rows] == bits)
        if bool(same.any()):
            alike = rows[same]
            _write_rows(out, alike, bits, residual.data[alike, : _used_bytes(out, bits)])


def _values(x: Tensor | PackedActivation, rows: Tensor) -> Tensor:
    """Float values (n, C, H, W) of some samples."""
    if isinstance(x, Tensor):
        return x[rows]
    return unpack_dequantize(replace(x, data=x.data[rows], bits=x.bits[rows]))


def _store(out: Tensor | PackedActivation, rows: Tensor, y: Tensor) -> None:
    if isinstance(out, Tensor):
        out[rows] = y.to(out.dtype)
        return
    for bits in out.bit_options:
        chosen = out.bits[rows] == bits
        if bool(chosen.any()):
            codes = pack_rows(y[chosen], bits, *out.quantizer.at(bits))
            _write_rows(out, rows[chosen], bits, codes)


def _used_bytes(packed: PackedActivation, bits: int) -> int:
    return row_bytes((bits,), packed.channels, packed.height, packed.width)


def _write_rows(out: PackedActivation, rows: Tensor, bits: int, codes: Tensor) -> None:
    out.data[rows, : _used_bytes(out, bits)] = codes


def _rows(bits: Tensor, value: int) -> Tensor:
    """Indices of the samples at one width."""
    return (bits == value).nonzero().squeeze(1)


def _unknown(bits: Tensor, options: Sequence[int]) -> Tensor:
    """Mask of the samples whose width is no option; only a GPU call gets here with any."""
    known = torch.tensor((0, *options), dtype=bits.dtype, device=bits.device)
    return ~torch.isin(bits, known)


# The gate


def pooled_mean(x: Tensor | PackedActivation) -> Tensor:
    """Global average pool, float64 (N, C); of integer codes from exact sums."""
    if isinstance(x, Tensor):
        return x.double().mean((2, 3))
    means = x.data.new_full(x.shape[:2], float("nan"), dtype=torch.float64)
    means[x.bits == 0] = 0.0
    pixels = x.height * x.width
    for bits in x.bit_options:
        mine = x.bits == bits
        values = unpack_rows(x.data[mine], bits, *x.shape[1:])
        if bits == 32:
            means[mine] = values.double().mean((2, 3))
        else:
            scale, zero_point = x.quantizer.at(bits)
            sums = values.sum((2, 3), dtype=torch.int64) - pixels * zero_point.long()
            means[mine] = sums.double() * (scale.double() / pixels)
    return means


def rnn_gate(call: GateCall, out: GateStep) -> None:
    """Pool, embed, one LSTM step, and the largest logit; the cheapest choice among equals."""
    w = call.weights
    batch, hidden = out.bits.shape[0], w.hidden
    state = call.state
    if state is None:
        state = out.state.new_zeros(2, batch, hidden)
    x = _linear(pooled_mean(call.input), w.embed_weight, w.embed_bias)
    mixed = _linear(x, w.weight_ih, w.bias_ih) + _linear(state[0], w.weight_hh, w.bias_hh)
    enter, forget, update, leave = mixed.chunk(4, -1)
    memory = forget.sigmoid() * state[1] + enter.sigmoid() * update.tanh()
    output = leave.sigmoid() * memory.tanh()
    logits = _linear(output, w.proj_weight, w.proj_bias) + w.choice_bias
    widths = torch.tensor(call.choices, dtype=torch.int32, device=out.bits.device)
    out.bits.copy_(widths[cheapest_argmax(logits)])
    out.logits.copy_(logits)
    out.state.copy_(torch.stack((output, memory)))


def cheapest_argmax(logits: Tensor) -> Tensor:
    """Index of the largest logit in the last dimension, the lowest index among equals.

    The last index where a NaN leaves no largest.
    """
    count = logits.shape[-1]
    index = torch.arange(count, device=logits.device).expand_as(logits)
    best = logits == logits.amax(-1, keepdim=True)
    return torch.where(best, index, count - 1).amin(-1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.double(), bias.double())
