"""Layers: convolution at a chosen bitwidth, quantizers, normalization, gates, gated blocks."""

from dfs.nn.block import ResidualBlock
from dfs.nn.conv import DFSConv2d
from dfs.nn.gates import GateDecision, RNNGate
from dfs.nn.norm import PerWidthBatchNorm2d
from dfs.nn.quantizers import LSQ, MinMax
from dfs.nn.stream import StreamQuantizer

__all__ = [
    "LSQ",
    "DFSConv2d",
    "GateDecision",
    "MinMax",
    "PerWidthBatchNorm2d",
    "RNNGate",
    "ResidualBlock",
    "StreamQuantizer",
]
