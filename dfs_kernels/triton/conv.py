"""Mixed-bitwidth convolution as implicit matrix products, one sample at its own width.

The rows of a product are output pixels of one sample, its columns output channels, and what it sums
over are the words of packed codes under a window, tap by tap. Activations and weights are read in
their packed form and unpacked in registers, into int8 operands of the tensor cores:

- 2 and 4 bits: q - z times the level. Outside the image q = z, so the product is 0.
- 8 bits: q - 128 times the code, and (128 - z) * sum(level) is added afterwards, which takes the
  padding, whose q - 128 is z - 128, back out too. Centred levels 2q + 1 do not fit int8: the
  sum splits as 2 * sum(x q) + sum(x).

Codes behind the last channel count for nothing: their levels are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dfs_kernels.triton.codes import (
    dequantize,
    float_pointer,
    is_option,
    load_codes,
    quantize,
    store_codes,
    unpack_last,
    width_index,
)
from dfs_kernels.triton.packing import fill_row, load_values


@triton.jit
def multiply_packed(
    row,  # uint8: the sample's packed input
    weight,  # uint8: codes of one width, canonical
    oy,
    ox,
    pixel_inside,
    o,
    o_inside,
    group,
    zero_point,
    stored_scale,
    stored_zero,
    scale,
    height,
    width,
    C: tl.constexpr,
    CG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    pad_top,
    pad_left,
    BITS: tl.constexpr,
    CENTRED: tl.constexpr,
    STREAM: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int32 [BLOCK_M, BLOCK_N] sums at one width.

    STREAM: the input is stored at 8 bits and quantized again while it is read. WORD: bytes of the
    input that are read at a time; they divide a group's run of codes.
    """
    STORED: tl.constexpr = 8 if STREAM else BITS
    # Codes in a word of the input, and words in a group's run of a pixel.
    PER: tl.constexpr = WORD * 8 // STORED
    RUN: tl.constexpr = (CG * STORED + 7) // 8 // WORD
    PIXEL: tl.constexpr = (C * STORED + 7) // 8 // WORD
    # A word of the weight holds as many codes.
    W_WORD: tl.constexpr = PER * BITS // 8
    WORDS: tl.constexpr = KH * KW * RUN
    BLOCK_WORDS: tl.constexpr = BLOCK_K // PER
    TAILS: tl.constexpr = RUN * PER != CG
    # Levels of masked codes have to be 0, which a centred one never is.
    MASK_LEVELS: tl.constexpr = TAILS or (CENTRED and WORDS % BLOCK_WORDS != 0)

    word_type: tl.constexpr = tl.int32 if WORD == 4 else (tl.int16 if WORD == 2 else tl.uint8)
    w_type: tl.constexpr = tl.int32 if W_WORD == 4 else (tl.int16 if W_WORD == 2 else tl.uint8)
    words = row.to(tl.pointer_type(word_type)) + group * RUN
    w_words = weight.to(tl.pointer_type(w_type)) + o[:, None] * WORDS
    # A word of padding: the code that stands for 0.
    pad_code = stored_zero if STREAM else zero_point
    pad_word = pad_code
    for i in tl.static_range(1, PER):
        pad_word = pad_word | (pad_code << (i * STORED))

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    code_sum = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, WORDS, BLOCK_WORDS):
        k = first + tl.arange(0, BLOCK_WORDS)
        tap = k // RUN
        iy = oy[:, None] + ((tap // KW) * DILATION_H - pad_top)[None, :]
        ix = ox[:, None] + ((tap % KW) * DILATION_W - pad_left)[None, :]
        inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        inside = inside & pixel_inside[:, None] & (k < WORDS)[None, :]
        place = (iy * width + ix) * PIXEL + (k % RUN)[None, :]
        raw = tl.load(words + place, mask=inside, other=pad_word.to(word_type))
        x = unpack_last(raw, STORED, PER)
        if STREAM:
            x = quantize(dequantize(x, stored_scale, stored_zero), scale, zero_point, BITS)

        w_raw = tl.load(
            w_words + k[None, :], mask=o_inside[:, None] & (k < WORDS)[None, :], other=0
        )
        SIGN: tl.constexpr = 1 << (BITS - 1)
        w = (unpack_last(w_raw, BITS, PER) ^ SIGN) - SIGN
        if CENTRED and BITS != 8:
            w = 2 * w + 1
        if MASK_LEVELS:
            code = first * PER + tl.arange(0, BLOCK_K)
            channel = (code // PER) % RUN * PER + code % PER
            counts = (channel < CG) & (code // PER < WORDS)
            w = tl.where(counts[None, :], w, 0)
            if CENTRED and BITS == 8:
                code_sum += tl.sum(tl.where(counts[None, :], x - 128, 0), axis=1)
        elif CENTRED and BITS == 8:
            code_sum += tl.sum(x - 128, axis=1)
        x = x - 128 if BITS == 8 else x - zero_point
        acc = tl.dot(x.to(tl.int8), tl.trans(w.to(tl.int8)), acc, out_dtype=tl.int32)
    if CENTRED and BITS == 8:
        acc = 2 * acc + code_sum[:, None]
    return acc


@triton.jit
def scale_and_offset(
    step,  # float64 scalar: s_x, halved for centred levels
    weight_scale,  # float32 (len, O), or None at 32 bits
    bias,
    mul,
    add,
    index,
    o,
    inside,
    O: tl.constexpr,
):
    """m and c of the output channels ``o``: float32, one rounding each from float64."""
    one = tl.full(o.shape, 1.0, tl.float64)
    m = one * step
    if weight_scale is not None:
        s = tl.load(weight_scale + index * O + o, mask=inside, other=1.0).to(tl.float64)
        m = m * s
    gain = one
    if mul is not None:
        gain = tl.load(mul + index * O + o, mask=inside, other=1.0).to(tl.float64)
    m = m * gain
    c = one * 0.0 * gain
    if bias is not None:
        c = tl.load(bias + o, mask=inside, other=0.0).to(tl.float64) * gain
    if add is not None:
        c = c + tl.load(add + index * O + o, mask=inside, other=0.0).to(tl.float64)
    else:
        c = c + 0.0
    return m.to(tl.float32), c.to(tl.float32)


@triton.jit
def finish(
    y,  # float32 [P, N]: m * acc + c, or 0 of a skipped sample
    bits,
    n,
    pixel,
    pixel_inside,
    oy,
    ox,
    o,
    o_inside,
    first,
    stop,
    residual,
    residual_bits,
    residual_scale,
    residual_zero,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    out,
    out_bits,
    out_scale,
    out_zero,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    O: tl.constexpr,
    RESIDUAL_INDEX: tl.constexpr,
    OUT_INDEX: tl.constexpr,
    RELU: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the residual, rectify, and write floats or codes.

    Oy and ox are output coordinates. RESIDUAL_INDEX and OUT_INDEX are None for float tensors.
    """
    inside = pixel_inside[:, None] & o_inside[None, :]
    if residual is not None:
        if RESIDUAL_INDEX is None:
            place = residual + n * residual_stride_n
            place += (oy * residual_stride_h + ox * residual_stride_w)[:, None]
            r = tl.load(place + (o * residual_stride_c)[None, :], mask=inside, other=0.0)
        else:
            r_bits = tl.load(residual_bits + n)
            r_row = residual + n * residual_stride_n
            r = load_values(
                r_row,
                pixel[:, None],
                o[None, :],
                O,
                r_bits,
                residual_scale,
                residual_zero,
                inside,
                RESIDUAL_INDEX,
            )
        y = tl.where(bits == 0, r, y + r)
    if RELU:
        y = tl.where(y < tl.where(bits == 0, float("-inf"), 0.0), 0.0, y)

    if OUT_INDEX is None:
        place = out + n * out_stride_n + (oy * out_stride_h + ox * out_stride_w)[:, None]
        tl.store(place + (o * out_stride_c)[None, :], y, mask=inside)
    else:
        o_bits = tl.load(out_bits + n)
        row = out + n * out_stride_n
        if o_bits == 32:
            tl.store(float_pointer(row) + pixel[:, None] * O + o[None, :], y, mask=inside)
        elif is_option(o_bits, OUT_INDEX):
            index = width_index(o_bits, OUT_INDEX)
            s = tl.load(out_scale + index)
            z = tl.load(out_zero + index)
            codes = quantize(y, s, z, o_bits)
            if residual is not None and RESIDUAL_INDEX is not None:
                # A skipped sample's codes are copied if they mean the same there.
                known = is_option(r_bits, RESIDUAL_INDEX) & (r_bits != 32)
                r_index = width_index(r_bits, RESIDUAL_INDEX)
                same = (tl.load(residual_scale + r_index) == s) & (
                    tl.load(residual_zero + r_index) == z
                )
                if same & known & (bits == 0) & (r_bits == o_bits):
                    codes = load_codes(
                        r_row, pixel[:, None], o[None, :], O, o_bits, inside, RESIDUAL_INDEX
                    )
            if o_bits == 8:
                store_codes(row, codes, pixel, first, stop, O, pixel_inside, RUN, 8, BLOCK_N)
            elif o_bits == 4:
                store_codes(row, codes, pixel, first, stop, O, pixel_inside, RUN, 4, BLOCK_N)
            else:
                store_codes(row, codes, pixel, first, stop, O, pixel_inside, RUN, 2, BLOCK_N)


@triton.jit
def fill_unknown(
    n,
    pixel_inside,
    oy,
    ox,
    o,
    o_inside,
    part,
    parts,
    out,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    OUT_INDEX: tl.constexpr,
):
    """What a sample at a width that is not offered gets: NaN, or 0xFF in all of its row."""
    if OUT_INDEX is None:
        inside = pixel_inside[:, None] & o_inside[None, :]
        place = out + n * out_stride_n + (oy * out_stride_h + ox * out_stride_w)[:, None]
        nan = tl.zeros(inside.shape, tl.float32) + float("nan")
        tl.store(place + (o * out_stride_c)[None, :], nan, mask=inside)
    else:
        fill_row(out + n * out_stride_n, out_stride_n, part, parts)


@triton.jit
def take_slot(pid_slot, bits, order, starts, WIDTH_SLOT: tl.constexpr):
    """The sample of a program and its width.

    Without ``order`` the slot is the sample. With it, samples are sorted by width, and a launch
    serves one width: slots beyond its samples get width -1, which nobody handles.
    """
    if order is None:
        n = pid_slot.to(tl.int64)
        b = tl.load(bits + n)
    else:
        begin = tl.load(starts + WIDTH_SLOT)
        valid = begin + pid_slot < tl.load(starts + WIDTH_SLOT + 1)
        n = tl.load(order + tl.where(valid, begin + pid_slot, 0)).to(tl.int64)
        b = tl.where(valid, tl.load(bits + n), -1)
    return n, b


@triton.jit
def mixed_conv2d_kernel(
    input,  # uint8 (N, input_stride_n): packed at each sample's own width, or at 8 bits if STREAM
    input_scale,  # the quantizer at the sample's width, float32 and int32
    input_zero,
    stored_scale,  # of the stream, 0-dimensional
    stored_zero,
    weight,  # uint8: canonical codes, all widths
    weight_scale,  # float32 (len, O)
    level_sums,  # int32 (O,): sums of the levels at 8 bits
    bits,  # int32 (N,)
    order,  # int32 (N,): samples sorted by width, or None
    starts,  # int32: where each width's samples begin in it
    bias,
    mul,
    add,
    residual,
    residual_bits,
    residual_scale,
    residual_zero,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    out,
    out_bits,
    out_scale,
    out_zero,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    input_stride_n,
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
    WIDTHS: tl.constexpr,  # which of (2, 4, 8) this launch computes
    REST: tl.constexpr,  # whether it also serves skipped samples and unknown widths
    WIDTH_SLOT: tl.constexpr,
    INPUT_INDEX: tl.constexpr,
    WEIGHT_INDEX: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    RESIDUAL_INDEX: tl.constexpr,
    OUT_INDEX: tl.constexpr,
    IN_PLACE: tl.constexpr,
    RELU: tl.constexpr,
    STREAM: tl.constexpr,
    WORDS: tl.constexpr,  # per width, bytes read at a time
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CG: tl.constexpr = C // GROUPS
    OG: tl.constexpr = O // GROUPS
    TILES_N: tl.constexpr = (OG + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tiles = tiles_m * (GROUPS * TILES_N)
    n, b = take_slot(program // tiles, bits, order, starts, WIDTH_SLOT)
    tile = program % tiles
    group = (tile // TILES_N) % GROUPS
    first = group * OG + (tile % TILES_N) * BLOCK_N
    stop = (group + 1) * OG
    o = first + tl.arange(0, BLOCK_N)
    o_inside = o < stop
    pixel = tile // (GROUPS * TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_inside = pixel < out_height * out_width
    oy = pixel // out_width
    ox = pixel % out_width

    mine = b < -1
    for i in tl.static_range(3):
        if WIDTHS[i]:
            mine = mine | (b == (2 << i))
    if REST and not IN_PLACE:
        mine = mine | (b == 0)
    if mine:
        row = input + n * input_stride_n
        input_index = width_index(b, INPUT_INDEX)
        scale = tl.load(input_scale + input_index)
        zero = tl.load(input_zero + input_index)
        s_stored = tl.load(stored_scale) if STREAM else 0.0
        z_stored = tl.load(stored_zero) if STREAM else 0
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        half = tl.full((), 1.0, tl.float64)
        for i in tl.static_range(3):
            if WIDTHS[i]:
                if b == (2 << i):
                    acc = multiply_packed(
                        row,
                        weight + WEIGHT_OFFSET[i],
                        oy * STRIDE_H,
                        ox * STRIDE_W,
                        pixel_inside,
                        o,
                        o_inside,
                        group,
                        zero,
                        s_stored,
                        z_stored,
                        scale,
                        height,
                        width,
                        C,
                        CG,
                        KH,
                        KW,
                        STRIDE_H,
                        STRIDE_W,
                        DILATION_H,
                        DILATION_W,
                        pad_top,
                        pad_left,
                        2 << i,
                        CENTRED[i],
                        STREAM,
                        WORDS[i],
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                    )
                    if CENTRED[i]:
                        half = half * 0.5
                    if i == 2:
                        sums = tl.load(level_sums + o, mask=o_inside, other=0)
                        acc += ((128 - zero) * sums)[None, :]
        m, c = scale_and_offset(
            scale.to(tl.float64) * half,
            weight_scale,
            bias,
            mul,
            add,
            width_index(b, WEIGHT_INDEX),
            o,
            o_inside,
            O,
        )
        y = tl.where(b == 0, 0.0, acc.to(tl.float32) * m[None, :] + c[None, :])
        finish(
            y,
            b,
            n,
            pixel,
            pixel_inside,
            oy,
            ox,
            o,
            o_inside,
            first,
            stop,
            residual,
            residual_bits,
            residual_scale,
            residual_zero,
            residual_stride_n,
            residual_stride_c,
            residual_stride_h,
            residual_stride_w,
            out,
            out_bits,
            out_scale,
            out_zero,
            out_stride_n,
            out_stride_c,
            out_stride_h,
            out_stride_w,
            O,
            RESIDUAL_INDEX,
            OUT_INDEX,
            RELU,
            OG,
            BLOCK_N,
        )
    elif REST:
        if (b > 0) & (not is_option(b, WEIGHT_INDEX)):
            fill_unknown(
                n,
                pixel_inside,
                oy,
                ox,
                o,
                o_inside,
                tile,
                tiles,
                out,
                out_stride_n,
                out_stride_c,
                out_stride_h,
                out_stride_w,
                OUT_INDEX,
            )


@triton.jit
def grouped_conv2d_kernel(
    input,  # uint8 (N, input_stride_n): packed at each sample's own width
    input_scale,
    input_zero,
    weight,  # uint8: canonical codes, all widths
    weight_scale,
    bits,
    bias,
    mul,
    add,
    residual,
    residual_bits,
    residual_scale,
    residual_zero,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    out,
    out_bits,
    out_scale,
    out_zero,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    input_stride_n,
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
    INPUT_INDEX: tl.constexpr,
    WEIGHT_INDEX: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    RESIDUAL_INDEX: tl.constexpr,
    OUT_INDEX: tl.constexpr,
    IN_PLACE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Narrow groups, depthwise first of all: products one by one, without matrices.

    The widths are the same code here, read from the sample.
    """
    CG: tl.constexpr = C // GROUPS
    OG: tl.constexpr = O // GROUPS
    TILES_N: tl.constexpr = (O + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tiles = tiles_m * TILES_N
    n = (program // tiles).to(tl.int64)
    b = tl.load(bits + n)
    tile = program % tiles
    first = (tile % TILES_N) * BLOCK_N
    o = first + tl.arange(0, BLOCK_N)
    o_inside = o < O
    pixel = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_inside = pixel < out_height * out_width
    oy = pixel // out_width
    ox = pixel % out_width
    known = is_option(b, WEIGHT_INDEX)
    mine = known & (b != 32)
    if not IN_PLACE:
        mine = mine | (b == 0)
    if mine:
        row = input + n * input_stride_n
        input_index = width_index(b, INPUT_INDEX)
        scale = tl.load(input_scale + input_index)
        zero = tl.load(input_zero + input_index)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        half = tl.full((), 1.0, tl.float64)
        if b != 0:
            offset = tl.where(
                b == 2, WEIGHT_OFFSET[0], tl.where(b == 4, WEIGHT_OFFSET[1], WEIGHT_OFFSET[2])
            )
            centred = b < 0
            for slot in tl.static_range(3):
                if CENTRED[slot]:
                    centred = centred | (b == (2 << slot))
            half = tl.where(centred, 0.5, 1.0).to(tl.float64)
            sign = 1 << (b - 1)
            run_bytes = (CG * b + 7) >> 3
            for tap in range(KH * KW):
                iy = oy * STRIDE_H + (tap // KW) * DILATION_H - pad_top
                ix = ox * STRIDE_W + (tap % KW) * DILATION_W - pad_left
                inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width) & pixel_inside
                inside = inside[:, None] & o_inside[None, :]
                place = (iy * width + ix)[:, None]
                for i in range(CG):
                    channel = (o // OG) * CG + i
                    x = load_codes(row, place, channel[None, :], C, b, inside, INPUT_INDEX) - zero
                    w_byte = tl.load(
                        weight + offset + (o * (KH * KW) + tap) * run_bytes + ((i * b) >> 3),
                        mask=o_inside,
                        other=0,
                    )
                    q = (w_byte.to(tl.int32) >> ((i * b) & 7)) & ((1 << b) - 1)
                    level = (q ^ sign) - sign
                    level = tl.where(centred, 2 * level + 1, level)
                    acc += tl.where(inside, x, 0) * level[None, :]
        m, c = scale_and_offset(
            scale.to(tl.float64) * half,
            weight_scale,
            bias,
            mul,
            add,
            width_index(b, WEIGHT_INDEX),
            o,
            o_inside,
            O,
        )
        y = tl.where(b == 0, 0.0, acc.to(tl.float32) * m[None, :] + c[None, :])
        finish(
            y,
            b,
            n,
            pixel,
            pixel_inside,
            oy,
            ox,
            o,
            o_inside,
            first,
            O,
            residual,
            residual_bits,
            residual_scale,
            residual_zero,
            residual_stride_n,
            residual_stride_c,
            residual_stride_h,
            residual_stride_w,
            out,
            out_bits,
            out_scale,
            out_zero,
            out_stride_n,
            out_stride_c,
            out_stride_h,
            out_stride_w,
            O,
            RESIDUAL_INDEX,
            OUT_INDEX,
            RELU,
            O,
            BLOCK_N,
        )
    elif (b != 0) & (not known):
        fill_unknown(
            n,
            pixel_inside,
            oy,
            ox,
            o,
            o_inside,
            tile,
            tiles,
            out,
            out_stride_n,
            out_stride_c,
            out_stride_h,
            out_stride_w,
            OUT_INDEX,
        )


@triton.jit
def float_conv2d_kernel(
    input,  # float32, any strides
    weight,  # float32, any strides
    bits,
    bias,
    mul,
    add,
    residual,
    residual_bits,
    residual_scale,
    residual_zero,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    out,
    out_bits,
    out_scale,
    out_zero,
    out_stride_n,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    input_stride_n,
    input_stride_c,
    input_stride_h,
    input_stride_w,
    weight_stride_o,
    weight_stride_c,
    weight_stride_h,
    weight_stride_w,
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
    REST: tl.constexpr,
    WEIGHT_INDEX: tl.constexpr,
    RESIDUAL_INDEX: tl.constexpr,
    OUT_INDEX: tl.constexpr,
    IN_PLACE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    DOTS: tl.constexpr,  # matrix products; otherwise products one by one, for narrow groups
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Samples at 32 bits."""
    CG: tl.constexpr = C // GROUPS
    OG: tl.constexpr = O // GROUPS
    # Without matrix products a tile may span groups.
    PARTS: tl.constexpr = GROUPS if DOTS else 1
    PART: tl.constexpr = O // PARTS
    TILES_N: tl.constexpr = (PART + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tiles = tiles_m * (PARTS * TILES_N)
    n = (program // tiles).to(tl.int64)
    b = tl.load(bits + n)
    tile = program % tiles
    part = (tile // TILES_N) % PARTS
    first = part * PART + (tile % TILES_N) * BLOCK_N
    stop = (part + 1) * PART
    o = first + tl.arange(0, BLOCK_N)
    o_inside = o < stop
    pixel = tile // (PARTS * TILES_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel_inside = pixel < out_height * out_width
    oy = pixel // out_width
    ox = pixel % out_width
    mine = b == 32
    if REST and not IN_PLACE:
        mine = mine | (b == 0)
    if mine:
        image = input + n * input_stride_n
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if b == 32:
            if DOTS:
                for k0 in range(0, KH * KW * CG, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    tap = k // CG
                    channel = k % CG
                    k_inside = k < KH * KW * CG
                    iy = (oy * STRIDE_H - pad_top)[:, None] + (tap // KW * DILATION_H)[None, :]
                    ix = (ox * STRIDE_W - pad_left)[:, None] + (tap % KW * DILATION_W)[None, :]
                    inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
                    inside = inside & pixel_inside[:, None] & k_inside[None, :]
                    place = iy * input_stride_h + ix * input_stride_w
                    place += ((part * CG + channel) * input_stride_c)[None, :]
                    x = tl.load(image + place, mask=inside, other=0.0)
                    w_place = tap // KW * weight_stride_h + tap % KW * weight_stride_w
                    w_place += channel * weight_stride_c
                    w = tl.load(
                        weight + w_place[:, None] + (o * weight_stride_o)[None, :],
                        mask=k_inside[:, None] & o_inside[None, :],
                        other=0.0,
                    )
                    acc = tl.dot(x, w, acc, input_precision=PRECISION)
            else:
                for tap in range(KH * KW):
                    iy = oy * STRIDE_H + (tap // KW) * DILATION_H - pad_top
                    ix = ox * STRIDE_W + (tap % KW) * DILATION_W - pad_left
                    inside = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width) & pixel_inside
                    inside = inside[:, None] & o_inside[None, :]
                    place = (iy * input_stride_h + ix * input_stride_w)[:, None]
                    w_place = weight + tap // KW * weight_stride_h + tap % KW * weight_stride_w
                    for i in range(CG):
                        channel = (o // OG) * CG + i
                        x = tl.load(
                            image + place + (channel * input_stride_c)[None, :],
                            mask=inside,
                            other=0.0,
                        )
                        w = tl.load(
                            w_place + o * weight_stride_o + i * weight_stride_c,
                            mask=o_inside,
                            other=0.0,
                        )
                        acc += x * w[None, :]
        m, c = scale_and_offset(
            tl.full((), 1.0, tl.float64),
            None,
            bias,
            mul,
            add,
            width_index(b, WEIGHT_INDEX),
            o,
            o_inside,
            O,
        )
        y = tl.where(b == 0, 0.0, acc * m[None, :] + c[None, :])
        finish(
            y,
            b,
            n,
            pixel,
            pixel_inside,
            oy,
            ox,
            o,
            o_inside,
            first,
            stop,
            residual,
            residual_bits,
            residual_scale,
            residual_zero,
            residual_stride_n,
            residual_stride_c,
            residual_stride_h,
            residual_stride_w,
            out,
            out_bits,
            out_scale,
            out_zero,
            out_stride_n,
            out_stride_c,
            out_stride_h,
            out_stride_w,
            O,
            RESIDUAL_INDEX,
            OUT_INDEX,
            RELU,
            PART,
            BLOCK_N,
        )
    elif REST:
        if (b != 0) & (b != 32):
            fill_unknown(
                n,
                pixel_inside,
                oy,
                ox,
                o,
                o_inside,
                tile,
                tiles,
                out,
                out_stride_n,
                out_stride_c,
                out_stride_h,
                out_stride_w,
                OUT_INDEX,
            )
