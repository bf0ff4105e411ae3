"""The least time that a kernel can take on a GPU: by the bytes it moves, and by its operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.layers import Layer
from dfs_kernels.packing import packed_bytes


@dataclass(frozen=True)
class Peaks:
    """What a GPU did at best, measured in the same run.

    Attributes:
        copy: bytes a second, read and written ones counted alike.
        int8: operations a second, a multiplication and an addition being two.
    """

    copy: float
    int8: float


@dataclass(frozen=True)
class Work:
    """What a call has to do, whoever computes it.

    Attributes:
        bytes: every input read once, every output written once, the weights read once. Widths,
            steps and other small change are left out.
        operations: multiplications and additions, padding counted as if it were data.
    """

    bytes: int
    operations: int = 0

    def seconds(self, peaks: Peaks) -> float:
        """The roofline's time: that of the bytes or of the operations, whichever is longer."""
        return max(self.bytes / peaks.copy, self.operations / peaks.int8)

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)


def convolution(
    layer: Layer, widths: Sequence[int], *, input_bits: int | None = None, output: str = "own"
) -> Work:
    """One convolution of samples at these integer widths.

    Args:
        input_bits: what all inputs are stored at; by default each sample's own width.
        output: "own" width, "float", or "stream": added into 8-bit codes, which are read and
            written. A skipped sample moves nothing, unless its result is a float one.
    """
    moved = 0
    for bits in widths:
        if output == "float":
            moved += 4 * layer.out_values
        if bits:
            moved += _packed(layer.in_channels, layer.side, input_bits or bits)
            if output != "float":
                own = _packed(layer.out_channels, layer.out_side, bits)
                moved += own if output == "own" else 2 * layer.out_values
    moved += sum(_weight_bytes(layer, bits) for bits in {*widths} - {0})
    active = sum(1 for bits in widths if bits)
    return Work(moved, 2 * active * layer.macs)


def quantize_pack(layer: Layer, batch: int, bits: int) -> Work:
    """Float32 to codes."""
    stored = _packed(layer.in_channels, layer.side, bits)
    return Work(batch * (4 * layer.in_values + stored))


# The bytes are the same the other way.
unpack_dequantize = quantize_pack


def _packed(channels: int, side: int, bits: int) -> int:
    """Bytes of one sample's row: floats at 32 bits."""
    return int(side**2 * packed_bytes(channels, bits))


def _weight_bytes(layer: Layer, bits: int) -> int:
    return int(layer.out_channels * layer.kernel**2 * packed_bytes(layer.group_channels, bits))
