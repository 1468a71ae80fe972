"""Encoding: statistics, codes and bytes in one pass, for a prompt and for the step of a decode.

Affine codes are made here, field by field of a byte; what is more than that, in
``encode_wrapped.py``. Launch with ``enable_fp_fusion=False``, see ``codes.py``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.codes import (
    codes_of,
    paired,
    planes_of_3_bits,
    scale_and_offset,
    store_plane,
    store_words,
)
from kvbits.attention.triton.kernels.common import row_lengths
from kvbits.attention.triton.kernels.encode_wrapped import encode_wrapped
from kvbits.attention.triton.kernels.layout import num_fields, padded, row_bytes

WRAPPED_TILE = tl.constexpr(32)  # tokens encoded at a time, of a step that packs many


@triton.constexpr_function
def tokens_at_a_time(how: Any, key_group: Any, quantum: Any) -> Any:
    """Tokens of a block that a step encodes at a time."""
    if key_group:
        return key_group
    return quantum if how.is_plain else min(quantum, WRAPPED_TILE.value)


@triton.constexpr_function
def blocks_of_field(bits: Any, groups: Any) -> Any:
    """Scale groups that one field spans."""
    return max(1, groups // num_fields(bits))


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
        if BITS == 3:
            b_0, b_2, b_1 = planes_of_3_bits(b_c, 0x01010101)
            store_words(tl.sum(b_0, 1), p_head + slot * NB, NB)
            store_words(tl.sum(b_2, 1), p_head + slot * NB + W, NB)
            store_words(tl.sum(b_1, 1), p_head + slot * NB + 2 * W, NB)
        else:
            o_f = tl.arange(0, F)[None, :, None]
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
    position,
    CONSTANTS,
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
    HOW: tl.constexpr,
):
    """Encode the tokens at ``p_x [T]`` into one page, from ``slot`` on.

    G > 0: per channel, the tokens being one block. 16 bits: copied as they are.
    """
    NB: tl.constexpr = row_bytes(BITS, D)
    p_head = POOL + page * 16 + i_hs * (PAGE * NB)
    p_pairs = (POOL + page * 16 + HS * PAGE * NB).to(tl.pointer_type(tl.int32))
    if not HOW.is_plain:
        encode_wrapped(
            p_x, m_t, is_full, position, CONSTANTS, POOL + page * 16, slot, i_hs, HS, D, BITS, G,
            GROUPS, PAGE, IS_KEY, HOW,
        )  # fmt: skip
    elif BITS == 16:
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
    CONSTANTS,
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
    HOW: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Encode COUNT tokens of every row, from its COLUMN on, behind the START it holds.

    Grid (tiles, B * HS). Tile i takes T tokens, or one per-channel block, that lie in one page.
    FIRST: row position of the store's first token.
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
    encode_tile(
        p_x, m_t, is_full, FIRST + o_t, CONSTANTS, POOL, page, slot, i_hs, HS, D, BITS, G, GROUPS,
        PAGE, IS_KEY, HOW,
    )  # fmt: skip


@triton.jit
def pack_leaving(
    p_new,
    RING,
    CONSTANTS,
    POOL,
    page,
    at,
    first,
    own,
    before,
    packed,
    i_hs,
    i_row,
    BLOCK: tl.constexpr,
    HS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    S: tl.constexpr,
    QUANTUM: tl.constexpr,
    CAP: tl.constexpr,
    IS_KEY: tl.constexpr,
    HOW: tl.constexpr,
):
    """Encode BLOCK of the tokens that leave the residual, from the ``first`` one on."""
    o_t = first + tl.arange(0, BLOCK)
    position = S + before + o_t
    p_t = p_new + tl.zeros([BLOCK], tl.int32)  # the newest token is not in the ring yet
    if CAP > 0:
        p_t = tl.where(position == own, p_t, RING + (i_row * CAP + position % CAP) * D)
    encode_tile(
        p_t,
        o_t < packed - before,
        packed - before == QUANTUM,
        position,
        CONSTANTS,
        POOL,
        page,
        at + first,
        i_hs,
        HS,
        D,
        BITS,
        G,
        GROUPS,
        PAGE,
        IS_KEY,
        HOW,
    )


@triton.jit
def append_side(
    X,
    CONSTANTS,
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
    HOW: tl.constexpr,
):
    """Keep one side of the newest token of a row and head, and pack what it pushes out."""
    o_d = tl.arange(0, padded(D, 1))
    m_d = o_d < D
    p_x = X + i_b.to(tl.int64) * sx_b + i_h * sx_h
    b_x = tl.load(p_x + o_d, mask=m_d, other=0.0)
    if packed > before:
        BLOCK: tl.constexpr = tokens_at_a_time(HOW, G, QUANTUM)
        page = tl.load(TABLE + i_b.to(tl.int64) * table_stride + before // PAGE)
        at = before // QUANTUM % (PAGE // QUANTUM) * QUANTUM if QUANTUM > 1 else before % PAGE
        if HOW.is_plain:
            for j in tl.static_range(QUANTUM // BLOCK):
                pack_leaving(
                    p_x, RING, CONSTANTS, POOL, page, at, j * BLOCK, own, before, packed, i_hs,
                    i_row, BLOCK, HS, D, BITS, G, GROUPS, PAGE, S, QUANTUM, CAP, IS_KEY, HOW,
                )  # fmt: skip
        else:  # a loop: the code of a block is long
            for j in range(QUANTUM // BLOCK):
                pack_leaving(
                    p_x, RING, CONSTANTS, POOL, page, at, j * BLOCK, own, before, packed, i_hs,
                    i_row, BLOCK, HS, D, BITS, G, GROUPS, PAGE, S, QUANTUM, CAP, IS_KEY, HOW,
                )  # fmt: skip
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
    K_CONSTANTS,
    V_CONSTANTS,
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
    K_HOW: tl.constexpr,
    V_HOW: tl.constexpr,
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
                K, K_CONSTANTS, K_POOL, K_TABLE, SINK_K, RING_K, FLAGS, own, before, packed, sk_b,
                sk_h, k_stride, i_b, i_h, i_hs, i_row, HS, DK, KB, G, KG, PAGE, S, QUANTUM, CAP,
                K_LIMIT, True, K_HOW,
            )  # fmt: skip
        else:
            append_side(
                V, V_CONSTANTS, V_POOL, V_TABLE, SINK_V, RING_V, FLAGS + 1, own, before, packed,
                sv_b, sv_h, v_stride, i_b, i_h, i_hs, i_row, HS, DV, VB, 0, VG, PAGE, S, QUANTUM,
                CAP, V_LIMIT, False, V_HOW,
            )  # fmt: skip
