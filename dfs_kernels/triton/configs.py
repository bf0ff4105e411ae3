"""Launch configurations: tile sizes, warps and pipeline stages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


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


def conv_configs(pixels: int, outputs: int, depth: int, widths: int) -> tuple[ConvConfig, ...]:
    """What a mixed convolution can be launched with, the sane default first.

    Args:
        pixels: of one sample's output. outputs: channels of a group. depth: products per output.
        widths: how many integer widths are on offer.
    """

    def tile(most_m: int, most_n: int, most_k: int = 64, stages: int = 3) -> ConvConfig:
        block_m = power_of_two(pixels, 16, most_m)
        block_n = power_of_two(outputs, 16, most_n)
        # Sums and unpacked operands spill from the registers of fewer threads.
        num_warps = 8 if block_m * block_n > 64 * 64 else 4
        return ConvConfig(block_m, block_n, power_of_two(depth, 32, most_k), num_warps, stages)

    default = tile(128, 64)
    others = (
        tile(64, 64),
        tile(64, 32),
        tile(128, 32),
        tile(32, 64),
        tile(128, 64, 32),
        tile(128, 64, 64, 2),
        tile(128, 64, 64, 4),
    )
    buckets = tuple(replace(c, buckets=True) for c in (default, others[0]) if widths > 1)
    return tuple(dict.fromkeys((default, *others, *buckets)))


def grouped_configs(pixels: int, outputs: int) -> tuple[ConvConfig, ...]:
    """The same for narrow groups, whose products are taken one by one."""
    tiles = ((64, 32), (32, 32), (128, 16), (64, 16))
    return _unique(
        ConvConfig(power_of_two(pixels, 16, m), power_of_two(outputs, 16, n)) for m, n in tiles
    )


def float_configs(rows: int, columns: int) -> tuple[ConvConfig, ...]:
    """The same for products of float32."""
    # Tiles of 64 x 64 spill.
    tiles = ((64, 32, 32), (32, 32, 32), (64, 32, 16), (32, 64, 32))
    return _unique(
        ConvConfig(power_of_two(rows, 16, m), power_of_two(columns, 16, n), k) for m, n, k in tiles
    )


def pixel_configs(pixels: int, channels: int) -> tuple[PixelConfig, ...]:
    """The same for what goes over the pixels and channels of an image."""

    def tile(most_p: int, most_c: int) -> PixelConfig:
        block_p = power_of_two(pixels, 16, most_p)
        block_c = power_of_two(channels, 8, most_c)
        # As above.
        return PixelConfig(block_p, block_c, 8 if block_p * block_c > 64 * 64 else 4)

    return _unique(tile(p, c) for p, c in ((128, 64), (64, 64), (256, 32), (32, 128), (256, 64)))


def gate_configs(pixels: int, channels: int) -> tuple[PixelConfig, ...]:
    """The same for a gate: one program pools a whole sample, so it reads much at a time."""
    block_c = power_of_two(channels, 8, 64)
    sizes = ((8192, 8), (4096, 4), (16384, 8), (2048, 4))
    return _unique(
        PixelConfig(power_of_two(pixels, 16, size // block_c), block_c, warps)
        for size, warps in sizes
    )


def _unique(configs: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(configs))
