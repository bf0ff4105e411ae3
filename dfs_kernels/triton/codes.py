"""What the kernels share: reading, quantizing and packing integer codes.

Every float operation is rounded once; kernels are compiled with ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting it rounds to an integer, halves to even, below 2^22.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):
    """float32 values of at most 2^22 -> the nearest integers, as float32."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def quantize(x, scale, zero_point, bits):
    """float32 values -> unsigned codes, int32. A NaN gives the lowest code."""
    zero = zero_point.to(tl.float32)
    low = 0.0 - zero
    high = ((1 << bits) - 1) * 1.0 - zero
    t = x * tl.div_rn(1.0, scale)
    t = tl.where(t >= low, t, low)
    t = tl.where(t <= high, t, high)
    return round_half_even(t).to(tl.int32) + zero_point


@triton.jit
def dequantize(codes, scale, zero_point):
    """Unsigned codes -> float32(q - z) * s."""
    return (codes - zero_point).to(tl.float32) * scale


@triton.jit
def width_index(bits, INDEX: tl.constexpr):
    """Where a width stands in a list of options; INDEX is that of (2, 4, 8, 32), -1 if absent.

    A width that is no option gives 0, so that whatever is read stays within bounds.
    """
    index = tl.where(bits == 2, INDEX[0], tl.where(bits == 4, INDEX[1], INDEX[2]))
    index = tl.where(bits == 32, INDEX[3], index)
    return tl.maximum(index, 0)


@triton.jit
def is_option(bits, INDEX: tl.constexpr):
    """Whether a width is among the options behind INDEX."""
    known = bits < 0
    if INDEX[0] >= 0:
        known = known | (bits == 2)
    if INDEX[1] >= 0:
        known = known | (bits == 4)
    if INDEX[2] >= 0:
        known = known | (bits == 8)
    if INDEX[3] >= 0:
        known = known | (bits == 32)
    return known


@triton.jit
def unpack_last(packed, BITS: tl.constexpr, PER: tl.constexpr):
    """[R, W] words of PER codes each -> [R, W * PER] codes, the lowest bits first. int32."""
    if PER == 1:
        return packed.to(tl.int32)
    shifts = tl.arange(0, PER) * BITS
    parts = (packed.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(parts, (packed.shape[0], packed.shape[1] * PER))


@triton.jit
def pack_last(codes, BITS: tl.constexpr):
    """[R, C] codes, int32 -> [R, C * BITS / 8] bytes, uint8."""
    PER: tl.constexpr = 8 // BITS
    if PER == 1:
        return codes.to(tl.uint8)
    shifts = tl.arange(0, PER) * BITS
    parts = tl.reshape(codes, (codes.shape[0], codes.shape[1] // PER, PER))
    return tl.sum(parts << shifts[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def load_codes(row, pixel, channel, channels, bits, mask, INDEX: tl.constexpr):
    """Codes of an integer width among the options behind INDEX, out of a packed row. int32."""
    if INDEX[0] < 0 and INDEX[1] < 0:
        # Bytes in a row, which are seen to be that and read several at a time.
        return tl.load(row + pixel * channels + channel, mask=mask, other=0).to(tl.int32)
    bit = channel * bits
    byte = tl.load(row + pixel * ((channels * bits + 7) >> 3) + (bit >> 3), mask=mask, other=0)
    return (byte.to(tl.int32) >> (bit & 7)) & ((1 << bits) - 1)


@triton.jit
def store_codes(
    row,
    codes,
    pixel,
    first,
    stop,
    channels,
    mask,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pack codes [P, BLOCK] of channels first + (0 ... BLOCK) and store those before ``stop``.

    ``first * BITS`` and, unless it is the last channel, ``stop * BITS`` are multiples of 8. Runs of
    RUN channels end at ``stop``, and tiles of BLOCK begin in them.
    """
    PER: tl.constexpr = 8 // BITS
    # Bytes that lie before the end together, or behind it; they may be stored together.
    CODES: tl.constexpr = min(RUN & -RUN, BLOCK)
    TOGETHER: tl.constexpr = max(CODES // PER, 1)
    channel = first + tl.arange(0, BLOCK)
    kept = tl.where((channel < stop)[None, :], codes, 0)
    group = tl.arange(0, BLOCK // PER)
    byte = first * BITS // 8 + group
    kept_bytes = tl.max_constancy(first + group * PER < stop, TOGETHER)
    inside = mask[:, None] & kept_bytes[None, :]
    pixel_bytes = (channels * BITS + 7) // 8
    pointers = row + pixel[:, None] * pixel_bytes + byte[None, :]
    tl.store(pointers, pack_last(kept, BITS), mask=inside)


@triton.jit
def float_pointer(pointer):
    return pointer.to(tl.pointer_type(tl.float32))
