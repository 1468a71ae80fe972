"""Decode attention over codes that name levels of a grid, on int8 tensor cores.

A table whose levels are ``low + step * n`` for whole n below 128 is looked up as bytes, and bytes
go into the matrix unit as they are: what ``low`` and ``step`` do to a sum is known without it. The
query and the probabilities enter as 15-bit fixed point in two columns, as in ``int8_form.py``.

Keys stored before the rotary embedding have to be turned first: they become fp16, and are turned
by their place within the tile, the query by that of the tile (see ``table_form.py``). Outliers are
added to what the matrix unit has summed (see ``outlier_attention.py``).
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
from kvbits.attention.triton.kernels.int8_form import joined
from kvbits.attention.triton.kernels.int8_query import FIXED, TINY, fixed_point
from kvbits.attention.triton.kernels.layout import high16, low16, num_fields, padded, row_bytes
from kvbits.attention.triton.kernels.lookup import (
    byte_levels_of,
    cos_sin,
    field_width,
    scaled,
    scaled_up_to,
    table_words,
    turned,
)
from kvbits.attention.triton.kernels.outlier_attention import (
    outlier_pairs,
    outlier_scores,
    outlier_sums,
    twice,
)
from kvbits.attention.triton.kernels.outliers import FP16_MAX
from kvbits.attention.triton.kernels.table_form import token_scales

UNIT = tl.constexpr(4096.0)  # its square, 2**24, is what the bits of a level lack as fp16


@triton.jit
def key_bytes(p_w, KB: tl.constexpr, KW: tl.constexpr):
    """Bytes of keys: one tile, or the three planes of 3 bits."""
    if KB == 3:
        return (tl.load(p_w), tl.load(p_w + KW), tl.load(p_w + 2 * KW))
    else:
        return (tl.load(p_w),)


@triton.jit
def turned_back(b_x, b_y, b_cos, b_sin):
    """Pairs of channels, turned back by an angle."""
    return b_x * b_cos + b_y * b_sin, b_y * b_cos - b_x * b_sin


@triton.jit
def grid_of(LEVELS):
    """``low`` and ``step`` of a table, which lie behind its levels."""
    p_grid = (LEVELS + 16).to(tl.pointer_type(tl.float32))
    return tl.load(p_grid), tl.load(p_grid + 1)


@triton.jit
def fixed_queries(b_w, FIELDS: tl.constexpr, KW: tl.constexpr, GP: tl.constexpr):
    """Operands ``[KW, 2 * GP]`` of all fields in fixed point, and what they are multiples of."""
    b_top = tl.full([GP], TINY, tl.float32)
    for j in tl.static_range(FIELDS):
        b_top = tl.maximum(b_top, tl.max(tl.abs(b_w[j]), 0))
    b_inverse = FIXED / b_top
    b_ops = ()
    for j in tl.static_range(FIELDS):
        b_ops = b_ops + (fixed_point(b_w[j], b_inverse[None, :], KW, GP),)
    return b_ops, b_top * (1 / FIXED)


@triton.jit(
    do_not_specialize=["num_splits", "num_exact_splits", "k_stride", "v_stride", "per_split"]
)
def attend_levels(
    Q,
    QR,
    QT,
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
    GP: tl.constexpr,
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
    """Attend one query of every row to a share of its tokens; grid (B * HS, splits).

    As ``attend_int8`` and ``attend_table``. K_LEVELS, V_LEVELS: levels of a grid in 16 bytes, then
    its float32 ``low`` and ``step``. QT: see ``spread_queries``.
    """
    i_bh = tl.program_id(0)
    i_s = tl.program_id(1)
    i_b = i_bh // HS
    i_hs = i_bh % HS  # head in the store; i_h is the same head in the layer
    i_h = i_hs
    if HAS_HEADS:
        i_h = tl.load(HEADS + i_hs)
    i_row = (i_b * H + i_h).to(tl.int64)
    length, packed = row_lengths(CLOCK, PADDING, FLOOR, i_b, S, R, QUANTUM, HELD)
    p_query = Q + i_b.to(tl.int64) * sq_b + i_h * GQ * sq_h
    p_part = (i_row * (num_splits + num_exact_splits) + i_s) * GQ
    if i_s >= num_splits:
        if PDL:
            tl.extra.cuda.gdc_wait()
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
            CAP,
            sq_h,
            0,
            scale,
            cap,
            0,
            DK,
            DV,
            GQ,
            1,
            padded(GQ, 8),
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
    BT: tl.constexpr = min(BN, 32)  # tokens that the table of the rotary embedding is for
    o_t = tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, KW)
    o_v = tl.arange(0, VW)
    o_g = tl.arange(0, GP)
    m_g = o_g < GQ
    p_q = QR + i_b.to(tl.int64) * sq_b + i_h * GQ * sq_h
    k_low, k_step = grid_of(K_LEVELS)
    v_low, v_step = grid_of(V_LEVELS)
    b_kt = table_words(K_LEVELS, KB, 1, COMPILED)
    b_vt = table_words(V_LEVELS, VB, 1, COMPILED)
    b_q = ()
    b_phase = ()
    b_cos = ()
    b_sin = ()
    if IS_TURNED:
        b_none = tl.zeros([1], tl.float16)
        b_low = b_none + k_low.to(tl.float16)
        b_step = b_none + (k_step * UNIT).to(tl.float16)
        b_down = b_none + (1 / UNIT)
        b_on = tl.load(COUNT + o_t).to(tl.int32)
        for j in tl.static_range(KF // 2):
            p_phase = PHASES + j * KW + o_k
            b_phase = b_phase + (tl.load(p_phase),)
            b_turn = tl.load(p_phase.to(tl.pointer_type(tl.int32)) + 1)
            b_kc, b_ks = cos_sin(b_on[:, None] * b_turn[None, :], COMPILED)
            b_cos = b_cos + ((b_kc * UNIT).to(tl.float16),)
            b_sin = b_sin + ((b_ks * UNIT).to(tl.float16),)
    if PDL:  # for what the launch before this one wrote; tables are older
        tl.extra.cuda.gdc_wait()
    if IS_TURNED:
        # Two columns a head: for the first tokens of a tile and, turned on, for the others.
        o_c = tl.arange(0, 2 * GP)
        b_high = ()
        for j in tl.static_range(KF // 2):
            p_q2 = p_q + (o_c // 2)[None, :] * sq_h + (j * KW + o_k)[:, None]
            b_q0 = tl.load(p_q2, mask=(o_c // 2 < GQ)[None, :], other=0.0).to(tl.float32)
            p_q2 += DK // 2
            b_q1 = tl.load(p_q2, mask=(o_c // 2 < GQ)[None, :], other=0.0).to(tl.float32)
            b_turn = (b_phase[j] >> 32).to(tl.int32) * BT
            b_oc, b_os = cos_sin((o_c % 2)[None, :] * b_turn[:, None], COMPILED)
            b_q0, b_q1 = turned_back(b_q0, b_q1, b_oc, b_os)
            b_q = b_q + (b_q0,)
            b_high = b_high + (b_q1,)
        b_q = b_q + b_high
    else:
        b_qsum = tl.zeros([GP], tl.float32)
        for j in tl.static_range(KF):
            p_q2 = p_q + o_g[None, :] * sq_h + (j * KW + o_k)[:, None]
            b_qj = tl.load(p_q2, mask=m_g[None, :], other=0.0).to(tl.float32)
            b_q = b_q + (b_qj,)
            b_qsum += tl.sum(b_qj, 0)
        if G == 0:
            b_ops, b_unit = fixed_queries(b_q, KF, KW, GP)
            b_unit *= k_step
    if K_SLOTS > 0:
        p_qt = QT + i_row * (DK * 2 * GP)
    if V_SLOTS > 0:
        b_rows = tl.load(COUNT + 2 * tl.arange(0, DV // 2)).to(tl.float16, bitcast=True)
        b_extra = tl.zeros([DV // 2, 2 * GP], tl.float32)

    b_acc = ()
    for j in tl.static_range(VF):
        b_acc = b_acc + (tl.zeros([VW, GP], tl.float32),)
    b_m = tl.full([GP], NOTHING, tl.float32)
    b_l = tl.zeros([8, GP], tl.float32)
    b_z = ()
    for g in tl.static_range(VG):
        b_z = b_z + (tl.zeros([8, GP], tl.float32),)

    begin, step, num_tiles = tiles_of_split(
        i_s, length, packed, per_split, num_splits, BN, S, WINDOW
    )
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
        if G == 0:
            b_rs, b_rz = token_scales(p_ks + i_hs * (2 * K_PARAMS), at + o_n, m_n, K_OFFSET)
            b_rs, b_rz = b_rs.to(tl.float32), b_rz.to(tl.float32)
        else:
            p_group = p_ks.to(tl.pointer_type(tl.int32)) + i_hs * (K_PARAMS // 2)
            p_group += at // G * DK
        if IS_TURNED:
            b_q16 = ()
            for j in tl.static_range(KF // 2):
                b_turns = (((S + n).to(tl.int64) * b_phase[j]) >> 32).to(tl.int32)
                b_tc, b_ts = cos_sin(b_turns, COMPILED)
                b_q0, b_q1 = turned_back(b_q[j], b_q[j + KF // 2], b_tc[:, None], b_ts[:, None])
                b_q16 = b_q16 + (b_q0.to(tl.float16), b_q1.to(tl.float16))
            b_cs = ()
            b_cz = ()
            if G > 0:
                for j in tl.static_range(KF):
                    b_pair = tl.load(p_group + j * KW + o_k)
                    b_x = scaled(low16(b_pair), b_low, high16(b_pair), COMPILED)
                    b_cz = b_cz + (scaled(b_x, b_down, b_none, COMPILED),)
                    b_cs = b_cs + (scaled_up_to(low16(b_pair), b_step, b_none, COMPILED),)
            b_part = ()
            for half in tl.static_range(BN // BT):
                p_kw = p_k + (half * BT + o_t)[:, None] * KR + o_k[None, :]
                b_k = byte_levels_of(key_bytes(p_kw, KB, KW), b_kt, K_LEVELS, KB, True, COMPILED)
                b_scaled = ()
                for j in tl.static_range(KF):
                    if G > 0:
                        b_x = scaled(b_k[j], b_cs[j][None, :], b_cz[j][None, :], COMPILED)
                    else:
                        m_t = half * BT + o_t < packed - n
                        place = at + half * BT + o_t
                        b_hs, b_hz = token_scales(
                            p_ks + i_hs * (2 * K_PARAMS), place, m_t, K_OFFSET
                        )
                        b_hs, b_hz = b_hs.to(tl.float32), b_hz.to(tl.float32)
                        b_x = scaled(
                            b_k[j],
                            tl.minimum(b_hs * (k_step * UNIT), FP16_MAX).to(tl.float16)[:, None],
                            ((b_hs * k_low + b_hz) * (1 / UNIT)).to(tl.float16)[:, None],
                            COMPILED,
                        )
                    b_scaled = b_scaled + (b_x,)
                b_two = tl.zeros([BT, 2 * GP], tl.float32)
                for j in tl.static_range(KF // 2):
                    b_k0, b_k1 = b_scaled[j], b_scaled[j + KF // 2]
                    b_t0 = turned(b_k0, b_k1, b_cos[j], b_sin[j], False, COMPILED)
                    b_t1 = turned(b_k1, b_k0, b_cos[j], b_sin[j], True, COMPILED)
                    b_two = tl.dot(b_t0, b_q16[2 * j], b_two)
                    b_two = tl.dot(b_t1, b_q16[2 * j + 1], b_two)
                b_first, b_other = tl.split(tl.reshape(b_two, [BT, GP, 2]))
                b_part = b_part + (b_other if half else b_first,)
            if BN == BT:
                b_s = b_part[0]
            else:
                b_s = tl.permute(tl.join(b_part[0], b_part[1]), (2, 0, 1))
                b_s = tl.reshape(b_s, [BN, GP])
        else:
            p_kw = p_k + o_n[:, None] * KR + o_k[None, :]
            b_k = byte_levels_of(key_bytes(p_kw, KB, KW), b_kt, K_LEVELS, KB, False, COMPILED)
            if G > 0:
                b_w = ()
                b_bias = tl.zeros([GP], tl.float32)
                for j in tl.static_range(KF):
                    b_pair = tl.load(p_group + j * KW + o_k)
                    b_cs, b_cz = low16(b_pair).to(tl.float32), high16(b_pair).to(tl.float32)
                    b_w = b_w + (b_q[j] * (b_cs * k_step)[:, None],)
                    b_bias += tl.sum(b_q[j] * (b_cs * k_low + b_cz)[:, None], 0)
                b_ops, b_unit = fixed_queries(b_w, KF, KW, GP)
            b_d = tl.zeros([BN, 2 * GP], tl.int32)
            for j in tl.static_range(KF):
                b_d = tl.dot(b_k[j], b_ops[j], b_d, out_dtype=tl.int32)
            b_s = joined(b_d, BN, GP) * b_unit[None, :]
            if G == 0:
                b_s = b_s * b_rs[:, None] + (b_rs * k_low + b_rz)[:, None] * b_qsum[None, :]
            else:
                b_s += b_bias[None, :]
        p_channel = p_ks + HS * (2 * K_PARAMS)
        p_value = p_channel + HS * PAGE * K_SLOTS
        for i in tl.static_range(K_SLOTS // 2):
            place = (i_hs * PAGE + at + o_n) * (K_SLOTS // 2) + i
            b_pair, b_value = outlier_pairs(p_channel, p_value, place, m_n)
            position = (S + n + o_n).to(tl.int64)
            b_s += outlier_scores(
                p_qt, PHASES, b_pair, b_value, position, 0, DK, GP, IS_TURNED, COMPILED
            ) + outlier_scores(
                p_qt, PHASES, b_pair, b_value, position, 1, DK, GP, IS_TURNED, COMPILED
            )
        b_s *= scale
        if SOFTCAP:
            b_s = soft_capped(b_s, cap)
        m_s = m_n
        if WINDOW > 0:
            m_s = m_s & (o_n >= length - WINDOW - S - n)
        b_s = tl.where(m_s[:, None], b_s, NOTHING)

        b_max = tl.max(b_s, 0)
        b_new = tl.maximum(b_m, b_max)
        b_a = tl.math.exp2(b_m - b_new)[None, :]
        b_b = tl.math.exp2(b_max - b_new)[None, :]
        b_p = tl.math.exp2(b_s - b_max[None, :])
        b_m = b_new
        b_l = b_l * b_a + b_b * by_eight(b_p, BN, GP)

        b_p8 = ()
        b_unit_v = ()
        b_z_new = ()
        for g in tl.static_range(VG):
            b_vs, b_vz = token_scales(p_vs, (i_hs * VG + g) * PAGE + at + o_n, m_n, V_OFFSET)
            b_vs, b_vz = b_vs.to(tl.float32), b_vz.to(tl.float32)
            b_pz = by_eight(b_p * (b_vs * v_low + b_vz)[:, None], BN, GP)
            b_z_new = b_z_new + (b_z[g] * b_a + b_b * b_pz,)
            b_top = tl.maximum(tl.max(b_vs, 0), TINY)
            b_i8 = fixed_point(b_p * b_vs[:, None], FIXED / b_top, BN, GP)
            b_p8 = b_p8 + (lane_order(b_i8, BN, 2 * GP),)
            b_unit_v = b_unit_v + (b_b * (b_top * v_step / FIXED),)
        b_z = b_z_new
        p_vw = p_v + o_v[:, None] * PAGE + o_n[None, :]
        if VB == 3:
            b_vw = (tl.load(p_vw), tl.load(p_vw + VW * PAGE), tl.load(p_vw + 2 * VW * PAGE))
        else:
            b_vw = (tl.load(p_vw),)
        b_v = byte_levels_of(b_vw, b_vt, V_LEVELS, VB, False, COMPILED)
        b_acc_new = ()
        for j in tl.static_range(VF):
            b_d = tl.dot(b_v[j], b_p8[j * VG // VF], out_dtype=tl.int32)
            b_d = joined(b_d, VW, GP) * b_unit_v[j * VG // VF]
            b_acc_new = b_acc_new + (b_acc[j] * b_a + b_d,)
        b_acc = b_acc_new
        p_channel = p_vs + HS * (2 * V_PARAMS)
        p_value = p_channel + HS * PAGE * V_SLOTS
        if V_SLOTS > 0:
            b_pb = b_p * b_b
            b_extra *= twice(b_a, GP)
        for i in tl.static_range(V_SLOTS // 2):
            place = (i_hs * PAGE + at + o_n) * (V_SLOTS // 2) + i
            b_pair, b_value = outlier_pairs(p_channel, p_value, place, m_n)
            for half in tl.static_range(2):
                b_extra = outlier_sums(
                    b_pb, b_pair, b_value, b_rows, b_extra, half, BN, GP, COMPILED
                )

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b_sum = tl.sum(b_l, 0)
    for j in tl.static_range(VF):
        b_o = b_acc[j] + tl.sum(b_z[j * VG // VF], 0)[None, :]
        o_d = j * VW + o_v
        store_partial(PO, PM, b_m, b_sum, b_o, p_part, o_d, o_v < VW, o_g, m_g, DV)
    if V_SLOTS > 0:
        tl.debug_barrier()  # what was stored is read again
        inverse = tl.where(b_sum > 0, 1.0 / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
        b_both, b_less = tl.split(tl.reshape(b_extra, [DV // 2, GP, 2]))
        b_extra = tl.join((b_both + b_less) * 0.5, (b_both - b_less) * 0.5)
        b_extra = tl.reshape(b_extra, [DV // 2, 2 * GP]) * twice(inverse[None, :], GP)
        o_x = tl.arange(0, 2 * GP)
        o_d = tl.arange(0, DV // 2)[:, None] * 2 + (o_x % 2)[None, :]
        p_o = PO + (p_part + o_x // 2)[None, :] * DV + o_d
        m_o = (o_x // 2 < GQ)[None, :]
        tl.store(p_o, tl.load(p_o, mask=m_o, other=0.0) + b_extra, mask=m_o)
