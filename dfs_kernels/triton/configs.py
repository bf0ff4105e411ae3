"""Launch configurations: tile sizes, warps and pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvConfig:
    """How a mixed convolution is launched.

    Attributes:
        block_m: output pixels of a tile. block_n: output channels. block_k: codes summed at a time.
        buckets: sort samples by width and launch once per width, rather than one launch whose
            programs branch on their sample's width.
    """

    block_m: int = 128
    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    buckets: bool = False


@dataclass(frozen=True)
class PixelConfig:
    """How kernels that go over the pixels and channels of an image are launched."""

    block_p: int = 64
    block_c: int = 64
    num_warps: int = 4


def power_of_two(value: int, least: int, most: int) -> int:
    """The smallest power of two that is at least ``value``, within bounds."""
    return min(max(1 << max(value - 1, 0).bit_length(), least), most)


def conv_config(pixels: int, outputs: int, depth: int) -> ConvConfig:
    """A sane configuration for a GPU that no table knows.

    Args:
        pixels: of one sample's output. outputs: channels of a group. depth: products per output.
    """
    block_m = power_of_two(pixels, 16, 128)
    block_n = power_of_two(outputs, 16, 64)
    # Sums and unpacked operands spill from the registers of fewer threads.
    num_warps = 8 if block_m * block_n > 64 * 64 else 4
    return ConvConfig(block_m, block_n, power_of_two(depth, 32, 64), num_warps)


def grouped_config(pixels: int, outputs: int) -> ConvConfig:
    """The same for narrow groups, whose products are taken one by one."""
    return ConvConfig(power_of_two(pixels, 16, 64), power_of_two(outputs, 16, 32))


def float_config(rows: int, columns: int) -> ConvConfig:
    """The same for products of float32, which take registers rather than tensor cores."""
    return ConvConfig(power_of_two(rows, 16, 64), power_of_two(columns, 16, 32), 32)


def pixel_config(pixels: int, channels: int) -> PixelConfig:
    block_p = power_of_two(pixels, 16, 128)
    block_c = power_of_two(channels, 8, 64)
    # As above: fewer threads have too few registers for the largest tiles.
    return PixelConfig(block_p, block_c, 8 if block_p * block_c > 64 * 64 else 4)


def gate_config(pixels: int, channels: int) -> PixelConfig:
    """A whole sample is pooled by one program, so it reads as much as it can at a time."""
    block_c = power_of_two(channels, 8, 64)
    return PixelConfig(power_of_two(pixels, 16, 8192 // block_c), block_c, 8)
