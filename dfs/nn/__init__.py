"""Layers: convolution at a chosen bitwidth, quantizers, normalization, gates, gated blocks."""

from dfs.nn.block import ResidualBlock
from dfs.nn.conv import DFSConv2d
from dfs.nn.gate import Gate, GateDecision
from dfs.nn.gates import ConstantGate, FeedForwardGate, RNNGate, make_gate
from dfs.nn.norm import PerWidthBatchNorm2d
from dfs.nn.quantizers import LSQ, MinMax, PaperMinMax
from dfs.nn.semantics import Semantics
from dfs.nn.stream import StreamQuantizer

__all__ = [
    "LSQ",
    "ConstantGate",
    "DFSConv2d",
    "FeedForwardGate",
    "Gate",
    "GateDecision",
    "MinMax",
    "PaperMinMax",
    "PerWidthBatchNorm2d",
    "RNNGate",
    "ResidualBlock",
    "Semantics",
    "StreamQuantizer",
    "make_gate",
]
