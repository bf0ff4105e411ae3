"""Quantize and pack, unpack and dequantize, and packing of bare codes and of weights."""

from __future__ import annotations

import triton
import triton.language as tl

from dfs_kernels.triton.codes import (
    dequantize,
    float_pointer,
    is_option,
    load_codes,
    pack_last,
    quantize,
    round_half_even,
    store_codes,
    unpack_last,
    width_index,
)


@triton.jit
def pack_bits_kernel(
    codes,  # int8 or uint8 (rows, channels)
    packed,  # uint8 (rows, row_bytes)
    rows,
    channels,
    row_bytes,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    values = tl.load(codes + row[:, None] * channels + channel[None, :], mask=inside, other=0)
    low = values.to(tl.int32) & ((1 << BITS) - 1)
    byte = tl.program_id(1) * (BLOCK_C // PER) + tl.arange(0, BLOCK_C // PER)
    tl.store(
        packed + row[:, None] * row_bytes + byte[None, :],
        pack_last(low, BITS),
        mask=(row < rows)[:, None] & (byte < row_bytes)[None, :],
    )


@triton.jit
def unpack_bits_kernel(
    packed,  # uint8 (rows, row_bytes)
    codes,  # int8 or uint8 (rows, channels)
    rows,
    channels,
    row_bytes,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    byte = tl.program_id(1) * (BLOCK_C // PER) + tl.arange(0, BLOCK_C // PER)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (byte < row_bytes)[None, :]
    values = tl.load(packed + row[:, None] * row_bytes + byte[None, :], mask=inside, other=0)
    result = unpack_last(values, BITS, PER)
    if SIGNED:
        SIGN: tl.constexpr = 1 << (BITS - 1)
        result = (result ^ SIGN) - SIGN
    tl.store(
        codes + row[:, None] * channels + channel[None, :],
        result.to(codes.dtype.element_ty),
        mask=(row < rows)[:, None] & (channel < channels)[None, :],
    )


@triton.jit
def quantize_pack_kernel(
    x,  # float32 (N, C, H, W), any strides
    out,  # uint8 (N, out_stride_n)
    bits,  # int32 (N,)
    scale,
    zero_point,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    out_stride_n,
    pixels,
    width,
    tiles_p,
    C: tl.constexpr,
    INDEX: tl.constexpr,
    FLAT: tl.constexpr,  # whether a row of the image follows the one above
    FILL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pixels and channels of one sample. Samples at 0 bits are left alone.

    With FILL those at a width that is not offered get 0xFF in all of their row.
    """
    program = tl.program_id(0)
    n = (program // tiles_p).to(tl.int64)
    pixel = (program % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    b = tl.load(bits + n)
    row = out + n * out_stride_n
    if is_option(b, INDEX):
        index = width_index(b, INDEX)
        s = tl.load(scale + index)
        z = tl.load(zero_point + index)
        image = x + n * x_stride_n
        if FLAT:
            # Seen to be contiguous, whatever the width, so that several are loaded at a time.
            place = pixel * x_stride_w
        else:
            place = (pixel // width) * x_stride_h + (pixel % width) * x_stride_w
        valid = pixel < pixels
        for first in range(0, C, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            values = tl.load(
                image + place[:, None] + channel[None, :] * x_stride_c,
                mask=valid[:, None] & (channel < C)[None, :],
                other=0.0,
            )
            if b == 32:
                tl.store(
                    float_pointer(row) + pixel[:, None] * C + channel[None, :],
                    values,
                    mask=valid[:, None] & (channel < C)[None, :],
                )
            else:
                codes = quantize(values, s, z, b)
                if b == 8:
                    store_codes(row, codes, pixel, first, C, C, valid, C, 8, BLOCK_C)
                elif b == 4:
                    store_codes(row, codes, pixel, first, C, C, valid, C, 4, BLOCK_C)
                else:
                    store_codes(row, codes, pixel, first, C, C, valid, C, 2, BLOCK_C)
    elif FILL:
        if b != 0:
            fill_row(row, out_stride_n, program % tiles_p, tiles_p)


@triton.jit
def fill_row(row, row_bytes, part, parts):
    """Set one of ``parts`` parts of a row to 0xFF."""
    BLOCK: tl.constexpr = 256
    share = (row_bytes + parts - 1) // parts
    stop = tl.minimum((part + 1) * share, row_bytes)
    for first in range(part * share, stop, BLOCK):
        byte = first + tl.arange(0, BLOCK)
        tl.store(row + byte, tl.full((BLOCK,), 0xFF, tl.uint8), mask=byte < stop)


@triton.jit
def unpack_dequantize_kernel(
    packed,  # uint8 (N, packed_stride_n)
    out,  # float32 (N, C, H, W), contiguous
    bits,
    wanted,  # int32 (N,) or None: only samples with 32 here are written
    scale,
    zero_point,
    packed_stride_n,
    pixels,
    tiles_p,
    C: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A sample at 0 bits gives zeros, one at a width that is not offered NaN."""
    program = tl.program_id(0)
    n = (program // tiles_p).to(tl.int64)
    pixel = (program % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    b = tl.load(bits + n)
    needed = True
    if wanted is not None:
        needed = tl.load(wanted + n) == 32
    if needed:
        row = packed + n * packed_stride_n
        for first in range(0, C, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
            values = load_values(
                row, pixel[:, None], channel[None, :], C, b, scale, zero_point, inside, INDEX
            )
            place = (n * C + channel[None, :]) * pixels + pixel[:, None]
            tl.store(out + place, values, mask=inside)


@triton.jit
def load_values(row, pixel, channel, channels, bits, scale, zero_point, mask, INDEX: tl.constexpr):
    """float32 values of a packed row: 0 at 0 bits, NaN at a width that is not offered."""
    values = tl.zeros(mask.shape, tl.float32)
    if is_option(bits, INDEX):
        if bits == 32:
            values = tl.load(float_pointer(row) + pixel * channels + channel, mask=mask, other=0.0)
        else:
            index = width_index(bits, INDEX)
            codes = load_codes(row, pixel, channel, channels, bits, mask, INDEX)
            values = dequantize(codes, tl.load(scale + index), tl.load(zero_point + index))
    elif bits != 0:
        values += float("nan")
    return values


@triton.jit
def quantize_weight_kernel(
    weight,  # float32 (O, C, KH, KW), any strides
    scale,  # float32 (O,)
    out,  # uint8 (O, KH, KW, run_bytes)
    level_sums,  # int32 (O,) or None
    weight_stride_o,
    weight_stride_c,
    weight_stride_h,
    weight_stride_w,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One output channel: its codes in the canonical layout, and the sum of its levels."""
    LOW: tl.constexpr = -(1 << (BITS - 1))
    HIGH: tl.constexpr = (1 << (BITS - 1)) - 1
    PER: tl.constexpr = 8 // BITS
    RUN_BYTES: tl.constexpr = (C * BITS + 7) // 8
    o = tl.program_id(0).to(tl.int64)
    reciprocal = tl.div_rn(1.0, tl.load(scale + o))
    total = 0
    for first_tap in range(0, KH * KW, BLOCK_T):
        tap = first_tap + tl.arange(0, BLOCK_T)
        place = (tap // KW) * weight_stride_h + (tap % KW) * weight_stride_w
        for first in range(0, C, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            inside = (tap < KH * KW)[:, None] & (channel < C)[None, :]
            values = tl.load(
                weight + o * weight_stride_o + place[:, None] + channel[None, :] * weight_stride_c,
                mask=inside,
                other=0.0,
            )
            t = values * reciprocal
            if CENTRED:
                t = tl.floor(t)
            t = tl.minimum(tl.maximum(t, LOW), HIGH)
            if not CENTRED:
                t = round_half_even(t)
            code = tl.where(inside, t.to(tl.int32), 0)
            level = 2 * code + 1 if CENTRED else code
            total += tl.sum(tl.sum(tl.where(inside, level, 0), axis=1), axis=0)
            byte = first * BITS // 8 + tl.arange(0, BLOCK_C // PER)
            tl.store(
                out + (o * KH * KW + tap[:, None]) * RUN_BYTES + byte[None, :],
                pack_last(code & ((1 << BITS) - 1), BITS),
                mask=(tap < KH * KW)[:, None] & (byte < RUN_BYTES)[None, :],
            )
    if level_sums is not None:
        tl.store(level_sums + o, total)


@triton.jit
def sum_levels_kernel(
    weight,  # uint8 (O, taps, run_bytes): 8-bit codes
    level_sums,  # int32 (O,)
    count,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the levels of one output channel at 8 bits."""
    o = tl.program_id(0).to(tl.int64)
    total = 0
    for first in range(0, count, BLOCK):
        k = first + tl.arange(0, BLOCK)
        code = tl.load(weight + o * count + k, mask=k < count, other=0).to(tl.int32)
        level = (code ^ 128) - 128
        if CENTRED:
            level = 2 * level + 1
        total += tl.sum(tl.where(k < count, level, 0), axis=0)
    tl.store(level_sums + o, total)
