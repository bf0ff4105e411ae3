"""Calls as the compiled modules take them: plain structs that hold addresses.

Every function takes the module whose structs it makes; what a struct points to stays the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfs_kernels.call import ConvCall, ConvGradients
from dfs_kernels.gate import GateStep, RNNGateWeights
from dfs_kernels.geometry import ConvGeometry
from dfs_kernels.packing import PackedActivation, Quantizer


def allows_tf32() -> bool:
    """TF32 only where PyTorch's own convolutions may use it."""
    # The older setting, cudnn.allow_tf32, shows here too, and raises where the two are mixed.
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def quantizer(module: Any, value: Quantizer) -> Any:
    native = module.Quantizer()
    native.widths = list(value.options)
    native.scale = value.scale.data_ptr()
    native.zero_point = value.zero_point.data_ptr()
    return native


def feature_map(module: Any, x: Tensor | PackedActivation) -> Any:
    _, channels, height, width = x.shape
    if isinstance(x, Tensor):
        return module.FeatureMap.of_values(x.data_ptr(), channels, height, width, x.stride())
    return module.FeatureMap.of_codes(
        x.data.data_ptr(),
        channels,
        height,
        width,
        x.data.shape[1],
        x.bits.data_ptr(),
        x.bit_options,
        x.scale.data_ptr(),
        x.zero_point.data_ptr(),
    )


def geometry(module: Any, value: ConvGeometry) -> Any:
    native = module.ConvGeometry()
    for name, number in value.fields().items():
        setattr(native, name, number)
    return native


def tile_offsets(
    tile_bytes: Callable[[Any, int, bool], int],
    native_geometry: Any,
    options: Sequence[int],
    centred: Sequence[bool],
    alignment: int,
) -> list[int]:
    """Where the tiles of each width start in one buffer, and where the last ones end."""
    offsets = [0]
    for bits, is_centred in zip(options, centred, strict=True):
        end = offsets[-1] + tile_bytes(native_geometry, bits, is_centred)
        offsets.append(-(-end // alignment) * alignment)
    return offsets


def weight(
    module: Any, options: Sequence[int], centred: Sequence[bool], tiles: Sequence[int]
) -> Any:
    """A weight of which there is one address for each width, without its steps."""
    native = module.ConvWeight()
    native.widths = list(options)
    native.centred = list(centred)
    native.tiles = list(tiles)
    return native


def mixed_conv2d_args(
    module: Any,
    call: ConvCall,
    native_geometry: Any,
    native_weight: Any,
    out: Tensor | PackedActivation,
) -> Any:
    args = module.MixedConv2dArgs()
    args.batch = call.batch
    args.bits = call.bits.data_ptr()
    args.geometry = native_geometry
    args.input = feature_map(module, call.input)
    if call.input_quantizer is not None:
        args.input_quantizer = quantizer(module, call.input_quantizer)
    args.weight = native_weight
    args.bias, args.mul, args.add = pointer(call.bias), pointer(call.mul), pointer(call.add)
    if call.residual is not None:
        args.has_residual = True
        args.residual = feature_map(module, call.residual)
    args.relu = call.relu
    args.output = feature_map(module, out)
    return args


def mixed_conv2d_backward_args(
    module: Any, call: ConvCall, grad_output: Tensor, gradients: ConvGradients
) -> Any:
    """A backward call that writes ``gradients``, without its weight."""
    weight = call.weight
    assert isinstance(call.input, Tensor)
    args = module.MixedConv2dBackwardArgs()
    args.batch = call.batch
    args.bits = call.bits.data_ptr()
    args.geometry = geometry(module, call.geometry)
    args.widths = list(weight.options)
    args.centred = list(weight.centred)
    args.input = feature_map(module, call.input)
    if call.input_quantizer is not None:
        args.input_quantizer = quantizer(module, call.input_quantizer)
    args.weight_scale = pointer(weight.scale)
    args.mul, args.bias = pointer(call.mul), pointer(call.bias)
    args.grad_output = feature_map(module, grad_output)
    args.grad_input = pointer(gradients.input)
    args.grad_weight = pointer(gradients.weight)
    args.grad_input_scale = pointer(gradients.input_scale)
    args.grad_weight_scale = pointer(gradients.weight_scale)
    args.grad_mul = pointer(gradients.mul)
    args.grad_add = pointer(gradients.add)
    return args


def gate_args(
    module: Any,
    features: Any,
    weights: Sequence[Tensor],
    choices: tuple[int, ...],
    state: Tensor | None,
    out: GateStep,
) -> Any:
    """A gate's call; every tensor is contiguous, ``features`` a native feature map."""
    return module.RnnGateArgs(
        batch=out.bits.shape[0],
        input=features,
        hidden=out.state.shape[2],
        choices=choices,
        state=pointer(state),
        out_bits=out.bits.data_ptr(),
        out_logits=out.logits.data_ptr(),
        out_state=out.state.data_ptr(),
        **{
            name: value.data_ptr()
            for name, value in zip(RNNGateWeights._fields, weights, strict=True)
        },
    )
