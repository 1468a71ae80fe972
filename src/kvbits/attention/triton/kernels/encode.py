"""Encoding: statistics, codes and bytes in one pass, for a prompt and for the step of a decode.

Every operation is the one ``codecs/affine.py`` does, in the same order and rounding, so the bytes
are the same to the last bit. Launch these with ``enable_fp_fusion=False``: a fused multiply-add
would round once where the reference rounds twice.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.common import row_lengths
from kvbits.attention.triton.kernels.layout import padded, row_bytes

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer, half to even


@triton.constexpr_function
def num_fields(bits: Any) -> Any:
    """Runs of channels of which every byte index holds one code."""
    return 8 if bits == 3 else 8 // bits


@triton.constexpr_function
def blocks_of_field(bits: Any, groups: Any) -> Any:
    """Scale groups that one field spans."""
    return max(1, groups // (8 if bits == 3 else 8 // bits))


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
def store_fields(
    b_c,
    p_head,
    slot,
    m_t,
    is_full,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Pack the codes of all fields, each ``[T, W]``, and write them."""
    NB: tl.constexpr = row_bytes(BITS, D)
    if BITS == 3:
        W: tl.constexpr = D // 8
        b_p0 = b_c[0] | (b_c[1] << 3) | ((b_c[6] & 3) << 6)
        b_p2 = b_c[4] | (b_c[5] << 3) | ((b_c[7] >> 1) << 6)
        b_p1 = b_c[2] | (b_c[3] << 3) | ((b_c[6] >> 2) << 6) | ((b_c[7] & 1) << 7)
        store_plane(b_p0, 0, p_head, slot, m_t, is_full, W, NB, PAGE, IS_KEY)
        store_plane(b_p2, W, p_head, slot, m_t, is_full, W, NB, PAGE, IS_KEY)
        store_plane(b_p1, 2 * W, p_head, slot, m_t, is_full, W, NB, PAGE, IS_KEY)
    else:
        b_w = b_c[0]
        for j in tl.static_range(1, 8 // BITS):
            b_w = b_w | (b_c[j] << (j * BITS))
        store_plane(b_w, 0, p_head, slot, m_t, is_full, NB, NB, PAGE, IS_KEY)


@triton.jit
def encode_per_token(
    p_x,
    m_t,
    is_full,
    p_head,
    slot,
    p_pairs,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Encode the tokens at ``p_x [T]`` with GROUPS scales each, and write codes and pairs."""
    T: tl.constexpr = p_x.shape[0]
    F: tl.constexpr = num_fields(BITS)
    W: tl.constexpr = D // F
    WP: tl.constexpr = padded(W, 1)
    SPAN: tl.constexpr = blocks_of_field(
        BITS, GROUPS
    )  # groups of a field; else fields of a group:
    JOINED: tl.constexpr = F * SPAN // GROUPS
    o_t = slot + tl.arange(0, T)
    o_w = tl.arange(0, WP)[None, :]
    m_x = m_t[:, None] & (o_w < W)
    b_c = ()
    for i in tl.static_range(F // JOINED):
        b_x = ()
        b_low = tl.full([T, SPAN], float("inf"), tl.float32)
        b_high = tl.full([T, SPAN], float("-inf"), tl.float32)
        for j in tl.static_range(JOINED):
            p_f = p_x[:, None] + (i * JOINED + j) * W + o_w
            b_f = tl.load(p_f, mask=m_x, other=0.0).to(tl.float32)
            b_f = tl.reshape(b_f, [T, SPAN, WP // SPAN])
            b_x = b_x + (b_f,)
            m_f = tl.reshape(tl.broadcast_to(o_w < W, [T, WP]), [T, SPAN, WP // SPAN])
            b_low = tl.minimum(b_low, tl.min(tl.where(m_f, b_f, float("inf")), 2))
            b_high = tl.maximum(b_high, tl.max(tl.where(m_f, b_f, float("-inf")), 2))
        b_s, b_o, b_i = scale_and_offset(b_low, b_high, BITS)
        p_g = (p_pairs + o_t)[:, None] + (i * SPAN + tl.arange(0, SPAN))[None, :] * PAGE
        tl.store(p_g, paired(b_s, b_o), mask=m_t[:, None])
        for j in tl.static_range(JOINED):
            b_f = codes_of(b_x[j], b_o[:, :, None], b_i[:, :, None], BITS)
            b_c = b_c + (tl.reshape(b_f, [T, WP]),)
    store_fields(b_c, p_head, slot, m_t, is_full, D, BITS, PAGE, IS_KEY)


@triton.jit
def encode_per_channel(
    p_x, p_head, slot, p_pairs, D: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr
):
    """Encode one block of tokens at ``p_x [T]`` with a scale per channel; for keys."""
    T: tl.constexpr = p_x.shape[0]
    F: tl.constexpr = num_fields(BITS)
    W: tl.constexpr = D // F
    NB: tl.constexpr = row_bytes(BITS, D)
    m_t = tl.full([T], True, tl.int1)
    is_full = True
    if padded(D, 1) == D:  # the whole tile at once: one reduction over tokens
        o_d = tl.arange(0, D)
        b_x = tl.load(p_x[:, None] + o_d[None, :]).to(tl.float32)
        b_s, b_o, b_i = scale_and_offset(tl.min(b_x, 0), tl.max(b_x, 0), BITS)
        tl.store(p_pairs + o_d, paired(b_s, b_o))
        # Four channels a word: what fields of one byte exchange between threads is a quarter.
        b_c = tl.reshape(codes_of(b_x, b_o[None, :], b_i[None, :], BITS), [T, D // 4, 4])
        b_c = tl.sum(b_c << (tl.arange(0, 4) * 8)[None, None, :], 2)
        b_c = tl.reshape(b_c, [T, F, W // 4])
        o_f = tl.arange(0, F)[None, :, None]
        if BITS == 3:
            b_0 = tl.where(o_f == 0, b_c, tl.where(o_f == 1, b_c << 3, 0))
            b_0 = tl.where(o_f == 6, (b_c & 0x03030303) << 6, b_0)
            b_2 = tl.where(o_f == 4, b_c, tl.where(o_f == 5, b_c << 3, 0))
            b_2 = tl.where(o_f == 7, ((b_c >> 1) & 0x03030303) << 6, b_2)
            b_1 = tl.where(o_f == 2, b_c, tl.where(o_f == 3, b_c << 3, 0))
            b_1 = tl.where(o_f == 6, ((b_c >> 2) & 0x01010101) << 6, b_1)
            b_1 = tl.where(o_f == 7, (b_c & 0x01010101) << 7, b_1)
            store_words(tl.sum(b_0, 1), p_head + slot * NB, NB)
            store_words(tl.sum(b_2, 1), p_head + slot * NB + W, NB)
            store_words(tl.sum(b_1, 1), p_head + slot * NB + 2 * W, NB)
        else:
            store_words(tl.sum(b_c << (o_f * BITS), 1), p_head + slot * NB, NB)
    else:
        o_w = tl.arange(0, padded(W, 1))
        m_w = o_w < W
        b_all = ()
        for j in tl.static_range(F):
            p_f = p_x[:, None] + (j * W + o_w)[None, :]
            b_f = tl.load(p_f, mask=m_w[None, :], other=0.0).to(tl.float32)
            b_sf, b_of, b_if = scale_and_offset(tl.min(b_f, 0), tl.max(b_f, 0), BITS)
            tl.store(p_pairs + j * W + o_w, paired(b_sf, b_of), mask=m_w)
            b_all = b_all + (codes_of(b_f, b_of[None, :], b_if[None, :], BITS),)
        store_fields(b_all, p_head, slot, m_t, is_full, D, BITS, PAGE, True)


@triton.jit
def encode_tile(
    p_x,
    m_t,
    is_full,
    POOL,
    page,
    slot,
    i_hs,
    HS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Encode the tokens at ``p_x [T]`` into one page, from ``slot`` on.

    G > 0: per channel, the tokens being one block. 16 bits: copied as they are.
    """
    NB: tl.constexpr = row_bytes(BITS, D)
    p_head = POOL + page * 16 + i_hs * (PAGE * NB)
    p_pairs = (POOL + page * 16 + HS * PAGE * NB).to(tl.pointer_type(tl.int32))
    if BITS == 16:
        o_d = tl.arange(0, padded(D, 1))[None, :]
        m_x = m_t[:, None] & (o_d < D)
        p_out = (p_head + (slot + tl.arange(0, p_x.shape[0])) * NB).to(p_x.dtype)
        tl.store(p_out[:, None] + o_d, tl.load(p_x[:, None] + o_d, mask=m_x), mask=m_x)
    elif G > 0:
        p_pairs += (i_hs * (PAGE // G) + slot // G) * D
        encode_per_channel(p_x, p_head, slot, p_pairs, D, BITS, PAGE)
    else:
        p_pairs += i_hs * (GROUPS * PAGE)
        encode_per_token(p_x, m_t, is_full, p_head, slot, p_pairs, D, BITS, GROUPS, PAGE, IS_KEY)


@triton.jit(do_not_specialize=["table_stride"])
def encode_prompt(
    X,
    HEADS,
    COLUMN,
    START,
    COUNT,
    POOL,
    TABLE,
    sx_b,
    sx_h,
    sx_t,
    table_stride,
    HS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    T: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Encode COUNT tokens of every row, from its COLUMN on, behind the START it holds.

    Grid (tiles, B * HS). Tile i takes T tokens, or one per-channel block, that lie in one page.
    """
    i_b = tl.program_id(1) // HS
    i_hs = tl.program_id(1) % HS
    i_h = i_hs
    if HAS_HEADS:
        i_h = tl.load(HEADS + i_hs)
    start = tl.load(START + i_b)
    count = tl.load(COUNT + i_b)
    tile = start // T + tl.program_id(0)
    token = tile * T  # first token of the tile, as the store counts
    if token >= start + count:
        return
    o_t = token + tl.arange(0, T)
    m_t = (o_t >= start) & (o_t < start + count)
    p_x = X + i_b.to(tl.int64) * sx_b + i_h.to(tl.int64) * sx_h
    p_x += (tl.load(COLUMN + i_b) + tl.where(m_t, o_t - start, 0)).to(tl.int64) * sx_t
    page = tl.load(TABLE + i_b.to(tl.int64) * table_stride + token // PAGE)
    is_full = (token >= start) & (token + T <= start + count)
    slot = tile % (PAGE // T) * T  # a multiple of T, which the compiler can see
    encode_tile(p_x, m_t, is_full, POOL, page, slot, i_hs, HS, D, BITS, G, GROUPS, PAGE, IS_KEY)


@triton.jit
def append_side(
    X,
    POOL,
    TABLE,
    SINK,
    RING,
    FLAG,
    own,
    before,
    packed,
    sx_b,
    sx_h,
    table_stride,
    i_b,
    i_h,
    i_hs,
    i_row,
    HS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    S: tl.constexpr,
    QUANTUM: tl.constexpr,
    CAP: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Keep one side of the newest token of a row and head, and pack what it pushes out."""
    o_d = tl.arange(0, padded(D, 1))
    m_d = o_d < D
    p_x = X + i_b.to(tl.int64) * sx_b + i_h * sx_h
    b_x = tl.load(p_x + o_d, mask=m_d, other=0.0)
    if packed > before:
        BLOCK: tl.constexpr = G if G > 0 else QUANTUM  # another head group may have larger ones
        page = tl.load(TABLE + i_b.to(tl.int64) * table_stride + before // PAGE)
        at = before // QUANTUM % (PAGE // QUANTUM) * QUANTUM if QUANTUM > 1 else before % PAGE
        for j in tl.static_range(QUANTUM // BLOCK):
            o_t = j * BLOCK + tl.arange(0, BLOCK)
            position = S + before + o_t
            p_t = p_x + tl.zeros([BLOCK], tl.int32)  # the newest token is not in the ring yet
            if CAP > 0:
                p_t = tl.where(position == own, p_t, RING + (i_row * CAP + position % CAP) * D)
            encode_tile(
                p_t,
                o_t < packed - before,
                packed - before == QUANTUM,
                POOL,
                page,
                at + j * BLOCK,
                i_hs,
                HS,
                D,
                BITS,
                G,
                GROUPS,
                PAGE,
                IS_KEY,
            )
    if own < S:
        tl.store(SINK + (i_row * S + own) * D + o_d, b_x, mask=m_d)
    elif CAP > 0:
        tl.store(RING + (i_row * CAP + own % CAP) * D + o_d, b_x, mask=m_d)
    bad = tl.max(tl.where(tl.abs(b_x.to(tl.float32)) <= LIMIT, 0, 1), 0)  # NaN compares false
    if bad > 0:
        tl.store(FLAG, 1)


@triton.jit(do_not_specialize=["k_stride", "v_stride"])
def append_step(
    K,
    V,
    K_POOL,
    V_POOL,
    K_TABLE,
    V_TABLE,
    SINK_K,
    SINK_V,
    RING_K,
    RING_V,
    HEADS,
    CLOCK,
    PADDING,
    FLOOR,
    FLAGS,
    sk_b,
    sk_h,
    sv_b,
    sv_h,
    k_stride,
    v_stride,
    H: tl.constexpr,
    HS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    KB: tl.constexpr,
    VB: tl.constexpr,
    G: tl.constexpr,
    KG: tl.constexpr,
    VG: tl.constexpr,
    PAGE: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    QUANTUM: tl.constexpr,
    CAP: tl.constexpr,
    K_LIMIT: tl.constexpr,
    V_LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Keep the newest token of every row, and pack the QUANTUM tokens it pushes out, if any.

    Grid (B * HS, 2): keys, values. The clock already counts the new token. Whether a flush is due
    follows from the row's length, so one captured launch serves every step.
    """
    i_b = tl.program_id(0) // HS
    i_hs = tl.program_id(0) % HS
    i_h = i_hs
    if HAS_HEADS:
        i_h = tl.load(HEADS + i_hs)
    i_row = (i_b * H + i_h).to(tl.int64)
    if PDL:  # for the new states, and what the step before left
        tl.extra.cuda.gdc_wait()
    length, packed = row_lengths(CLOCK, PADDING, FLOOR, i_b, S, R, QUANTUM, False)
    own = length - 1
    leaving = tl.maximum(own - S - R, 0)
    before = tl.maximum(tl.load(FLOOR + i_b), leaving - leaving % QUANTUM)
    if own >= 0:  # else the row has had nothing but padding
        if tl.program_id(1) == 0:
            append_side(
                K, K_POOL, K_TABLE, SINK_K, RING_K, FLAGS, own, before, packed, sk_b, sk_h,
                k_stride, i_b, i_h, i_hs, i_row, HS, DK, KB, G, KG, PAGE, S, QUANTUM, CAP,
                K_LIMIT, True,
            )  # fmt: skip
        else:
            append_side(
                V, V_POOL, V_TABLE, SINK_V, RING_V, FLAGS + 1, own, before, packed, sv_b, sv_h,
                v_stride, i_b, i_h, i_hs, i_row, HS, DV, VB, 0, VG, PAGE, S, QUANTUM, CAP,
                V_LIMIT, False,
            )  # fmt: skip
