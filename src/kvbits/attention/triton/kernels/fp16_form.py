"""Attention on fp16 tensor cores: any number of query columns, packed and 16-bit sides.

Stored bytes are read as pairs in 16-bit lanes. A segment of a lane's low byte, masked, *is* the
fp16 number ``segment * 2**-24`` (a subnormal, which tensor cores take at full rate); the high byte
needs one shift for a whole pair of lanes. So a masked lane is an operand: 2**24 goes into the
scale, the segment's weight into the query. ``S^T = K Q^T`` and ``O^T = V^T P^T``: tokens are the
rows of the matrix unit and query heads, times queries, its columns, so that one warp works on a
tile alone and probabilities never leave it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.common import (
    NOTHING,
    attend_exact,
    by_eight,
    channel_scales,
    dot_states,
    page_offset,
    row_lengths,
    rows_of,
    soft_capped,
    store_partial,
    tiles_of_split,
    token_scales,
)
from kvbits.attention.triton.kernels.layout import (
    field_channel,
    field_group,
    field_mask,
    field_weight,
    high_half,
    is_third_plane,
    length_of,
    low_half,
    num_segments,
    padded,
    row_bytes,
    segment_channel,
    segment_mask,
    segment_weight,
    value_fields,
    value_planes,
)

UNIT = tl.constexpr(16777216.0)  # 2**24: one in the last place of an fp16 subnormal
# Probabilities are at most this: small ones stay above fp16's smallest number.
P_SHIFT = tl.constexpr(8.0)


@triton.constexpr_function
def lane_code(mask: Any) -> Any:
    """PTX that masks two 16-bit lanes; where the mask has bit 7, that bit is flipped back."""
    lanes = mask * 0x00010001
    if mask & 0x80:
        return f"lop3.b32 $0, $1, 0x00800080, {lanes:#010x}, 0x28;"  # (a ^ b) & c
    return f"and.b32 $0, $1, {lanes:#010x};"


@triton.jit
def masked_lanes(b_w, MASK: tl.constexpr, COMPILED: tl.constexpr):
    """Bits of ``MASK`` in every int16 lane, as the fp16 number they spell."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            lane_code(MASK), "=r,r", [b_w], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return ((b_w ^ 0x80) & MASK).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def high_bytes(b_w, COMPILED: tl.constexpr):
    """The high byte of every lane, in the low bits; bits above are to be masked."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "shr.b32 $0, $1, 8;", "=r,r", [b_w], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        return (b_w >> 8).to(tl.int16)


@triton.jit
def lane_halves(b_p, BN: tl.constexpr, HP: tl.constexpr):
    """Probabilities ``[BN, HP]`` in token order to those of low and high bytes of a page's lanes.

    Position (t % 8) * 4 + t // 8 of 32: a lane holds tokens t, t + 8 (or t + 16, t + 24).
    """
    b_p = tl.reshape(b_p, [BN // 32, 2, 2, 8, HP])  # [., lane parity, byte, t % 8, .]
    b_p = tl.permute(b_p, (0, 3, 1, 4, 2))
    b_low, b_high = tl.split(b_p)
    return tl.reshape(b_low, [BN // 2, HP]), tl.reshape(b_high, [BN // 2, HP])


@triton.jit(
    do_not_specialize=[
        "num_splits",
        "num_exact_splits",
        "k_stride",
        "v_stride",
        "per_split",
        "tail_columns",
    ]
)
def attend_fp16(
    Q,
    QR,
    K_POOL,
    V_POOL,
    K_TABLE,
    V_TABLE,
    SINK_K,
    SINK_V,
    TAIL_K,
    TAIL_V,
    HEADS,
    CLOCK,
    PADDING,
    FLOOR,
    PO,
    PM,
    scale,
    cap,
    num_splits,
    num_exact_splits,
    per_split,
    k_stride,
    v_stride,
    sq_b,
    sq_h,
    sq_t,
    tail_columns,
    H: tl.constexpr,
    HS: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    KB: tl.constexpr,
    VB: tl.constexpr,
    G: tl.constexpr,
    VG: tl.constexpr,
    KT: tl.constexpr,
    VT: tl.constexpr,
    PAGE: tl.constexpr,
    GQ: tl.constexpr,
    NQ: tl.constexpr,
    HP: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    QUANTUM: tl.constexpr,
    HELD: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend NQ queries of every row to some of its tokens; grid (splits, B * HS, column tiles).

    The first splits take packed tiles, the last the exact tokens: a ring of CAP slots, or,
    where CAP is 0, ``tail_columns`` columns that end with the newest token. Column c is query
    c // GQ of head c % GQ. A side of 16 bits holds states of the query's own dtype.
    QR: the query as packed keys are rotated, of the strides of Q. KT: whether every packed key has
    a scale beside those of its codes. VT: packed values that share a scale of every channel, 0
    where there is none.
    """
    i_bh = tl.program_id(0)
    i_s = tl.program_id(1)
    i_b = i_bh // HS
    i_hs = i_bh % HS  # head in the store; i_h is the same head in the layer
    i_c = tl.program_id(2)
    i_h = i_hs
    if HAS_HEADS:
        i_h = tl.load(HEADS + i_hs)
    i_row = (i_b * H + i_h).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    length, packed = row_lengths(CLOCK, PADDING, FLOOR, i_b, S, R, QUANTUM, HELD)
    p_query = Q + i_b.to(tl.int64) * sq_b + i_h * GQ * sq_h
    o_c = i_c * HP + tl.arange(0, HP)
    m_c = o_c < NQ * GQ
    p_part = (i_row * (num_splits + num_exact_splits) + i_s) * (NQ * GQ)
    if i_s >= num_splits:
        attend_exact(
            p_query,
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
            i_s - num_splits,
            num_exact_splits,
            tail_columns,
            sq_h,
            sq_t,
            scale,
            cap,
            i_c,
            DK,
            DV,
            GQ,
            NQ,
            HP,
            S,
            CAP,
            WINDOW,
            SOFTCAP,
            COMPILED,
        )
        return

    KR: tl.constexpr = row_bytes(KB, DK)
    VR: tl.constexpr = row_bytes(VB, DV)
    NSEG: tl.constexpr = num_segments(KB)
    KW: tl.constexpr = padded(KR // 2, 16)  # lanes of a key row
    PLANES: tl.constexpr = value_planes(VB, VG)
    VROWS: tl.constexpr = DV if VB == 16 else VR // PLANES
    VW: tl.constexpr = padded(VROWS, 16)
    FIELDS: tl.constexpr = value_fields(VB, VG)
    NF: tl.constexpr = length_of(FIELDS)
    KEY_PAIRS: tl.constexpr = PAGE if G == 0 else PAGE // G * DK
    DTYPE: tl.constexpr = Q.dtype.element_ty
    o_n = tl.arange(0, BN)
    o_l = tl.arange(0, BN // 2)
    o_k = tl.arange(0, KW)
    o_vr = tl.arange(0, VW)
    p_q = QR + i_b.to(tl.int64) * sq_b + i_h * GQ * sq_h
    p_q += (o_c % GQ) * sq_h + (o_c // GQ) * sq_t

    b_q = ()
    b_qsum = tl.zeros([HP], tl.float32)
    if KB == 16:
        p_q2 = p_q[None, :] + o_k[:, None]
        b_q = b_q + (tl.load(p_q2, mask=m_c[None, :] & (o_k < DK)[:, None], other=0.0),)
    else:
        for half in tl.static_range(2):
            o_b = o_k * 2 + half
            m_b = o_b < KR
            o_ok = tl.where(m_b, o_b, 0)
            for k in tl.static_range(NSEG):
                p_q2 = p_q[None, :] + segment_channel(o_ok, k, KB, DK)[:, None]
                b_x = tl.load(p_q2, mask=m_c[None, :] & m_b[:, None], other=0.0).to(tl.float32)
                b_x *= segment_weight(o_ok, k, KB, DK)[:, None]
                b_q = b_q + (b_x.to(tl.float16),)
        o_d = tl.arange(0, padded(DK, 16))
        m_q = m_c[None, :] & (o_d < DK)[:, None]
        b_qf = tl.load(p_q[None, :] + o_d[:, None], mask=m_q, other=0.0).to(tl.float32)
        b_qsum = tl.sum(b_qf, 0) * scale

    b_acc = ()
    for k in tl.static_range(NF):
        b_acc = b_acc + (tl.zeros([VW, HP], tl.float32),)
    b_m = tl.full([HP], NOTHING, tl.float32)
    b_l = tl.zeros([8, HP], tl.float32)
    b_z = ()
    for g in tl.static_range(VG):
        b_z = b_z + (tl.zeros([8, HP], tl.float32),)
    top = 1e-20  # largest value scale so far: probabilities times scales stay within fp16

    begin, step, num_tiles = tiles_of_split(
        i_s, length - NQ + 1, packed, per_split, num_splits, BN, S, WINDOW
    )  # from the window of the first query on
    K_TABLE += i_b.to(tl.int64) * k_stride
    V_TABLE += i_b.to(tl.int64) * v_stride
    for t in range(begin, num_tiles, step):
        n = t * BN
        k_page = page_offset(K_TABLE, k_stride, t, BN, PAGE)
        v_page = page_offset(V_TABLE, v_stride, t, BN, PAGE)
        at = t % (PAGE // BN) * BN
        p_k = K_POOL + k_page * 16 + (i_hs * PAGE + at) * KR
        p_v = V_POOL + v_page * 16 + i_hs * (PAGE * VR)
        p_ks = (K_POOL + k_page * 16 + HS * PAGE * KR).to(tl.pointer_type(tl.int32))
        p_vs = (V_POOL + v_page * 16 + HS * PAGE * VR).to(tl.pointer_type(tl.int32))
        if VT > 0:  # long before they are needed: no pipeline fetches what feeds no product
            b_vc = channel_scales(p_vs, i_hs, at, HS, PAGE, VT, DV, VB, VG, VW)
        if KB == 16:
            p_kw = p_k.to(tl.pointer_type(DTYPE)) + o_n[:, None] * DK + o_k[None, :]
            if KW == DK:
                b_kw = tl.load(p_kw)
            else:
                b_kw = tl.load(p_kw, mask=(o_k < DK)[None, :], other=0.0)
            b_s = dot_states(b_kw, b_q[0], tl.zeros([BN, HP], tl.float32), COMPILED) * scale
        else:
            p_kw = p_k.to(tl.pointer_type(tl.int16)) + o_n[:, None] * (KR // 2) + o_k[None, :]
            if KW * 2 == KR:
                b_kw = tl.load(p_kw)
            else:
                b_kw = tl.load(p_kw, mask=(o_k < KR // 2)[None, :], other=0)
            b_kh = high_bytes(b_kw, COMPILED)
            p_group = p_ks + i_hs * KEY_PAIRS + at // G * DK if G > 0 else p_ks
            b_s = tl.zeros([BN, HP], tl.float32)
            for k in tl.static_range(2 * NSEG):
                b_op = masked_lanes(
                    b_kw if k < NSEG else b_kh, segment_mask(KB, k % NSEG), COMPILED
                )
                if G == 0:
                    b_s = tl.dot(b_op, b_q[k], b_s)
                else:
                    o_b = o_k * 2 + k // NSEG
                    o_ok = tl.where(o_b < KR, o_b, 0)
                    b_ks = low_half(tl.load(p_group + segment_channel(o_ok, k % NSEG, KB, DK)))
                    b_qs = (b_q[k].to(tl.float32) * b_ks[:, None]).to(tl.float16)
                    b_s = tl.dot(b_op, b_qs, b_s)
            if G == 0:
                b_ks = tl.load(p_ks + i_hs * KEY_PAIRS + at + o_n)
                b_s = b_s * (low_half(b_ks) * (UNIT * scale))[:, None]
                b_s += high_half(b_ks)[:, None] * b_qsum[None, :]
            else:
                b_zp = high_half(tl.load(p_group + o_d, mask=o_d < DK, other=0))
                b_s = b_s * (UNIT * scale) + (tl.sum(b_qf * b_zp[:, None], 0) * scale)[None, :]
        if KT:
            b_s *= token_scales(p_ks, i_hs, at, o_n, HS, KEY_PAIRS, PAGE)
        if SOFTCAP:
            b_s = soft_capped(b_s, cap)
        m_s = (o_n < packed - n)[:, None]
        if WINDOW > 0:
            own = length - NQ + o_c // GQ - S - n
            m_s = m_s & (o_n[:, None] > own[None, :] - WINDOW)
        b_s = tl.where(m_s, b_s, NOTHING)

        b_new = tl.maximum(b_m, tl.max(b_s, 0))
        b_a = tl.math.exp2(b_m - b_new)[None, :]
        b_m = b_new
        b_p = tl.math.exp2(b_s - (b_new - P_SHIFT)[None, :])
        if WINDOW > 0:
            b_p = tl.where(m_s, b_p, 0.0)
        b_l = b_l * b_a + by_eight(b_p, BN, HP)
        if VB == 16:
            p_vw = p_v.to(tl.pointer_type(DTYPE)) + (at + o_n)[None, :] * DV + o_vr[:, None]
            b_vw = tl.load(
                p_vw, mask=(o_n < packed - n)[None, :] & (o_vr < DV)[:, None], other=0.0
            )
            b_acc = (dot_states(b_vw, b_p, b_acc[0] * b_a, COMPILED),)
        else:
            p_vw = p_v.to(tl.pointer_type(tl.int16)) + at // 2
            b_vs = ()
            b_top = top
            for g in tl.static_range(VG):
                p_pair = p_vs + (i_hs * VG + g) * PAGE + at + o_n
                b_pair = tl.load(p_pair, mask=o_n < packed - n, other=0)
                b_vs = b_vs + (b_pair,)
                b_top = tl.maximum(b_top, tl.max(low_half(b_pair), 0))
            b_shrink = b_a * (top / b_top)
            top = b_top
            b_z_new = ()
            b_low = ()
            b_high = ()
            for g in tl.static_range(VG):
                b_pz = by_eight(b_p * high_half(b_vs[g])[:, None], BN, HP)
                b_z_new = b_z_new + (b_pz if VT > 0 else b_z[g] * b_a + b_pz,)
                b_pv = (b_p * (low_half(b_vs[g]) * (1 / top))[:, None]).to(tl.float16)
                b_pl, b_ph = lane_halves(b_pv, BN, HP)
                b_low = b_low + (b_pl,)
                b_high = b_high + (b_ph,)
            b_z = b_z_new
            b_acc_new = ()
            for k in tl.static_range(NF):
                if k == 0 or FIELDS[k][0] != FIELDS[k - 1][0]:
                    o_row = FIELDS[k][0] * VROWS + o_vr
                    p_lane = p_vw + o_row[:, None] * (PAGE // 2) + o_l[None, :]
                    if VW == VROWS:
                        b_vw = tl.load(p_lane)
                    else:
                        b_vw = tl.load(p_lane, mask=(o_vr < VROWS)[:, None], other=0)
                    b_vh = high_bytes(b_vw, COMPILED)
                b_o = tl.zeros([VW, HP], tl.float32) if VT > 0 else b_acc[k] * b_shrink
                b_op = masked_lanes(b_vw, field_mask(VB, FIELDS[k]), COMPILED)
                b_o = tl.dot(b_op, b_low[field_group(VB, VG, FIELDS[k])], b_o)
                b_op = masked_lanes(b_vh, field_mask(VB, FIELDS[k]), COMPILED)
                b_o = tl.dot(b_op, b_high[field_group(VB, VG, FIELDS[k])], b_o)
                if VT > 0:  # a tile's sums are states before they are scaled
                    b_o *= field_weight(VB, FIELDS[k]) * UNIT * top
                    if not is_third_plane(VB, FIELDS[k]):
                        b_o += tl.sum(b_z[field_group(VB, VG, FIELDS[k])], 0)[None, :]
                    b_o = b_acc[k] * b_a + b_o * rows_of(b_vc[k], VW)
                b_acc_new = b_acc_new + (b_o,)
            b_acc = b_acc_new

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b_sum = tl.sum(b_l, 0)
    b_m -= P_SHIFT
    b_bits = ()  # the bits of 3-bit channels 6 and 7 that lie in the third plane
    for j in tl.static_range(NF - 1, -1, -1):
        b_o = b_acc[j]
        if VB < 16 and VT == 0:
            b_o *= field_weight(VB, FIELDS[j]) * UNIT * top
        if is_third_plane(VB, FIELDS[j]):
            b_bits = b_bits + (b_o,)
        else:
            if VB == 3 and j == 2:  # channel 6
                b_o += b_bits[1]
            if VB == 3 and j == 5:  # channel 7
                b_o += b_bits[0]
            o_d = o_vr
            if VB < 16:
                if VT == 0:
                    b_o += tl.sum(b_z[field_group(VB, VG, FIELDS[j])], 0)[None, :]
                o_d = o_vr + field_channel(VB, DV, VG, FIELDS[j])
            store_partial(PO, PM, b_m, b_sum, b_o, p_part, o_d, o_vr < VROWS, o_c, m_c, DV)
