"""What both kernel forms share: rows of a batch, addresses, the exact tokens, and the merge.

Programs count the tokens of a row as the cache does: from its first real token, sinks first, then
packed tokens, then the exact residual. How much of a row is packed follows from its length alone,
which lives on the device, so that a captured graph stays right as the cache grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.layout import (
    field_channel,
    high_half,
    length_of,
    low_half,
    padded,
    row_bytes,
    value_fields,
    value_planes,
)

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)  # the log-sum-exp of no token; finite, so that differences are


@triton.jit
def row_lengths(
    CLOCK,
    PADDING,
    FLOOR,
    i_b,
    S: tl.constexpr,
    R: tl.constexpr,
    QUANTUM: tl.constexpr,
    HELD: tl.constexpr,
):
    """Tokens of a row, and how many of them are packed."""
    length = tl.load(CLOCK) - tl.load(PADDING + i_b)
    packed = tl.load(FLOOR + i_b)
    if not HELD:
        leaving = tl.maximum(length - S - R, 0)
        packed = tl.maximum(packed, leaving - leaving % QUANTUM)
    return length, packed


@triton.jit
def tiles_of_split(
    i_s,
    length,
    packed,
    per_split,
    num_splits,
    BN: tl.constexpr,
    S: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """First tile of a split, distance to its next, and where to stop.

    Tiles are dealt round-robin over the splits that are used, one for every ``per_split`` tiles at
    most: what runs together lies together, and a short row does not occupy the machine.
    """
    num_tiles = tl.cdiv(packed, BN)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW - S, 0) // BN
    used = tl.maximum(tl.minimum(tl.cdiv(num_tiles - first, per_split), num_splits), 1)
    stop = tl.where(i_s < used, num_tiles, 0)
    return first + i_s, used, stop


@triton.jit
def page_offset(TABLE, width, tile, BN: tl.constexpr, PAGE: tl.constexpr):
    """Offset in the pool of the page that holds a tile, in 16 bytes; any page beyond the last."""
    return tl.load(TABLE + tl.minimum(tile * BN // PAGE, width - 1))


@triton.jit
def token_scales(
    p_pairs, i_hs, at, o_n, HS: tl.constexpr, PAIRS: tl.constexpr, PAGE: tl.constexpr
):
    """Scales ``[BN, 1]`` of tokens from ``at`` of a key page on; their plane follows the pairs."""
    p_scales = (p_pairs + HS * PAIRS).to(tl.pointer_type(tl.float16)) + i_hs * PAGE + at
    return tl.load(p_scales + o_n).to(tl.float32)[:, None]


@triton.jit
def channel_scales(
    p_pairs,
    i_hs,
    at,
    HS: tl.constexpr,
    PAGE: tl.constexpr,
    VT: tl.constexpr,
    DV: tl.constexpr,
    VB: tl.constexpr,
    VG: tl.constexpr,
    VW: tl.constexpr,
):
    """Scales of the channels of every field, int32 ``[VW / 2]`` each: two float16 in one.

    VT tokens of a value page share them; their plane follows the pairs of scale and offset.
    """
    FIELDS: tl.constexpr = value_fields(VB, VG)
    LAST: tl.constexpr = row_bytes(VB, DV) // value_planes(VB, VG) // 2 - 1
    p_scales = p_pairs + HS * VG * PAGE + (i_hs * (PAGE // VT) + at // VT) * (DV // 2)
    o_two = tl.minimum(tl.arange(0, VW // 2), LAST)  # rows beyond the last are not stored
    b_c = ()
    for k in tl.static_range(length_of(FIELDS)):
        b_c = b_c + (tl.load(p_scales + field_channel(VB, DV, VG, FIELDS[k]) // 2 + o_two),)
    return b_c


@triton.jit
def rows_of(b_two, VW: tl.constexpr):
    """Float32 ``[VW, 1]`` of what ``channel_scales`` read of one field."""
    return tl.reshape(tl.join(low_half(b_two), high_half(b_two)), [VW, 1])


@triton.jit
def soft_capped(b_s, cap):
    """``cap * tanh(s / cap)``."""
    return cap - 2 * cap / (tl.math.exp2(b_s * (2 * LOG2E / cap)) + 1)


@triton.jit
def dot_states(b_a, b_b, b_c, COMPILED: tl.constexpr):
    """``a @ b + c`` for 16-bit a, b rounded to their dtype; the interpreter has no bfloat16."""
    b_b = b_b.to(b_a.dtype)
    if COMPILED:
        return tl.dot(b_a, b_b, b_c)
    else:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_c)


@triton.jit
def store_partial(
    PO,
    PM,
    b_m,
    b_l,
    b_o,
    p_part,
    o_d,
    m_d,
    o_c,
    m_c,
    DV: tl.constexpr,
):
    """Write the normalised output and the log-sum-exp (base 2) of one split."""
    inverse = tl.where(b_l > 0, 1.0 / tl.where(b_l > 0, b_l, 1.0), 0.0)
    p_o = PO + (p_part + o_c)[None, :] * DV + o_d[:, None]
    tl.store(p_o, b_o * inverse[None, :], mask=m_c[None, :] & m_d[:, None])
    tl.store(
        PM + p_part + o_c,
        tl.where(b_l > 0, b_m + tl.math.log2(tl.where(b_l > 0, b_l, 1.0)), NOTHING),
        mask=m_c,
    )


@triton.jit
def attend_exact(
    Q,
    SINK_K,
    SINK_V,
    TAIL_K,
    TAIL_V,
    PO,
    PM,
    i_row,
    p_part,
    length,
    packed,
    first,
    step,
    tail_columns,
    sq_h,
    sq_t,
    scale,
    cap,
    i_col,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GQ: tl.constexpr,
    NQ: tl.constexpr,
    HP: tl.constexpr,
    S: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Attend to every ``step``-th tile of a row's exact tokens, and write the partial output.

    Q points at this row and head. The tail is a ring of CAP slots by row position, or, where CAP
    is 0, ``tail_columns`` columns that end with the newest token.
    """
    ET: tl.constexpr = 16
    DKP: tl.constexpr = padded(DK, 16)
    DVP: tl.constexpr = padded(DV, 16)
    o_c = i_col * HP + tl.arange(0, HP)
    o_dk = tl.arange(0, DKP)
    o_dv = tl.arange(0, DVP)
    capacity = tail_columns
    shift = tail_columns - length
    if CAP > 0:
        capacity = CAP
    SINK_K += i_row * (S * DK)
    SINK_V += i_row * (S * DV)
    TAIL_K += i_row * capacity * DK
    TAIL_V += i_row * capacity * DV
    m_c = o_c < NQ * GQ
    p_q = Q + (o_c % GQ) * sq_h + (o_c // GQ) * sq_t
    # [DKP, HP]
    b_q = tl.load(
        p_q[None, :] + o_dk[:, None], mask=m_c[None, :] & (o_dk < DK)[:, None], other=0.0
    )
    own = length - NQ + o_c // GQ
    b_m = tl.full([HP], NOTHING, tl.float32)
    b_l = tl.zeros([HP], tl.float32)
    b_o = tl.zeros([DVP, HP], tl.float32)
    num_exact = S + tl.maximum(length - S - packed, 0)
    for n in tl.range(first * ET, num_exact, step * ET, num_stages=2):
        o_e = n + tl.arange(0, ET)
        position = o_e + tl.where(o_e >= S, packed, 0)
        m_e = position < length
        if CAP > 0:
            slot = position % CAP
        else:
            slot = position + shift
        p_k = TAIL_K + slot.to(tl.int64) * DK
        p_v = TAIL_V + slot.to(tl.int64) * DV
        if S > 0:
            p_k = tl.where(o_e < S, SINK_K + o_e * DK, p_k)
            p_v = tl.where(o_e < S, SINK_V + o_e * DV, p_v)
        # [ET, DKP]
        b_k = tl.load(
            p_k[:, None] + o_dk[None, :], mask=m_e[:, None] & (o_dk < DK)[None, :], other=0.0
        )
        # [DVP, ET]
        b_v = tl.load(
            p_v[None, :] + o_dv[:, None], mask=m_e[None, :] & (o_dv < DV)[:, None], other=0.0
        )
        b_s = dot_states(b_k, b_q, tl.zeros([ET, HP], tl.float32), COMPILED) * scale
        if SOFTCAP:
            b_s = soft_capped(b_s, cap)
        m_s = m_e[:, None] & (position[:, None] <= own[None, :])
        if WINDOW > 0:
            m_s = m_s & (position[:, None] > own[None, :] - WINDOW)
        b_s = tl.where(m_s, b_s, NOTHING)
        b_m_new = tl.maximum(b_m, tl.max(b_s, 0))
        b_a = tl.math.exp2(b_m - b_m_new)
        b_p = tl.where(m_s, tl.math.exp2(b_s - b_m_new[None, :]), 0.0)
        b_l = b_l * b_a + tl.sum(b_p, 0)
        b_o = dot_states(b_v, b_p, b_o * b_a[None, :], COMPILED)
        b_m = b_m_new
    store_partial(PO, PM, b_m, b_l, b_o, p_part, o_dv, o_dv < DV, o_c, m_c, DV)


@triton.jit
def by_eight(b_x, ROWS: tl.constexpr, HP: tl.constexpr):
    """Sum ``[ROWS, HP]`` to ``[8, HP]``: what one thread holds; lanes are summed at the end."""
    return tl.sum(tl.reshape(b_x, [ROWS // 8, 8, HP]), 0)


@triton.jit
def lane_order(b_p, BN: tl.constexpr, HP: tl.constexpr):
    """Rows ``[BN, HP]`` in token order to the order of a value page.

    There the four bytes of a register are rows of one thread.
    """
    b_p = tl.permute(tl.reshape(b_p, [BN // 32, 4, 8, HP]), (0, 2, 1, 3))
    return tl.reshape(b_p, [BN, HP])
