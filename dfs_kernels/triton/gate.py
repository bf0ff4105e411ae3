"""The recurrent gate in one kernel: average pool, embedding, LSTM step and choice."""

from __future__ import annotations

import triton
import triton.language as tl

from dfs_kernels.triton.codes import float_pointer, is_option, load_codes, width_index


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def sum_codes(
    row, bits, channel, pixels, C: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Exact sums over the pixels of a packed row, int32 [BLOCK_C]."""
    total = tl.zeros((BLOCK_C,), tl.int32)
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = (pixel < pixels)[:, None] & (channel < C)[None, :]
        codes = load_codes(row, pixel[:, None], channel[None, :], C, bits, inside, INDEX)
        total += tl.sum(tl.where(inside, codes, 0), axis=0)
    return total


@triton.jit
def sum_values(
    image, stride_h, stride_w, column, inside_c, pixels, width, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the pixels of a float image, float64 [BLOCK_C]."""
    total = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(0, pixels, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        place = (pixel // width) * stride_h + (pixel % width) * stride_w
        inside = (pixel < pixels)[:, None] & inside_c[None, :]
        values = tl.load(image + place[:, None] + column[None, :], mask=inside, other=0.0)
        total += tl.sum(values.to(tl.float64), axis=0)
    return total


@triton.jit
def map_linear(weight, bias, x, row, row_inside, column, COLUMNS: tl.constexpr):
    """float64 [R]: weight (rows, COLUMNS) at ``row`` times x [BLOCK], plus bias."""
    inside = row_inside[:, None] & (column < COLUMNS)[None, :]
    w = tl.load(weight + row[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)
    b = tl.load(bias + row, mask=row_inside, other=0.0).to(tl.float64)
    return tl.sum(w.to(tl.float64) * x[None, :], axis=1) + b


@triton.jit
def rnn_gate_kernel(
    input,  # uint8 (N, stride_n), or float32 with any strides
    input_bits,  # int32 (N,), or None for a float input
    input_scale,
    input_zero,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    state,  # float64 (2, N, HIDDEN), or None
    embed_weight,
    embed_bias,
    weight_ih,
    weight_hh,
    bias_ih,
    bias_hh,
    proj_weight,
    proj_bias,
    choice_bias,
    out_bits,  # int32 (N,)
    out_logits,  # float64 (N, len(CHOICES))
    out_state,  # float64 (2, N, HIDDEN)
    batch,
    pixels,
    width,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    CHOICES: tl.constexpr,
    INDEX: tl.constexpr,  # None for a float input
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One sample. A row at a width that is not offered gives NaN, one at 0 bits means of 0."""
    K: tl.constexpr = len(CHOICES)
    n = tl.program_id(0).to(tl.int64)
    row = input + n * stride_n
    h = tl.arange(0, BLOCK_H)
    h_inside = h < HIDDEN
    x = tl.load(embed_bias + h, mask=h_inside, other=0.0).to(tl.float64)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mean = tl.zeros((BLOCK_C,), tl.float64)
        if INDEX is None:
            total = sum_values(
                row, stride_h, stride_w, channel * stride_c, channel < C, pixels, width, BLOCK_P,
                BLOCK_C,
            )  # fmt: skip
            mean = total / pixels
        else:
            b = tl.load(input_bits + n)
            if is_option(b, INDEX):
                if b == 32:
                    values = float_pointer(row)
                    mean = sum_values(
                        values, width * C, C, channel, channel < C, pixels, width, BLOCK_P, BLOCK_C
                    )
                    mean = mean / pixels
                else:
                    index = width_index(b, INDEX)
                    total = sum_codes(row, b, channel, pixels, C, INDEX, BLOCK_P, BLOCK_C)
                    total = total - pixels * tl.load(input_zero + index)
                    step = tl.load(input_scale + index).to(tl.float64)
                    mean = total.to(tl.float64) * (step / pixels)
            elif b != 0:
                mean += float("nan")
        inside = h_inside[:, None] & (channel < C)[None, :]
        w = tl.load(embed_weight + h[:, None] * C + channel[None, :], mask=inside, other=0.0)
        x += tl.sum(tl.where(inside, w.to(tl.float64) * mean[None, :], 0.0), axis=1)

    place = n * HIDDEN + h
    last = (tl.zeros((), tl.int64) + batch) * HIDDEN
    output = tl.zeros((BLOCK_H,), tl.float64)
    memory = tl.zeros((BLOCK_H,), tl.float64)
    if state is not None:
        output = tl.load(state + place, mask=h_inside, other=0.0)
        memory = tl.load(state + last + place, mask=h_inside, other=0.0)
    i = map_linear(weight_ih, bias_ih, x, h, h_inside, h, HIDDEN)
    i += map_linear(weight_hh, bias_hh, output, h, h_inside, h, HIDDEN)
    f = map_linear(weight_ih, bias_ih, x, HIDDEN + h, h_inside, h, HIDDEN)
    f += map_linear(weight_hh, bias_hh, output, HIDDEN + h, h_inside, h, HIDDEN)
    g = map_linear(weight_ih, bias_ih, x, 2 * HIDDEN + h, h_inside, h, HIDDEN)
    g += map_linear(weight_hh, bias_hh, output, 2 * HIDDEN + h, h_inside, h, HIDDEN)
    o = map_linear(weight_ih, bias_ih, x, 3 * HIDDEN + h, h_inside, h, HIDDEN)
    o += map_linear(weight_hh, bias_hh, output, 3 * HIDDEN + h, h_inside, h, HIDDEN)
    memory = sigmoid(f) * memory + sigmoid(i) * tanh(g)
    output = sigmoid(o) * tanh(memory)
    tl.store(out_state + place, output, mask=h_inside)
    tl.store(out_state + last + place, memory, mask=h_inside)

    k = tl.arange(0, BLOCK_K)
    k_inside = k < K
    logits = map_linear(proj_weight, proj_bias, output, k, k_inside, h, HIDDEN)
    logits += tl.load(choice_bias + k, mask=k_inside, other=0.0)
    tl.store(out_logits + n * K + k, logits, mask=k_inside)
    # The cheapest of the best; where there is no best, among NaNs, the dearest.
    is_nan = (logits != logits) & k_inside
    compared = tl.where(k_inside & (is_nan == 0), logits, float("-inf"))
    is_best = compared == tl.max(compared, axis=0)
    choice = tl.min(tl.where(is_best & k_inside, k, K - 1), axis=0)
    choice = tl.where(tl.sum(is_nan.to(tl.int32), axis=0) > 0, K - 1, choice)
    chosen = choice * 0
    for j in tl.static_range(K):
        chosen = tl.where(choice == j, CHOICES[j], chosen)
    tl.store(out_bits + n, chosen)
