"""From values to codes, and from codes to bytes: what all ways of encoding share.

Every operation is the one the codec does, in the same order and rounding, so the bytes are the
same to the last bit. Launch with ``enable_fp_fusion=False``: a fused multiply-add would round once
where the reference rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even


@triton.jit
def rounded_down(b_x):
    """The largest fp16 number not above each float32."""
    b_h = b_x.to(tl.float16)
    b_i = b_h.to(tl.int16, bitcast=True)
    b_below = tl.where(b_h > 0, b_i - 1, b_i + 1)
    b_below = tl.where(b_h == 0, -32767, b_below).to(tl.int16)  # -2**-24
    return tl.where(b_h.to(tl.float32) > b_x, b_below, b_i).to(tl.float16, bitcast=True)


@triton.jit
def scale_and_offset(b_low, b_high, BITS: tl.constexpr):
    """Stored scale and offset of each group as float32, and the reciprocal of the scale."""
    b_offset = rounded_down(b_low).to(tl.float32)
    b_step = tl.div_rn(b_high - b_offset, tl.full(b_low.shape, (1 << BITS) - 1, tl.float32))
    b_scale = -(rounded_down(-b_step).to(tl.float32))
    b_one = tl.full(b_low.shape, 1.0, tl.float32)
    # a constant group has code 0, and the offset restores it
    return b_scale, b_offset, tl.div_rn(b_one, tl.where(b_scale == 0, 1.0, b_scale))


@triton.jit
def paired(b_scale, b_offset):
    """Scale and offset as fp16 pairs in int32."""
    b_s = b_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return b_s | (b_offset.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def codes_of(b_x, b_offset, b_inverse, BITS: tl.constexpr):
    """Codes, as int32."""
    b_i = ((b_x - b_offset) * b_inverse + ROUND).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.minimum(tl.maximum(b_i, 0), (1 << BITS) - 1)


@triton.jit
def store_plane(
    b_w,
    row,
    p_head,
    slot,
    m_t,
    is_full,
    W: tl.constexpr,
    NB: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Write bytes ``[T, W]`` of the tokens from ``slot`` on, as bytes from ``row`` on of each.

    Bit 7 of every byte is flipped. Value pages are transposed; within 32 tokens, token t lies at
    (t % 8) * 4 + t // 8. ``is_full``: the mask of tokens is all true.
    """
    T: tl.constexpr = b_w.shape[0]
    WP: tl.constexpr = b_w.shape[1]
    b_w = (b_w ^ 0x80).to(tl.int8)
    o_t = tl.arange(0, T)
    o_w = tl.arange(0, WP)
    if IS_KEY:
        p_w = p_head + (slot + o_t)[:, None] * NB + row + o_w[None, :]
        tl.store(p_w, b_w, mask=m_t[:, None] & (o_w < W)[None, :])
    elif T % 32 == 0:  # whole runs of 32: bring them to the order of the page, then write rows
        b_w = tl.permute(tl.reshape(b_w, [T // 32, 4, 8, WP]), (3, 0, 2, 1))
        m_p = tl.reshape(tl.permute(tl.reshape(m_t, [T // 32, 4, 8]), (0, 2, 1)), [T])
        p_w = p_head + (row + o_w)[:, None] * PAGE + (slot + o_t)[None, :]
        b_w = tl.reshape(b_w, [WP, T])
        if is_full:  # a mask along the row would split it into single bytes
            tl.store(p_w, b_w, mask=(o_w < W)[:, None])
        else:
            tl.store(p_w, b_w, mask=m_p[None, :] & (o_w < W)[:, None])
    else:
        o_s = slot + o_t
        o_at = o_s // 32 * 32 + o_s % 8 * 4 + o_s % 32 // 8
        p_w = p_head + (row + o_w)[None, :] * PAGE + o_at[:, None]
        tl.store(p_w, b_w, mask=m_t[:, None] & (o_w < W)[None, :])


@triton.jit
def store_words(b_w, p_row, NB: tl.constexpr):
    """Write the bytes of token rows, four a word ``[T, W]``."""
    o_t = tl.arange(0, b_w.shape[0])[:, None]
    o_w = tl.arange(0, b_w.shape[1])[None, :]
    p_w = (p_row + o_t * NB).to(tl.pointer_type(tl.int32)) + o_w
    tl.store(p_w, b_w ^ -0x7F7F7F80)  # 0x80808080


@triton.jit
def planes_of_3_bits(b_c, ONES: tl.constexpr):
    """What every field of codes ``[T, 8, W]`` adds to the bytes of the planes P0, P2, P1.

    ONES: 1 in every byte of a word that holds a code.
    """
    o_f = tl.arange(0, 8)[None, :, None]
    b_0 = tl.where(o_f == 0, b_c, tl.where(o_f == 1, b_c << 3, 0))
    b_0 = tl.where(o_f == 6, (b_c & 3 * ONES) << 6, b_0)
    b_2 = tl.where(o_f == 4, b_c, tl.where(o_f == 5, b_c << 3, 0))
    b_2 = tl.where(o_f == 7, ((b_c >> 1) & 3 * ONES) << 6, b_2)
    b_1 = tl.where(o_f == 2, b_c, tl.where(o_f == 3, b_c << 3, 0))
    b_1 = tl.where(o_f == 6, ((b_c >> 2) & ONES) << 6, b_1)
    b_1 = tl.where(o_f == 7, (b_c & ONES) << 7, b_1)
    return b_0, b_2, b_1
