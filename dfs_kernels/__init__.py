"""Per-sample mixed-bitwidth convolution from bit-packed weights, as torch ops."""

from dfs_kernels.backends import available_backends, backend_info, use_backend
from dfs_kernels.block import BlockConv, BlockOutput
from dfs_kernels.functional import (
    fake_quantize,
    gated_block,
    mixed_conv2d,
    mixed_conv2d_,
    pack_bits,
    quantize_pack,
    rnn_gate,
    unpack_bits,
    unpack_dequantize,
    warmup,
)
from dfs_kernels.gate import GateStep, RNNGateWeights
from dfs_kernels.packing import PackedActivation, PackedConvWeight

__all__ = [
    "BlockConv",
    "BlockOutput",
    "GateStep",
    "PackedActivation",
    "PackedConvWeight",
    "RNNGateWeights",
    "available_backends",
    "backend_info",
    "fake_quantize",
    "gated_block",
    "mixed_conv2d",
    "mixed_conv2d_",
    "pack_bits",
    "quantize_pack",
    "rnn_gate",
    "unpack_bits",
    "unpack_dequantize",
    "use_backend",
    "warmup",
]
