"""Attention over codes that name levels of a table, with outliers apart and keys before rotation.

A level is two bytes, and a byte permute looks four of them up at once: its selector is the codes
as they lie in a byte, its table two registers. High and low bytes are looked up apart and come
together as pairs of fp16, which scale and offset, outliers and the rotary embedding then treat as
pairs. Tiles are exact to fp16 before they enter the matrix unit.

Keys stored before the rotary embedding have to be turned by their position: by that within the
tile from a table that stays in registers, while the query is turned back by that of the tile.
Phases are 64-bit fractions of a turn, so that a product with a position wraps without an error.

Rows of a key tile are taken in the token order of a value page, so probabilities are in that order
from the start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.common import (
    NOTHING,
    attend_exact,
    by_eight,
    lane_order,
    page_offset,
    row_lengths,
    soft_capped,
    store_partial,
    tiles_of_split,
)
from kvbits.attention.triton.kernels.fp16_form import P_SHIFT
from kvbits.attention.triton.kernels.layout import high16, low16, num_fields, row_bytes
from kvbits.attention.triton.kernels.lookup import (
    cos_sin,
    field_width,
    is_at,
    levels_of,
    patched,
    scaled,
    table_words,
    turned,
)


@triton.jit
def channel_of(b_pair, HALF: tl.constexpr, FIRST: tl.constexpr):
    """Channel of one of two outliers, counted from FIRST, as the fp16 number its bits spell."""
    b_c = ((b_pair >> (8 * HALF)) & 0xFF) - FIRST
    return b_c.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def token_scales(p_params, place, mask, HAS_OFFSET: tl.constexpr):
    """Scale and offset of tokens; a side without offsets has scales alone."""
    if HAS_OFFSET:
        b_pair = tl.load(p_params.to(tl.pointer_type(tl.int32)) + place, mask=mask, other=0)
        return low16(b_pair), high16(b_pair)
    else:
        b_s = tl.load(p_params.to(tl.pointer_type(tl.float16)) + place, mask=mask, other=0.0)
        return b_s, tl.zeros(b_s.shape, tl.float16)


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
def attend_table(
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
    K_LEVELS,
    V_LEVELS,
    PHASES,
    COUNT,
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
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    K_SLOTS: tl.constexpr,
    V_SLOTS: tl.constexpr,
    IS_TURNED: tl.constexpr,
    COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend NQ queries of every row to some of its tokens; grid (B * HS, splits, column tiles).

    As ``attend_fp16``. K_LEVELS, V_LEVELS: see ``levels_of``. PHASES: int64 ``[DK / 2]``, turns a
    token in units of 2**-64. COUNT: int16, the numbers from 0. K_OFFSET: whether key scales have
    an offset; K_SLOTS: outliers of a key; IS_TURNED: whether keys are stored as before the rotary
    embedding.
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
    KF: tl.constexpr = num_fields(KB)
    VF: tl.constexpr = num_fields(VB)
    KW: tl.constexpr = field_width(KB, DK)
    VW: tl.constexpr = field_width(VB, DV)
    K_PARAMS: tl.constexpr = (2 if K_OFFSET else 1) * (PAGE if G == 0 else PAGE // G * DK)
    V_PARAMS: tl.constexpr = (2 if V_OFFSET else 1) * VG * PAGE
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, KW)
    o_v = tl.arange(0, VW)
    b_ok = tl.load(COUNT + o_k).to(tl.float16, bitcast=True)
    b_ov = tl.load(COUNT + o_v).to(tl.float16, bitcast=True)
    p_q = QR + i_b.to(tl.int64) * sq_b + i_h * GQ * sq_h
    p_q += (o_c % GQ) * sq_h + (o_c // GQ) * sq_t
    b_q = ()
    for j in tl.static_range(KF):
        p_q2 = p_q[None, :] + (j * KW + o_k)[:, None]
        b_q = b_q + (tl.load(p_q2, mask=m_c[None, :], other=0.0).to(tl.float32),)
    b_phase = ()
    b_cos = ()
    b_sin = ()
    if IS_TURNED:
        b_on = tl.load(COUNT + o_n).to(tl.int32)
        for j in tl.static_range(KF // 2):
            p_phase = PHASES + j * KW + o_k
            b_phase = b_phase + (tl.load(p_phase),)
            b_turn = tl.load(p_phase.to(tl.pointer_type(tl.int32)) + 1)
            b_kc, b_ks = cos_sin(b_on[:, None] * b_turn[None, :], COMPILED)
            b_cos = b_cos + (b_kc.to(tl.float16),)
            b_sin = b_sin + (b_ks.to(tl.float16),)

    b_acc = ()
    for j in tl.static_range(VF):
        b_acc = b_acc + (tl.zeros([VW, HP], tl.float32),)
    b_m = tl.full([HP], NOTHING, tl.float32)
    b_l = tl.zeros([8, HP], tl.float32)
    b_z = ()
    for g in tl.static_range(VG):
        b_z = b_z + (tl.zeros([8, HP], tl.float32),)
    b_kt = table_words(K_LEVELS, KB, 2, COMPILED)
    b_vt = table_words(V_LEVELS, VB, 2, COMPILED)
    top = 1e-20  # largest scale or outlier of values so far: products with it stay within fp16

    begin, step, num_tiles = tiles_of_split(
        i_s, length - NQ + 1, packed, per_split, num_splits, BN, S, WINDOW
    )  # from the window of the first query on
    K_TABLE += i_b.to(tl.int64) * k_stride
    V_TABLE += i_b.to(tl.int64) * v_stride
    for t in range(begin, num_tiles, step):
        n = t * BN
        m_n = o_n < packed - n
        k_page = page_offset(K_TABLE, k_stride, t, BN, PAGE)
        v_page = page_offset(V_TABLE, v_stride, t, BN, PAGE)
        at = t % (PAGE // BN) * BN
        p_k = K_POOL + k_page * 16 + (i_hs * PAGE + at) * KR
        p_v = V_POOL + v_page * 16 + i_hs * (PAGE * VR) + at
        p_ks = K_POOL + k_page * 16 + HS * PAGE * KR
        p_vs = V_POOL + v_page * 16 + HS * PAGE * VR
        p_kw = p_k + o_n[:, None] * KR + tl.arange(0, KW)[None, :]
        if KB == 3:
            b_kw = (tl.load(p_kw), tl.load(p_kw + KW), tl.load(p_kw + 2 * KW))
        else:
            b_kw = (tl.load(p_kw),)
        b_k = levels_of(b_kw, b_kt, K_LEVELS, KB, COMPILED)
        if G == 0:
            b_scale, b_offset = token_scales(p_ks + i_hs * (2 * K_PARAMS), at + o_n, m_n, K_OFFSET)
        b_scaled = ()
        for j in tl.static_range(KF):
            if G == 0:
                b_x = scaled(b_k[j], b_scale[:, None], b_offset[:, None], COMPILED)
            else:
                p_group = p_ks.to(tl.pointer_type(tl.int32)) + i_hs * (K_PARAMS // 2)
                b_pair = tl.load(p_group + at // G * DK + j * KW + o_k)
                b_x = scaled(b_k[j], low16(b_pair)[None, :], high16(b_pair)[None, :], COMPILED)
            b_scaled = b_scaled + (b_x,)
        p_channel = p_ks + HS * (2 * K_PARAMS)
        p_value = p_channel + HS * PAGE * K_SLOTS
        for i in tl.static_range(K_SLOTS // 2):
            place = (i_hs * PAGE + at + o_n) * (K_SLOTS // 2) + i
            b_pair = tl.load(p_channel.to(tl.pointer_type(tl.int16)) + place)
            b_value = tl.load(p_value.to(tl.pointer_type(tl.int32)) + place, mask=m_n, other=0)
            for half in tl.static_range(2):
                b_d = high16(b_value) if half else low16(b_value)
                b_new = ()
                for j in tl.static_range(KF):
                    b_c = channel_of(b_pair, half, j * KW)
                    b_x = patched(b_scaled[j], b_ok[None, :], b_c[:, None], b_d[:, None], COMPILED)
                    b_new = b_new + (b_x,)
                b_scaled = b_new
        b_s = tl.zeros([BN, HP], tl.float32)
        if IS_TURNED:
            for j in tl.static_range(KF // 2):
                b_turns = (((S + n).to(tl.int64) * b_phase[j]) >> 32).to(tl.int32)
                b_tc, b_ts = cos_sin(b_turns, COMPILED)
                b_q0 = b_q[j] * b_tc[:, None] + b_q[j + KF // 2] * b_ts[:, None]
                b_q1 = b_q[j + KF // 2] * b_tc[:, None] - b_q[j] * b_ts[:, None]
                b_low, b_high = b_scaled[j], b_scaled[j + KF // 2]
                b_k0 = turned(b_low, b_high, b_cos[j], b_sin[j], False, COMPILED)
                b_k1 = turned(b_high, b_low, b_cos[j], b_sin[j], True, COMPILED)
                b_s = tl.dot(b_k0, b_q0.to(tl.float16), b_s)
                b_s = tl.dot(b_k1, b_q1.to(tl.float16), b_s)
        else:
            for j in tl.static_range(KF):
                b_s = tl.dot(b_scaled[j], b_q[j].to(tl.float16), b_s)
        b_s *= scale
        if SOFTCAP:
            b_s = soft_capped(b_s, cap)
        m_s = m_n[:, None]
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

        p_channel = p_vs + HS * (2 * V_PARAMS)
        p_value = p_channel + HS * PAGE * V_SLOTS
        b_largest = tl.zeros([BN], tl.float32)
        b_scales = ()
        b_z_new = ()
        for g in tl.static_range(VG):
            b_vs, b_vz = token_scales(p_vs, (i_hs * VG + g) * PAGE + at + o_n, m_n, V_OFFSET)
            b_vs = b_vs.to(tl.float32)
            b_scales = b_scales + (b_vs,)
            b_largest = tl.maximum(b_largest, b_vs)
            b_pz = by_eight(b_p * b_vz.to(tl.float32)[:, None], BN, HP)
            b_z_new = b_z_new + (b_z[g] * b_a + b_pz,)
        b_z = b_z_new
        b_values = ()
        for i in tl.static_range(V_SLOTS // 2):
            place = (i_hs * PAGE + at + o_n) * (V_SLOTS // 2) + i
            b_value = tl.load(p_value.to(tl.pointer_type(tl.int32)) + place, mask=m_n, other=0)
            for half in tl.static_range(2):
                b_d = (high16(b_value) if half else low16(b_value)).to(tl.float32)
                b_values = b_values + (b_d,)
                b_largest = tl.maximum(b_largest, tl.abs(b_d))
        b_top = tl.maximum(top, tl.max(b_largest, 0))
        b_shrink = b_a * (top / b_top)
        top = b_top
        b_pv = ()
        for g in tl.static_range(VG):
            b_x = (b_p * (b_scales[g] * (1 / top))[:, None]).to(tl.float16)
            b_pv = b_pv + (lane_order(b_x, BN, HP),)
        b_pd = ()
        for i in tl.static_range(V_SLOTS):
            b_pd = b_pd + ((b_p * (b_values[i] * (1 / top))[:, None]).to(tl.float16),)
        p_vw = p_v + o_v[:, None] * PAGE + o_n[None, :]
        if VB == 3:
            b_vw = (tl.load(p_vw), tl.load(p_vw + VW * PAGE), tl.load(p_vw + 2 * VW * PAGE))
        else:
            b_vw = (tl.load(p_vw),)
        b_v = levels_of(b_vw, b_vt, V_LEVELS, VB, COMPILED)
        b_acc_new = ()
        for j in tl.static_range(VF):
            b_o = tl.dot(b_v[j], b_pv[j * VG // VF], b_acc[j] * b_shrink)
            for i in tl.static_range(V_SLOTS):
                place = (i_hs * PAGE + at + o_n) * (V_SLOTS // 2) + i // 2
                b_pair = tl.load(p_channel.to(tl.pointer_type(tl.int16)) + place)
                b_c = channel_of(b_pair, i % 2, j * VW)
                b_o = tl.dot(is_at(b_ov[:, None], b_c[None, :], COMPILED), b_pd[i], b_o)
            b_acc_new = b_acc_new + (b_o,)
        b_acc = b_acc_new

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b_sum = tl.sum(b_l, 0)
    b_m -= P_SHIFT
    for j in tl.static_range(VF):
        b_o = b_acc[j] * top + tl.sum(b_z[j * VG // VF], 0)[None, :]
        o_d = j * VW + o_v
        store_partial(PO, PM, b_m, b_sum, b_o, p_part, o_d, o_v < VW, o_c, m_c, DV)
