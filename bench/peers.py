"""PyTorch's and ONNX Runtime's convolutions, as their users would best call them.

All int8 peers take the very codes that our 8-bit contestant takes and apply a ReLU by saturating;
their weights are packed ahead. Float32 peers apply none: PyTorch would need a second pass for it.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.layers import UNSIGNED_STEPS, Layer, LayerWeights, layer_input, layer_weights
from bench.ours import Maker, output_steps, packed_input, repeated_bits, select_samples
from bench.prepared import Prepared, Unavailable
from bench.rotation import Rotation, copies_to_rotate
from dfs_kernels import PackedActivation, mixed_conv2d, unpack_bits

_ONNX_OPSET = 17
# Of the oldest ONNX Runtime that knows the opset.
_ONNX_IR_VERSION = 8


def torch_int8(layer: Layer, batch: int, threads: int) -> Prepared:
    """``quantized.conv2d_relu`` of the oneDNN engine on a channels_last tensor."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise Unavailable("this PyTorch has no onednn engine for quantized tensors")
    x = packed_input(layer, repeated_bits((8,), batch))
    with warnings.catch_warnings():
        # PyTorch means to move these tensors elsewhere; so far nothing of the same speed is public.
        warnings.simplefilter("ignore")
        quantized = torch._make_per_tensor_quantized_tensor(
            codes_of(x), layer.steps[8], layer.zero_points[8]
        ).contiguous(memory_format=torch.channels_last)
        weight = _prepack(layer_weights(layer))
    out_step = UNSIGNED_STEPS[8]

    def run(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.quantized.conv2d_relu(x, weight, out_step, 0)
        return result

    copies = _int8_copies(layer, batch)
    call = Rotation(run, [quantized, *(quantized.clone() for _ in range(copies - 1))])

    def check() -> None:
        _assert_codes(call().int_repr(), layer, x)

    return Prepared(call, check, copies)


def torch_float32(channels_last: bool) -> Maker:
    """``F.conv2d``, its input and weight in one of the two memory formats."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def make(layer: Layer, batch: int, threads: int) -> Prepared:
        weight = layer_weights(layer).weight.contiguous(memory_format=memory_format)
        x = layer_input(layer, batch).contiguous(memory_format=memory_format)

        def run(x: Tensor) -> Tensor:
            return F.conv2d(
                x, weight, stride=layer.stride, padding=layer.padding, groups=layer.groups
            )

        copies = _float_copies(layer, batch)
        call = Rotation(run, [x, *(x.clone() for _ in range(copies - 1))])

        def check() -> None:
            _assert_floats(call(), layer, x)

        return Prepared(call, check, copies)

    return make


def onnxruntime_int8(layer: Layer, batch: int, threads: int) -> Prepared:
    """``QLinearConv`` in ONNX Runtime's own channels-last form.

    The standard form is NCHW; alone in a model it is measured with a transposition on either side.
    """
    onnx, runtime = _import_onnx()
    weights = layer_weights(layer)
    x = packed_input(layer, repeated_bits((8,), batch))
    constants = {
        "x_scale": np.float32(layer.steps[8]),
        "x_zero": np.uint8(layer.zero_points[8]),
        "w": _weight_codes(weights).numpy(),
        "w_scale": weights.scales[8].numpy(),
        "w_zero": np.zeros(layer.out_channels, np.int8),
        "y_scale": np.float32(UNSIGNED_STEPS[8]),
        "y_zero": np.uint8(0),
    }
    inputs = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    node = onnx.helper.make_node(
        "QLinearConv",
        inputs,
        ["y"],
        domain="com.microsoft",
        channels_last=1,
        **_onnx_attributes(layer),
    )
    x_shape = [batch, layer.side, layer.side, layer.in_channels]
    y_shape = [batch, layer.out_side, layer.out_side, layer.out_channels]
    session = _onnx_session(
        onnx, runtime, node, constants, onnx.TensorProto.UINT8, x_shape, y_shape, threads
    )
    codes = codes_of(x).permute(0, 2, 3, 1).contiguous().numpy()
    copies = _int8_copies(layer, batch)
    call = _bound_calls(session, codes, y_shape, copies)

    def check() -> None:
        _assert_codes(torch.from_numpy(call()).permute(0, 3, 1, 2), layer, x)

    return Prepared(call, check, copies)


def onnxruntime_float32(layer: Layer, batch: int, threads: int) -> Prepared:
    """``Conv``, NCHW; ONNX Runtime reorders to and from its blocked layout within the call."""
    onnx, runtime = _import_onnx()
    x = layer_input(layer, batch)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], **_onnx_attributes(layer))
    x_shape = list(x.shape)
    y_shape = [batch, layer.out_channels, layer.out_side, layer.out_side]
    constants = {"w": layer_weights(layer).weight.numpy()}
    session = _onnx_session(
        onnx, runtime, node, constants, onnx.TensorProto.FLOAT, x_shape, y_shape, threads
    )
    copies = _float_copies(layer, batch)
    call = _bound_calls(session, x.numpy(), y_shape, copies)

    def check() -> None:
        _assert_floats(torch.from_numpy(call()), layer, x)

    return Prepared(call, check, copies)


def codes_of(x: PackedActivation) -> Tensor:
    """The uint8 (N, C, H, W) codes of a batch that is all at 8 bits."""
    rows = x.data.view(x.shape[0], x.height, x.width, x.channels)
    return rows.permute(0, 3, 1, 2).contiguous()


def _weight_codes(weights: LayerWeights) -> Tensor:
    codes = unpack_bits(weights.packed.packed(8), 8, weights.layer.group_channels, signed=True)
    return codes.permute(0, 3, 1, 2).contiguous()


def _prepack(weights: LayerWeights) -> Any:
    layer = weights.layer
    weight = torch._make_per_channel_quantized_tensor(
        _weight_codes(weights),
        weights.scales[8].double(),
        torch.zeros(layer.out_channels, dtype=torch.int64),
        0,
    )
    # The engine is chosen where a weight is packed; calls follow it.
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        return torch.ops.quantized.conv2d_prepack(
            weight, None, [layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups
        )
    finally:
        torch.backends.quantized.engine = engine


def _int8_copies(layer: Layer, batch: int) -> int:
    return copies_to_rotate(batch, batch * (layer.in_values + layer.out_values))


def _float_copies(layer: Layer, batch: int) -> int:
    return copies_to_rotate(batch, 4 * batch * (layer.in_values + layer.out_values))


def _assert_codes(got: Tensor, layer: Layer, x: PackedActivation) -> None:
    """The codes are the reference's but for the rounding of a float32 rescaling: at most 1 off."""
    picked = sorted({0, x.shape[0] - 1})
    expected = mixed_conv2d(
        select_samples(x, picked),
        layer_weights(layer).packed,
        8,
        stride=layer.stride,
        padding=layer.padding,
        groups=layer.groups,
        activation="relu",
        output_scale=output_steps(),
        backend="reference",
    )
    assert isinstance(expected, PackedActivation)
    assert tuple(got.shape) == (x.shape[0], *expected.shape[1:])
    difference = got[picked].short() - codes_of(expected).short()
    assert int(difference.abs().max()) <= 1


def _assert_floats(got: Tensor, layer: Layer, x: Tensor) -> None:
    """Within the rounding of a float32 sum."""
    picked = sorted({0, len(x) - 1})
    expected = F.conv2d(
        x[picked].double(),
        layer_weights(layer).weight.double(),
        stride=layer.stride,
        padding=layer.padding,
        groups=layer.groups,
    )
    assert got.shape[0] == len(x)
    torch.testing.assert_close(got[picked], expected.float(), rtol=1e-4, atol=1e-4)


def _import_onnx() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"{error.name} is missing; pip install -e '.[bench]'") from None
    return onnx, onnxruntime


