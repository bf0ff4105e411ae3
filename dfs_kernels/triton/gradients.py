"""Gradients of a mixed convolution with respect to its input and weight, for training.

Weights come dequantized, one copy per width with the folded gain in it: (len(options), O,
C/groups, KH, KW). Inputs are quantized again while they are read. Samples at 0 bits cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dfs_kernels.triton.codes import dequantize, quantize, round_half_even, width_index


@triton.jit
def load_gradient(grad, stride_h, stride_w, y, x, STRIDE_H, STRIDE_W, out_height, out_width, mask):
    """The gradient of the output that (y, x) = output coordinates * stride belong to, or 0."""
    oy = y // STRIDE_H
    ox = x // STRIDE_W
    inside = (y >= 0) & (x >= 0) & (y % STRIDE_H == 0) & (x % STRIDE_W == 0)
    inside = inside & (oy < out_height) & (ox < out_width) & mask
    return tl.load(grad + oy * stride_h + ox * stride_w, mask=inside, other=0.0)


@triton.jit
def input_gradient_kernel(
    grad,  # float32 (N, O, OH, OW), any strides
    weight,  # float32 (len, O, CG, KH, KW), contiguous
    x,  # float32 (N, C, H, W), any strides
    scale,
    zero_point,
    bits,
    out,  # float32 (N, C, H, W), contiguous
    slopes,  # float64 (N, tiles): sums of the gradient times the step's slope, or None
    grad_stride_n,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    tiles_m,
    C: tl.constexpr,
    O: tl.constexpr,
    GROUPS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INDEX: tl.constexpr,
    QUANTIZED: tl.constexpr,  # whether the input has a quantizer
    PRECISION: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CG: tl.constexpr = C // GROUPS
    OG: tl.constexpr = O // GROUPS
    PARTS: tl.constexpr = GROUPS if DOTS else 1
    PART: tl.constexpr = C // PARTS
    TILES_N: tl.constexpr = (PART + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tiles = tiles_m * (PARTS * TILES_N)
    n = (program // tiles).to(tl.int64)
    tile = program % tiles
    b = tl.load(bits + n)
    part = (tile // TILES_N) % PARTS
    first = part * PART + (tile % TILES_N) * BLOCK_N
    c = first + tl.arange(0, BLOCK_N)
    c_inside = c < (part + 1) * PART
    pixel = tile // (PARTS * TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_inside = pixel < height * width
    iy = pixel // width
    ix = pixel % width
    inside = pixel_inside[:, None] & c_inside[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    slope = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    if b != 0:
        index = width_index(b, INDEX)
        image = grad + n * grad_stride_n
        w_base = weight + index * (O * CG * KH * KW)
        if DOTS:
            for k0 in range(0, KH * KW * OG, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                tap = k // OG
                o = part * OG + k % OG
                k_inside = k < KH * KW * OG
                y = iy[:, None] + (pad_top - tap // KW * DILATION_H)[None, :]
                xx = ix[:, None] + (pad_left - tap % KW * DILATION_W)[None, :]
                g = load_gradient(
                    image + (o * grad_stride_c)[None, :],
                    grad_stride_h,
                    grad_stride_w,
                    y,
                    xx,
                    STRIDE_H,
                    STRIDE_W,
                    out_height,
                    out_width,
                    pixel_inside[:, None] & k_inside[None, :],
                )
                w = tl.load(
                    w_base
                    + (o * (CG * KH * KW) + tap)[:, None]
                    + ((c - part * CG) * (KH * KW))[None, :],
                    mask=k_inside[:, None] & c_inside[None, :],
                    other=0.0,
                )
                acc = tl.dot(g, w, acc, input_precision=PRECISION)
        else:
            for tap in range(KH * KW):
                y = (iy + pad_top - tap // KW * DILATION_H)[:, None]
                xx = (ix + pad_left - tap % KW * DILATION_W)[:, None]
                for i in range(OG):
                    o = (c // CG) * OG + i
                    g = load_gradient(
                        image + (o * grad_stride_c)[None, :],
                        grad_stride_h,
                        grad_stride_w,
                        y,
                        xx,
                        STRIDE_H,
                        STRIDE_W,
                        out_height,
                        out_width,
                        inside,
                    )
                    w = tl.load(
                        w_base + o * (CG * KH * KW) + (c % CG) * (KH * KW) + tap,
                        mask=c_inside,
                        other=0.0,
                    )
                    acc += g * w[None, :]
        if QUANTIZED:
            if b != 32:
                place = x + n * x_stride_n + (iy * x_stride_h + ix * x_stride_w)[:, None]
                values = tl.load(place + (c * x_stride_c)[None, :], mask=inside, other=0.0)
                s = tl.load(scale + index)
                zero = tl.load(zero_point + index).to(tl.float32)
                low = 0.0 - zero
                high = ((1 << b) - 1) * 1.0 - zero
                t = values * tl.div_rn(1.0, s)
                within = (low <= t) & (t <= high)
                clamped = tl.where(t <= low, low, tl.where(t >= high, high, t))
                # A NaN is beyond both ends, and stays one.
                change = tl.where(within, round_half_even(clamped) - t, clamped)
                slope = tl.where(inside, (acc * change).to(tl.float64), 0.0)
                acc = tl.where(within, acc, 0.0)
    tl.store(out + (n * C + c)[None, :] * (height * width) + pixel[:, None], acc, mask=inside)
    if slopes is not None:
        tl.store(slopes + program, tl.sum(tl.sum(slope, axis=1), axis=0))


@triton.jit
def weight_gradient_kernel(
    grad,  # float32 (N, O, OH, OW), any strides
    x,  # float32 (N, C, H, W), any strides
    scale,
    zero_point,
    bits,
    out,  # float32 (len, splits, O, KH * KW * CG): taps first
    grad_stride_n,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    batch,
    height,
    width,
    out_height,
    out_width,
    pad_top,
    pad_left,
    splits,
    C: tl.constexpr,
    O: tl.constexpr,
    GROUPS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,  # products of a window
    BLOCK_P: tl.constexpr,
):
    """One width: a part of its samples, a tile of output channels and of the window."""
    CG: tl.constexpr = C // GROUPS
    OG: tl.constexpr = O // GROUPS
    TAPS: tl.constexpr = KH * KW * CG
    PARTS: tl.constexpr = GROUPS if DOTS else 1
    PART: tl.constexpr = O // PARTS
    TILES_O: tl.constexpr = (PART + BLOCK_O - 1) // BLOCK_O
    WINDOW: tl.constexpr = BLOCK_T if DOTS else 1
    TILES_T: tl.constexpr = (TAPS + WINDOW - 1) // WINDOW
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits
    t_tile = tile % TILES_T
    o_tile = tile // TILES_T
    part = o_tile // TILES_O
    o = part * PART + (o_tile % TILES_O) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_inside = o < (part + 1) * PART
    index = width_index(WIDTH, INDEX)
    s = tl.load(scale + index) if WIDTH != 32 else 1.0
    zero = tl.load(zero_point + index) if WIDTH != 32 else 0
    if DOTS:
        acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        k = t_tile * BLOCK_T + tl.arange(0, BLOCK_T)
        k_inside = k < TAPS
        channel = part * CG + k % CG
    else:
        acc = tl.zeros((BLOCK_O,), tl.float32)
        k = t_tile
        channel = (o // OG) * CG + k % CG
    tap = k // CG
    share = (batch + splits - 1) // splits
    for sample in range(split * share, tl.minimum((split + 1) * share, batch)):
        if tl.load(bits + sample) == WIDTH:
            n = tl.zeros((), tl.int64) + sample
            for p0 in range(0, out_height * out_width, BLOCK_P):
                pixel = p0 + tl.arange(0, BLOCK_P)
                pixel_inside = pixel < out_height * out_width
                oy = pixel // out_width
                ox = pixel % out_width
                place = grad + n * grad_stride_n + oy * grad_stride_h + ox * grad_stride_w
                g = tl.load(
                    place[None, :] + (o * grad_stride_c)[:, None],
                    mask=o_inside[:, None] & pixel_inside[None, :],
                    other=0.0,
                )
                if DOTS:
                    iy = (oy * STRIDE_H - pad_top)[:, None] + (tap // KW * DILATION_H)[None, :]
                    ix = (ox * STRIDE_W - pad_left)[:, None] + (tap % KW * DILATION_W)[None, :]
                    mask = pixel_inside[:, None] & k_inside[None, :]
                    column = (channel * x_stride_c)[None, :]
                else:
                    iy = (oy * STRIDE_H - pad_top + tap // KW * DILATION_H)[None, :]
                    ix = (ox * STRIDE_W - pad_left + tap % KW * DILATION_W)[None, :]
                    mask = pixel_inside[None, :] & o_inside[:, None]
                    column = (channel * x_stride_c)[:, None]
                mask = mask & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                values = tl.load(
                    x + n * x_stride_n + iy * x_stride_h + ix * x_stride_w + column,
                    mask=mask,
                    other=0.0,
                )
                if WIDTH != 32:
                    values = dequantize(quantize(values, s, zero, WIDTH), s, zero)
                if DOTS:
                    acc = tl.dot(g, values, acc, input_precision=PRECISION)
                else:
                    acc += tl.sum(g * values, axis=1)
    row = (index * splits + split) * O + o
    if DOTS:
        tl.store(
            out + row[:, None] * TAPS + k[None, :], acc, mask=o_inside[:, None] & k_inside[None, :]
        )
    else:
        tl.store(out + row * TAPS + k, acc, mask=o_inside)
