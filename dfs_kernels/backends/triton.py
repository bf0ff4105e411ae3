"""The Triton kernels of :mod:`dfs_kernels.triton`, for GPUs.

In Triton's interpreter they take CPU tensors instead: slow, but good for checking them.

Nothing here waits for the GPU, so that calls can be captured in CUDA graphs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dfs_kernels import reference
from dfs_kernels.backends import native
from dfs_kernels.call import ConvCall, ConvGradients, ConvWeight, GradientsWanted
from dfs_kernels.gate import GateCall, GateStep
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import (
    PackedActivation,
    PackedConvWeight,
    Quantizer,
    new_codes,
    new_packed_codes,
    row_bytes,
)
from dfs_kernels.triton.configs import (
    ConvConfig,
    PixelConfig,
    conv_configs,
    float_configs,
    gate_configs,
    grouped_configs,
    pixel_configs,
    power_of_two,
)
from dfs_kernels.triton.tuning import Problem, choose
from dfs_kernels.widths import KERNEL_WIDTHS, activation_max

# Triton looks at it when a kernel is defined.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTEGER_WIDTHS = (2, 4, 8)
_LEAST_CAPABILITY = (8, 0)
_TILE_VARIANT = "triton/1"
# Parts of a batch whose weight gradients are summed apart.
_MOST_SPLITS = 32


def unavailable_reason() -> str | None:
    if not _INSTALLED:
        return "triton is not installed"
    if not _INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device, and TRITON_INTERPRET is not 1"
    # torch.compile can't trace trials; what it compiles asked before, or hears of it at the launch.
    if torch.compiler.is_compiling():
        return None
    return _interpreter_fault() if _INTERPRETED else _gpu_fault()


@functools.cache
def _interpreter_fault() -> str | None:
    """Why kernels can't be interpreted: that of Triton 3.6 can't count loops with NumPy 2.4."""
    code = torch.zeros(1, 1, dtype=torch.uint8)
    try:
        _sum_levels(code, False, torch.zeros(1, dtype=torch.int32))
    except Exception as error:
        return f"Triton's interpreter fails: {error}"
    return None


@functools.cache
def _gpu_fault() -> str | None:
    """Why the GPU can't run the kernels, or Triton can't launch them."""
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        major, minor = capability
        return (
            f"the GPU has compute capability {major}.{minor}, and Triton multiplies int8 matrices "
            "from 8.0 on"
        )
    try:
        _load_driver()
    except Exception as error:
        return f"Triton can't launch kernels: {error}"
    return None


def _load_driver() -> None:
    """Let Triton find the driver and compile what launches with it, which takes a C compiler."""
    from triton.runtime import driver

    driver.active.get_current_target()


def supports(device_type: str, options: Sequence[int]) -> bool:
    device = "cpu" if _INTERPRETED else "cuda"
    return device_type == device and all(bits in KERNEL_WIDTHS for bits in options)


def info() -> dict[str, Any]:
    import triton

    where = "interpreter" if _INTERPRETED else torch.cuda.get_device_name()
    return {"triton": triton.__version__, "device": where}


@functools.cache
def _kernels() -> SimpleNamespace:
    """Every kernel by name. Defining them takes a while, so not before one is needed."""
    from dfs_kernels.triton import buckets, conv, gate, gradients, packing

    modules = (buckets, conv, gate, gradients, packing)
    names = {name: getattr(m, name) for m in modules for name in dir(m) if name.endswith("_kernel")}
    return SimpleNamespace(**names)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    codes = codes.contiguous()
    channels = codes.shape[-1]
    out = new_packed_codes(codes, bits)
    if out.numel():
        rows = codes.numel() // channels
        block = power_of_two(channels, 8, 128)
        grid = (_tiles(rows, 64), _tiles(channels, block))
        _launch(
            _kernels().pack_bits_kernel, grid, codes.device,
            codes, out, rows, channels, out.shape[-1],
            BITS=bits, BLOCK_R=64, BLOCK_C=block,
        )  # fmt: skip
    return out


def unpack_bits(packed: Tensor, bits: int, channels: int, signed: bool) -> Tensor:
    packed = packed.contiguous()
    out = new_codes(packed, channels, signed)
    if out.numel():
        rows = out.numel() // channels
        block = power_of_two(channels, 8, 128)
        grid = (_tiles(rows, 64), _tiles(channels, block))
        _launch(
            _kernels().unpack_bits_kernel, grid, packed.device,
            packed, out, rows, channels, packed.shape[-1],
            BITS=bits, SIGNED=signed, BLOCK_R=64, BLOCK_C=block,
        )  # fmt: skip
    return out


def quantize_pack(x: Tensor, out: PackedActivation) -> None:
    aligned = _aligned(out)
    _quantize_pack(x, aligned, fill=True)
    _copy_back(aligned, out)


def _quantize_pack(x: Tensor, out: PackedActivation, fill: bool) -> None:
    batch, channels, height, width = x.shape

    def launch(config: PixelConfig) -> None:
        tiles = _tiles(height * width, config.block_p)
        _launch(
            _kernels().quantize_pack_kernel, (batch * tiles,), x.device,
            x, out.data, out.bits, out.scale, out.zero_point,
            *x.stride(), out.data.stride(0), height * width, width, tiles,
            C=channels, INDEX=_index(out.bit_options), FLAT=x.stride(2) == width * x.stride(3),
            FILL=fill,
            BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip

    layout = "channels_last" if x.stride(1) == 1 else "planes"
    sizes = (channels, height * width, layout)
    problem = Problem("quantize_pack_kernel", sizes, batch)
    launch(choose(problem, x.device, pixel_configs(height * width, channels), launch))


def unpack_dequantize(packed: PackedActivation) -> Tensor:
    return _unpack_dequantize(packed, None)


def _unpack_dequantize(packed: PackedActivation, wanted: Tensor | None) -> Tensor:
    """Float values; of those samples only that are at 32 bits in ``wanted``, if it is given."""
    packed = _aligned(packed)
    batch, channels, height, width = packed.shape
    out = packed.data.new_empty(packed.shape, dtype=torch.float32)

    def launch(config: PixelConfig) -> None:
        tiles = _tiles(height * width, config.block_p)
        _launch(
            _kernels().unpack_dequantize_kernel, (batch * tiles,), out.device,
            packed.data, out, packed.bits, wanted, packed.scale, packed.zero_point,
            packed.data.stride(0), height * width, tiles,
            C=channels, INDEX=_index(packed.bit_options),
            BLOCK_P=config.block_p, BLOCK_C=config.block_c, num_warps=config.num_warps,
        )  # fmt: skip

    problem = Problem("unpack_dequantize_kernel", (channels, height * width), batch)
    launch(choose(problem, out.device, pixel_configs(height * width, channels), launch))
    return out


def quantize_weight(weight: Tensor, scale: Tensor, bits: int, centred: bool, out: Tensor) -> None:
    _quantize_weight(weight, scale, bits, centred, out, None)


def _quantize_weight(
    weight: Tensor, scale: Tensor, bits: int, centred: bool, out: Tensor, sums: Tensor | None
) -> None:
    outputs, channels, kernel_h, kernel_w = weight.shape
    _launch(
        _kernels().quantize_weight_kernel, (outputs,), weight.device,
        weight, scale.contiguous(), out, sums, *weight.stride(),
        C=channels, KH=kernel_h, KW=kernel_w, BITS=bits, CENTRED=centred,
        BLOCK_T=power_of_two(kernel_h * kernel_w, 1, 16), BLOCK_C=power_of_two(channels, 8, 128),
    )  # fmt: skip


def tile_variant() -> str:
    return _TILE_VARIANT


def tile_bytes(geometry: ConvGeometry, options: Sequence[int], centred: Sequence[bool]) -> int:
    """The kernels read the canonical codes; beside them they want the sums of the 8-bit levels."""
    return 4 * geometry.out_channels if 8 in options else 0


def retile_weight(weight: PackedConvWeight, geometry: ConvGeometry) -> Tensor:
    size = tile_bytes(geometry, weight.bit_options, weight.centred)
    sums = weight.buffer.new_empty(size)
    if size:
        index = weight.bit_options.index(8)
        _sum_levels(weight.packed(8), weight.centred[index], sums.view(torch.int32))
    return sums


def _sum_levels(codes: Tensor, centred: bool, sums: Tensor) -> None:
    _launch(
        _kernels().sum_levels_kernel, (codes.shape[0],), codes.device,
        codes, sums, codes[0].numel(), CENTRED=centred, BLOCK=1024,
    )  # fmt: skip


def mixed_conv2d(call: ConvCall, out: Tensor | PackedActivation) -> None:
    if isinstance(out, PackedActivation):
        aligned = _aligned(out)
        residual = aligned if call.residual is out else call.residual
        _mixed_conv2d(replace(call, residual=residual), aligned)
        _copy_back(aligned, out)
    else:
        _mixed_conv2d(call, out)


def _mixed_conv2d(call: ConvCall, out: Tensor | PackedActivation) -> None:
    if isinstance(call.residual, PackedActivation) and call.residual is not out:
        call = replace(call, residual=_aligned(call.residual))
    options = call.weight.options
    integers = tuple(bits for bits in options if bits != 32)
    if integers:
        weight, sums = _integer_weight(call.weight)
        _convolve_integers(call, out, weight, sums)
    if 32 in options:
        _convolve_floats(call, out, rest=not integers)


def mixed_conv2d_backward(
    call: ConvCall, grad_output: Tensor, wanted: GradientsWanted
) -> ConvGradients:
    x, weight, options = call.input, call.weight, call.weight.options
    if not isinstance(x, Tensor):
        raise ValueError("gradients of a mixed convolution need a float input, got a packed one")
    found = ConvGradients()
    values = torch.stack([_weight_values(weight, i) for i in range(len(options))])
    gain = torch.ones(values.shape[:2], device=x.device) if call.mul is None else call.mul
    gain = gain.view(*values.shape[:2], 1, 1, 1)
    if wanted.input or wanted.input_scale:
        grad_x, slopes = _input_gradient(call, grad_output, values * gain)
        found.input = grad_x if wanted.input else None
        if wanted.input_scale:
            found.input_scale = _input_scale_gradient(call, slopes)
    if wanted.add or wanted.mul:
        per_sample = grad_output.sum((2, 3), dtype=torch.float64)
        # One comparison for each: to copy the options to the GPU would wait for it.
        chosen = torch.stack([call.bits == bits for bits in options])
        sums = torch.where(chosen[:, :, None], per_sample, 0.0).sum(1).float()
        found.add = sums if wanted.add else None
    if wanted.weight or wanted.weight_scale or wanted.mul:
        grad_conv = _weight_gradients(call, grad_output)
        if wanted.mul:
            found.mul = (values * grad_conv).flatten(2).sum(2, dtype=torch.float64).float()
            if call.bias is not None:
                found.mul += call.bias * sums
        if wanted.weight or wanted.weight_scale:
            grads, steps = _straight_through(weight, grad_conv * gain)
            found.weight = grads if wanted.weight else None
            found.weight_scale = steps if wanted.weight_scale else None
    return found


def rnn_gate(call: GateCall, out: GateStep) -> None:
    x = call.input
    if isinstance(x, PackedActivation):
        x = _aligned(x)
        index = _index(x.bit_options)
    else:
        index = None
    batch, channels, height, width = x.shape
    weights = tuple(value.contiguous() for value in call.weights)

    def launch(config: PixelConfig) -> None:
        _launch(
            _kernels().rnn_gate_kernel, (batch,), out.bits.device,
            *_map_pointers(x), call.state, *weights, *out, batch, height * width, width,
            C=channels, HIDDEN=call.weights.hidden, CHOICES=call.choices, INDEX=index,
            BLOCK_P=config.block_p, BLOCK_C=config.block_c,
            BLOCK_H=power_of_two(call.weights.hidden, 1, 1 << 16),
            BLOCK_K=power_of_two(len(call.choices), 1, 1 << 16), num_warps=config.num_warps,
        )  # fmt: skip

    problem = Problem("rnn_gate_kernel", (channels, height * width, call.weights.hidden), batch)
    launch(choose(problem, out.bits.device, gate_configs(height * width, channels), launch))


def _weight_values(weight: ConvWeight, index: int) -> Tensor:
    """What a weight stands for at one width, float32 (O, C/groups, KH, KW)."""
    bits = weight.options[index]
    if bits == 32:
        return _float_weight(weight).contiguous()
    centred = weight.centred[index]
    if weight.is_packed:
        channels = weight.shape[1]
        packed = weight.layout.segment(weight.data, bits)
        levels = reference.unpack_weight_levels(packed, bits, channels, centred)
    else:
        codes = reference.quantize_weight(weight.data, bits, weight.step(bits), centred)
        levels = reference.weight_levels(codes, centred)
    values = reference.dequantize_weight(levels.double(), weight.step(bits), centred)
    return values.float().contiguous()


def _input_gradient(
    call: ConvCall, grad_output: Tensor, values: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and per sample and tile what adds up to that of the steps."""
    geometry, x = call.geometry, call.input
    assert isinstance(x, Tensor)
    batch, channels, height, width = x.shape
    dots = _takes_dots(geometry)
    parts = geometry.groups if dots else 1
    out = x.new_empty(x.shape)
    quantizer = call.input_quantizer

    def launch(config: ConvConfig) -> Tensor | None:
        tiles_m = _tiles(height * width, config.block_m)
        tiles = tiles_m * parts * _tiles(channels // parts, config.block_n)
        slopes = None if quantizer is None else x.new_empty(batch, tiles, dtype=torch.float64)
        _launch(
            _kernels().input_gradient_kernel, (batch * tiles,), x.device,
            grad_output, values, x,
            *((None, None) if quantizer is None else (quantizer.scale, quantizer.zero_point)),
            call.bits, out, slopes, *grad_output.stride(), *x.stride(),
            height, width, *grad_output.shape[2:], geometry.pad_top, geometry.pad_left, tiles_m,
            **_constants(geometry), INDEX=_index(call.weight.options),
            QUANTIZED=quantizer is not None, PRECISION=_float_precision(), DOTS=dots,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps,
        )  # fmt: skip
        return slopes

    configs = float_configs(height * width, channels // parts)
    problem = _conv_problem("input_gradient_kernel", call)
    return out, launch(choose(problem, x.device, configs, launch))


def _input_scale_gradient(call: ConvCall, slopes: Tensor | None) -> Tensor:
    """d step per width: its samples' sums, over sqrt(elements * largest code)."""
    options, x = call.weight.options, call.input
    result = torch.zeros(len(options), device=call.bits.device)
    if slopes is None:
        return result
    totals = slopes.sum(1)
    _, channels, height, width = x.shape
    for i, bits in enumerate(options):
        if bits == 32:
            continue
        chosen = call.bits == bits
        elements = chosen.sum() * (channels * height * width * activation_max(bits))
        total = torch.where(chosen, totals, 0.0).sum()
        result[i] = total.float() * elements.clamp_min(1).double().rsqrt().float()
    return result


def _weight_gradients(call: ConvCall, grad_output: Tensor) -> Tensor:
    """Per width the gradient of the values that were multiplied: (len, O, C/groups, KH, KW)."""
    geometry, x, options = call.geometry, call.input, call.weight.options
    assert isinstance(x, Tensor)
    batch, _, height, width = x.shape
    dots = _takes_dots(geometry)
    parts = geometry.groups if dots else 1
    outputs, taps = geometry.out_channels, geometry.taps
    splits = max(1, min(batch, _MOST_SPLITS))
    partial = x.new_empty(len(options), splits, outputs, taps)
    quantizer = call.input_quantizer

    def launch(config: ConvConfig) -> None:
        block_t = min(config.block_m, 32)
        tiles = parts * _tiles(outputs // parts, config.block_n)
        tiles *= _tiles(taps, block_t if dots else 1)
        for bits in options:
            _launch(
                _kernels().weight_gradient_kernel, (tiles * splits,), x.device,
                grad_output, x,
                *((None, None) if quantizer is None else (quantizer.scale, quantizer.zero_point)),
                call.bits, partial, *grad_output.stride(), *x.stride(), batch,
                height, width, *grad_output.shape[2:], geometry.pad_top, geometry.pad_left, splits,
                **_constants(geometry), WIDTH=bits, INDEX=_index(options),
                PRECISION=_float_precision(), DOTS=dots,
                BLOCK_O=config.block_n, BLOCK_T=block_t, BLOCK_P=16,
                # Two tiles on their way and one at work take a register too many on sm_90.
                num_warps=config.num_warps, num_stages=2,
            )  # fmt: skip

    problem = _conv_problem("weight_gradient_kernel", call)
    launch(choose(problem, x.device, float_configs(taps, outputs // parts), launch))
    shape = (len(options), outputs, geometry.kernel_h, geometry.kernel_w, geometry.group_channels)
    return partial.sum(1).view(shape).permute(0, 1, 4, 2, 3)


def _straight_through(weight: ConvWeight, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a float weight and of its steps, from those of its quantized values."""
    total = torch.zeros_like(grads[0])
    steps = grads.new_zeros(len(weight.options), weight.shape[0])
    for i, bits in enumerate(weight.options):
        if bits == 32:
            total += grads[i]
        elif not weight.is_packed:
            grad, steps[i] = reference.weight_gradient(
                grads[i], weight.data, bits, weight.step(bits), weight.centred[i]
            )
            total += grad
    return total, steps


def _convolve_integers(
    call: ConvCall, out: Tensor | PackedActivation, weight: Tensor, sums: Tensor | None
) -> None:
    geometry, options = call.geometry, call.weight.options
    out_height, out_width = geometry.output_size(*call.input.shape[2:])
    pixels = out_height * out_width
    dots = _takes_dots(geometry)
    source, stream = _packed_input(call, dots)
    if dots:
        launch = functools.partial(_launch_dots, source, stream, weight, sums)
        outputs = geometry.out_channels // geometry.groups
        integers = sum(b != 32 for b in options)
        configs = conv_configs(pixels, outputs, geometry.taps, integers)
        problem = _conv_problem("mixed_conv2d_kernel", call, "stream" if stream else "codes")
    else:
        launch = functools.partial(_launch_grouped, source, weight)
        configs = grouped_configs(pixels, geometry.out_channels)
        problem = _conv_problem("grouped_conv2d_kernel", call)
    _launch_chosen(problem, configs, launch, call, out)


def _launch_chosen(
    problem: Problem,
    configs: tuple[ConvConfig, ...],
    launch: Callable[[ConvCall, Tensor | PackedActivation, ConvConfig], None],
    call: ConvCall,
    out: Tensor | PackedActivation,
) -> None:
    """``launch`` a convolution with the configuration that is best for it."""
    rehearsal = functools.cache(lambda: _rehearsal(call, out))
    config = choose(problem, call.bits.device, configs, lambda config: launch(*rehearsal(), config))
    launch(call, out, config)


def _rehearsal(
    call: ConvCall, out: Tensor | PackedActivation
) -> tuple[ConvCall, Tensor | PackedActivation]:
    """The call as it can be made again and again: one in place adds to a copy."""
    if call.residual is not out:
        return call, out
    copy = out.clone()
    return replace(call, residual=copy), copy


def _launch_dots(
    source: PackedActivation,
    stream: bool,
    weight: Tensor,
    sums: Tensor | None,
    call: ConvCall,
    out: Tensor | PackedActivation,
    config: ConvConfig,
) -> None:
    geometry, options = call.geometry, call.weight.options
    quantizer = _read_quantizer(call, source)
    stored = source.quantizer if stream else quantizer
    constants, sizes, tiles_m = _integer_arguments(call, out, source, config)
    outputs = geometry.out_channels // geometry.groups
    tiles = tiles_m * geometry.groups * _tiles(outputs, config.block_n)
    words = tuple(_word(source, geometry, b, stream) for b in _INTEGER_WIDTHS)

    def launch(widths: tuple[int, ...], rest: bool, slot: int, buckets: Any) -> None:
        order, starts = buckets
        _launch(
            _kernels().mixed_conv2d_kernel, (call.batch * tiles,), call.bits.device,
            source.data, quantizer.scale, quantizer.zero_point, stored.scale, stored.zero_point,
            weight, call.weight.scale, sums, call.bits, order, starts,
            call.bias, call.mul, call.add, *_finish_pointers(call, out), *sizes,
            **constants, WIDTHS=tuple(b in widths for b in _INTEGER_WIDTHS), REST=rest,
            WIDTH_SLOT=slot, STREAM=stream, WORDS=words, BLOCK_N=config.block_n,
            # A word of 2-bit codes holds 16 of them.
            BLOCK_K=max(config.block_k, 32), num_stages=config.num_stages,
        )  # fmt: skip

    if not config.buckets:
        launch(tuple(b for b in options if b != 32), True, 0, (None, None))
        return
    buckets = _sort_samples(call.bits)
    for slot, bits in enumerate(_INTEGER_WIDTHS):
        if bits in options:
            launch((bits,), False, slot, buckets)
    launch((), True, 4, buckets)


def _launch_grouped(
    source: PackedActivation,
    weight: Tensor,
    call: ConvCall,
    out: Tensor | PackedActivation,
    config: ConvConfig,
) -> None:
    quantizer = _read_quantizer(call, source)
    constants, sizes, tiles_m = _integer_arguments(call, out, source, config)
    tiles = tiles_m * _tiles(call.geometry.out_channels, config.block_n)
    _launch(
        _kernels().grouped_conv2d_kernel, (call.batch * tiles,), call.bits.device,
        source.data, quantizer.scale, quantizer.zero_point, weight, call.weight.scale, call.bits,
        call.bias, call.mul, call.add, *_finish_pointers(call, out), *sizes,
        **constants, BLOCK_N=config.block_n,
    )  # fmt: skip


def _read_quantizer(call: ConvCall, source: PackedActivation) -> Quantizer:
    """What the codes that are multiplied stand for."""
    return source.quantizer if call.input_quantizer is None else call.input_quantizer


def _integer_arguments(
    call: ConvCall, out: Tensor | PackedActivation, source: PackedActivation, config: ConvConfig
) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """What both integer kernels take: constants, sizes, and the tiles of a sample's pixels."""
    geometry, options = call.geometry, call.weight.options
    _, _, height, width = call.input.shape
    out_height, out_width = geometry.output_size(height, width)
    offsets = call.weight.layout.offsets()
    constants = {
        **_constants(geometry),
        **_finish_constants(call, out),
        "INPUT_INDEX": _index(_read_quantizer(call, source).options),
        "WEIGHT_INDEX": _index(options),
        "WEIGHT_OFFSET": tuple(
            offsets[options.index(b)] if b in options else 0 for b in _INTEGER_WIDTHS
        ),
        "CENTRED": tuple(
            b in options and call.weight.centred[options.index(b)] for b in _INTEGER_WIDTHS
        ),
        "BLOCK_M": config.block_m,
        "num_warps": config.num_warps,
    }
    tiles_m = _tiles(out_height * out_width, config.block_m)
    sizes = (
        source.data.stride(0), height, width, out_height, out_width,
        geometry.pad_top, geometry.pad_left, tiles_m,
    )  # fmt: skip
    return constants, sizes, tiles_m


def _convolve_floats(call: ConvCall, out: Tensor | PackedActivation, rest: bool) -> None:
    geometry = call.geometry
    x = call.input
    if isinstance(x, PackedActivation):
        if call.input_quantizer is None:
            x = _float_view(_aligned(x))
        else:
            x = _unpack_dequantize(x, call.bits)
    out_height, out_width = geometry.output_size(*x.shape[2:])
    parts = geometry.groups if _takes_dots(geometry) else 1
    configs = float_configs(out_height * out_width, geometry.out_channels // parts)
    launch = functools.partial(_launch_floats, x, _float_weight(call.weight), rest)
    _launch_chosen(_conv_problem("float_conv2d_kernel", call), configs, launch, call, out)


def _launch_floats(
    x: Tensor,
    weight: Tensor,
    rest: bool,
    call: ConvCall,
    out: Tensor | PackedActivation,
    config: ConvConfig,
) -> None:
    geometry = call.geometry
    _, _, height, width = x.shape
    out_height, out_width = geometry.output_size(height, width)
    dots = _takes_dots(geometry)
    parts = geometry.groups if dots else 1
    tiles_m = _tiles(out_height * out_width, config.block_m)
    tiles = tiles_m * parts * _tiles(geometry.out_channels // parts, config.block_n)
    _launch(
        _kernels().float_conv2d_kernel, (call.batch * tiles,), call.bits.device,
        x, weight, call.bits, call.bias, call.mul, call.add, *_finish_pointers(call, out),
        *x.stride(), *weight.stride(), height, width, out_height, out_width,
        geometry.pad_top, geometry.pad_left, tiles_m,
        **_constants(geometry), **_finish_constants(call, out),
        REST=rest, WEIGHT_INDEX=_index(call.weight.options), PRECISION=_float_precision(),
        DOTS=dots, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )  # fmt: skip


def _conv_problem(kernel: str, call: ConvCall, form: str = "") -> Problem:
    """What the speed of a convolution depends on, to look its configuration up by."""
    g = call.geometry
    _, _, height, width = call.input.shape
    sizes: tuple[int | str, ...] = (
        f"{g.in_channels}x{height}x{width}",
        f"{g.out_channels}x{g.kernel_h}x{g.kernel_w}",
        f"stride{g.stride_h}x{g.stride_w}",
        f"dilation{g.dilation_h}x{g.dilation_w}",
        f"groups{g.groups}",
        "bits" + "-".join(map(str, call.weight.options)),
    )
    return Problem(kernel, (*sizes, form) if form else sizes, call.batch)


def _float_precision() -> str:
    return "tf32" if native.allows_tf32() and not _INTERPRETED else "ieee"


def _takes_dots(geometry: ConvGeometry) -> bool:
    """Whether groups are wide enough for matrix products, and whole bytes at every width."""
    if geometry.groups == 1:
        return True
    group_outputs = geometry.out_channels // geometry.groups
    return geometry.group_channels % 4 == 0 and group_outputs % 4 == 0 and group_outputs >= 8


def _packed_input(call: ConvCall, dots: bool) -> tuple[PackedActivation, bool]:
    """The input packed for its integer widths, and whether it is an 8-bit stream to read so."""
    x, quantizer = call.input, call.input_quantizer
    if isinstance(x, PackedActivation):
        if quantizer is None:
            return x, False
        integers = [b for b in call.weight.options if b != 32]
        if dots and x.bit_options == (8,):
            if all(_word(x, call.geometry, b, True) * b >= 8 for b in integers):
                return x, True
        x = unpack_dequantize(x)
    assert quantizer is not None
    options = tuple(b for b in call.weight.options if b != 32)
    indices = [call.weight.options.index(b) for b in options]
    scale, zero_point = quantizer.scale, quantizer.zero_point
    if len(options) != len(call.weight.options):
        # The widths are ascending, so those before 32 are the first ones.
        scale, zero_point = scale[: len(indices)], zero_point[: len(indices)]
    data = x.new_empty((x.shape[0], row_bytes(options, *x.shape[1:])), dtype=torch.uint8)
    packed = PackedActivation(data, call.bits, scale, zero_point, options, *x.shape[1:])
    _quantize_pack(x, packed, fill=False)
    return packed, False


def _word(source: PackedActivation, geometry: ConvGeometry, bits: int, stream: bool) -> int:
    """Bytes of the input that can be read at a time: they divide every address and a run."""
    stored = 8 if stream else bits
    run = (geometry.group_channels * stored + 7) // 8
    pixel = (geometry.in_channels * stored + 7) // 8
    for word in (4, 2):
        values = (run, pixel, source.data.stride(0), source.data.data_ptr())
        if all(value % word == 0 for value in values):
            return word
    return 1


def _integer_weight(weight: ConvWeight) -> tuple[Tensor, Tensor | None]:
    """Canonical codes of all integer widths, and the sums of the 8-bit levels."""
    sums = None
    if weight.is_packed:
        if 8 in weight.options:
            if weight.tiles is not None:
                sums = weight.tiles.view(torch.int32)
            else:
                sums = weight.data.new_empty(weight.shape[0], dtype=torch.int32)
                index = weight.options.index(8)
                _sum_levels(weight.layout.segment(weight.data, 8), weight.centred[index], sums)
        return weight.data, sums
    layout = weight.layout
    buffer = weight.data.new_empty(layout.offsets()[-1], dtype=torch.uint8)
    for i, bits in enumerate(weight.options):
        if bits == 32:
            continue
        own = None
        if bits == 8:
            own = sums = weight.data.new_empty(weight.shape[0], dtype=torch.int32)
        _quantize_weight(
            weight.data, weight.step(bits), bits, weight.centred[i],
            layout.segment(buffer, bits), own,
        )  # fmt: skip
    return buffer, sums


def _float_weight(weight: ConvWeight) -> Tensor:
    """float32 (O, C/groups, KH, KW), any strides."""
    if not weight.is_packed:
        return weight.data
    segment = weight.layout.segment(weight.data, 32)
    if segment.data_ptr() % 4:
        segment = segment.clone()
    return segment.view(torch.float32).permute(0, 3, 1, 2)


def _float_view(packed: PackedActivation) -> Tensor:
    """The 32-bit samples of a packed batch as float32 (N, C, H, W)."""
    _, channels, height, width = packed.shape
    used = 4 * channels * height * width
    values = packed.data[:, :used].view(torch.float32)
    return values.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)


def _aligned(packed: PackedActivation) -> PackedActivation:
    """The batch itself, or a copy if its 32-bit samples are not aligned for float32."""
    data = packed.data
    if 32 not in packed.bit_options or (data.data_ptr() % 4 == 0 and data.stride(0) % 4 == 0):
        return packed
    return replace(packed, data=data.clone(memory_format=torch.contiguous_format))


def _copy_back(aligned: PackedActivation, out: PackedActivation) -> None:
    if aligned is not out:
        out.data.copy_(aligned.data)


def _sort_samples(bits: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.empty_like(bits)
    starts = bits.new_empty(6)
    _launch(
        _kernels().sort_samples_kernel, (1,), bits.device,
        bits, order, starts, len(bits), BLOCK=power_of_two(len(bits), 32, 1024),
    )  # fmt: skip
    return order, starts


def _constants(geometry: ConvGeometry) -> dict[str, int]:
    return {
        "C": geometry.in_channels,
        "O": geometry.out_channels,
        "GROUPS": geometry.groups,
        "KH": geometry.kernel_h,
        "KW": geometry.kernel_w,
        "STRIDE_H": geometry.stride_h,
        "STRIDE_W": geometry.stride_w,
        "DILATION_H": geometry.dilation_h,
        "DILATION_W": geometry.dilation_w,
    }


def _finish_constants(call: ConvCall, out: Tensor | PackedActivation) -> dict[str, Any]:
    residual = call.residual
    return {
        "RESIDUAL_INDEX": _index(residual.bit_options)
        if isinstance(residual, PackedActivation)
        else None,
        "OUT_INDEX": _index(out.bit_options) if isinstance(out, PackedActivation) else None,
        "IN_PLACE": residual is out,
        "RELU": call.relu,
    }


def _finish_pointers(call: ConvCall, out: Tensor | PackedActivation) -> tuple[Any, ...]:
    return (*_map_pointers(call.residual), *_map_pointers(out))


def _map_pointers(x: Tensor | PackedActivation | None) -> tuple[Any, ...]:
    """Data, widths, scales, zero points and the four strides of a feature map."""
    if x is None:
        return (None,) * 4 + (0,) * 4
    if isinstance(x, Tensor):
        return (x, None, None, None, *x.stride())
    return (x.data, x.bits, x.scale, x.zero_point, x.data.stride(0), 0, 0, 0)


def _index(options: Sequence[int]) -> tuple[int, ...]:
    """Where each kernel width stands among ``options``, -1 if it does not."""
    return tuple(options.index(b) if b in options else -1 for b in KERNEL_WIDTHS)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any
) -> None:
    if 0 in grid:
        return
    with _on(device):
        # Every float operation is rounded by itself, as the formulas have it.
        kernel[grid](*args, **constants, enable_fp_fusion=False)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