def _onnx_attributes(layer: Layer) -> dict[str, Any]:
    return {
        "kernel_shape": [layer.kernel] * 2,
        "pads": [layer.padding] * 4,
        "strides": [layer.stride] * 2,
        "group": layer.groups,
    }


def _onnx_session(
    onnx: Any,
    runtime: Any,
    node: Any,
    constants: dict[str, Any],
    kind: int,
    x_shape: list[int],
    y_shape: list[int],
    threads: int,
) -> Any:
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [onnx.helper.make_tensor_value_info("x", kind, x_shape)],
        [onnx.helper.make_tensor_value_info("y", kind, y_shape)],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opsets = [
        onnx.helper.make_opsetid("", _ONNX_OPSET),
        onnx.helper.make_opsetid("com.microsoft", 1),
    ]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_ONNX_IR_VERSION)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin between calls would take the processor from the contestant that is next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _bound_calls(session: Any, x: Any, y_shape: list[int], copies: int) -> Rotation:
    """Calls that read and write preallocated memory; each gives the output array."""
    bound = []
    for _ in range(copies):
        source, target = x.copy(), np.empty(y_shape, x.dtype)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, x.dtype, source.shape, source.ctypes.data)
        binding.bind_output("y", "cpu", 0, target.dtype, target.shape, target.ctypes.data)
        # The binding borrows the memory, so the arrays travel with it.
        bound.append((binding, source, target))

    def run(item: tuple[Any, Any, Any]) -> Any:
        session.run_with_iobinding(item[0])
        return item[2]

    return Rotation(run, bound)
