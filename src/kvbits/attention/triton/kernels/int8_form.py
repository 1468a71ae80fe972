"""Decode attention on int8 tensor cores: codes enter the matrix unit almost as they lie in memory.

A byte, read as int8, is a sum of its segments around zero (bit 7 is stored flipped). Masking a
byte to its segments 0..k is one AND for four bytes, and the last prefix needs none. With P_k the
prefix and w_k the query times the segment's weight,

    sum_k w_k * segment_k  =  sum_k P_k * (w_k - w_{k+1})  +  128 * w_last

The coefficients w_k - w_{k+1} of the query, and the probabilities, enter as 15-bit fixed point in
two int8 columns (high and low). For up to four query heads per key/value head these fill the
columns a matrix unit pads to anyway. Low prefixes and high prefixes have a scale and an
accumulator each, so that the rounding of the query stays far below that of the keys. Probabilities
are scaled by their own maximum in every tile: nothing underflows, however long the context.
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
    lane_order,
    page_offset,
    row_lengths,
    rows_of,
    soft_capped,
    store_partial,
    tiles_of_split,
    token_scales,
)
from kvbits.attention.triton.kernels.int8_query import (
    FIXED,
    TINY,
    channel_scaled,
    coefficients,
    fixed_point,
    is_fine,
    key_width,
    segment_query,
)
from kvbits.attention.triton.kernels.layout import (
    field_channel,
    field_group,
    field_mask,
    field_weight,
    has_top_bit,
    high_half,
    is_third_plane,
    length_of,
    low_half,
    num_segments,
    padded,
    prefix_mask,
    row_bytes,
    value_fields,
    value_planes,
)


@triton.constexpr_function
def and_code(mask: Any) -> Any:
    """PTX that masks four bytes."""
    return f"and.b32 $0, $1, {mask * 0x01010101:#010x};"


@triton.constexpr_function
def as_int8(mask: Any) -> Any:
    """A byte mask as int8."""
    return mask - 256 if mask >= 128 else mask


@triton.jit
def masked_bytes(b_w, MASK: tl.constexpr, COMPILED: tl.constexpr):
    """Bits of ``MASK`` in every byte; plain Triton would unpack the bytes first."""
    if MASK == 0xFF:
        return b_w
    elif COMPILED:
        return tl.inline_asm_elementwise(
            and_code(MASK), "=r,r", [b_w], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (b_w & as_int8(MASK)).to(tl.int8)


@triton.jit
def joined(b_d, ROWS: tl.constexpr, GP: tl.constexpr):
    """Sums of high and low columns ``[ROWS, 2 * GP]`` int32 to ``[ROWS, GP]`` float32."""
    b_high, b_low = tl.split(tl.reshape(b_d, [ROWS, GP, 2]))
    return (b_high * 128 + b_low).to(tl.float32)


@triton.jit
def in_codes(b_o, b_w, MASK: tl.constexpr, WEIGHT: tl.constexpr):
    """Sums of the codes of a field from those of its bits in place; ``b_w`` flips bit 7 back."""
    if MASK >= 128:
        b_o += tl.sum(b_w, 0)[None, :] * 128
    return b_o * WEIGHT


@triton.jit(
    do_not_specialize=["num_splits", "num_exact_splits", "k_stride", "v_stride", "per_split"]
)
def attend_int8(
    Q,
    QR,
    QA,
    QC,
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
    GP: tl.constexpr,
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
    """Attend one query of every row to a share of its tokens; grid (B * HS, splits).

    The first splits take packed tiles, the last the exact tokens. G: tokens of a per-channel
    key group, 0 for per-token keys. VG: scale groups of a value. QR: the query as packed keys are
    rotated, of the strides of Q. KT: whether every packed key has a scale beside those of its
    codes. VT: packed values that share a scale of every channel, 0 where there is none.
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
    KW: tl.constexpr = key_width(KB, DK)
    N: tl.constexpr = num_segments(KB)
    PLANES: tl.constexpr = value_planes(VB, VG)
    VROWS: tl.constexpr = VR // PLANES
    VW: tl.constexpr = padded(VROWS, 16)
    FIELDS: tl.constexpr = value_fields(VB, VG)
    NF: tl.constexpr = length_of(FIELDS)
    KEY_PAIRS: tl.constexpr = (
        PAGE if G == 0 else PAGE // G * DK
    )  # scale and offset pairs of a page
    o_kb = tl.arange(0, KW)
    o_vr = tl.arange(0, VW)
    o_n = tl.arange(0, BN)
    o_g = tl.arange(0, GP)
    m_g = o_g < GQ

    begin, step, num_tiles = tiles_of_split(
        i_s, length, packed, per_split, num_splits, BN, S, WINDOW
    )
    K_TABLE += i_b.to(tl.int64) * k_stride
    V_TABLE += i_b.to(tl.int64) * v_stride
    if PDL:  # for what the launch before this one wrote; lengths and tables are older
        tl.extra.cuda.gdc_wait()
    b_qa = ()
    if G == 0:
        p_qa = QA + (i_row * N * 2 * GP + tl.arange(0, 2 * GP)[None, :]) * KW + o_kb[:, None]
        for k in tl.static_range(N):
            b_qa = b_qa + (tl.load(p_qa + k * 2 * GP * KW),)
        p_qc = QC + i_row * 4 * GP + o_g
        b_fine = tl.load(p_qc)
        b_coarse = tl.load(p_qc + GP)
        b_bias = tl.load(p_qc + 2 * GP)
        b_qsum = tl.load(p_qc + 3 * GP)
    else:
        p_q = QR + i_b.to(tl.int64) * sq_b + i_h * GQ * sq_h + o_g * sq_h
        o_d = tl.arange(0, padded(DK, 16))
        m_q = m_g[None, :] & (o_d < DK)[:, None]
        b_q = tl.load(p_q[None, :] + o_d[:, None], mask=m_q, other=0.0).to(tl.float32)
        b_w_q = ()
        for k in tl.static_range(N):
            b_w_q = b_w_q + (segment_query(p_q, o_kb, m_g, k, KB, DK),)

    b_acc = ()
    for k in tl.static_range(NF):
        b_acc = b_acc + (tl.zeros([VW, GP], tl.float32),)
    b_m = tl.full([GP], NOTHING, tl.float32)
    b_l = tl.zeros([8, GP], tl.float32)
    b_w = ()  # sum of p * scale, where a group has bytes with bit 7
    b_z = ()  # sum of p * offset
    for g in tl.static_range(VG):
        b_w = b_w + (tl.zeros([8, GP], tl.float32),)
        b_z = b_z + (tl.zeros([8, GP], tl.float32),)

    for t in range(begin, num_tiles, step):
        n = t * BN
        k_page = page_offset(K_TABLE, k_stride, t, BN, PAGE)
        v_page = page_offset(V_TABLE, v_stride, t, BN, PAGE)
        at = t % (PAGE // BN) * BN
        p_k = K_POOL + k_page * 16 + (i_hs * PAGE + at) * KR
        p_v = V_POOL + v_page * 16 + i_hs * (PAGE * VR) + at
        p_ks = (K_POOL + k_page * 16 + HS * PAGE * KR).to(tl.pointer_type(tl.int32))
        p_vs = (V_POOL + v_page * 16 + HS * PAGE * VR).to(tl.pointer_type(tl.int32))
        if VT > 0:  # long before they are needed: no pipeline fetches what feeds no product
            b_vc = channel_scales(p_vs, i_hs, at, HS, PAGE, VT, DV, VB, VG, VW)
        if G > 0:
            p_group = p_ks + i_hs * KEY_PAIRS + at // G * DK
            b_pairs = tl.load(p_group + o_d, mask=o_d < DK, other=0)
            b_ops, b_fine_t, b_coarse_t, b_bias_t = coefficients(
                channel_scaled(b_w_q, p_group, o_kb, KB, DK),
                tl.sum(b_q * high_half(b_pairs)[:, None], 0),
                scale,
                KB,
                DK,
                GP,
            )
        else:
            b_ops, b_fine_t, b_coarse_t, b_bias_t = b_qa, b_fine, b_coarse, b_bias
        b_low = tl.zeros([BN, 2 * GP], tl.int32)
        b_high = tl.zeros([BN, 2 * GP], tl.int32)
        p_kw = p_k + o_n[:, None] * KR + o_kb[None, :]
        if KW == KR:
            b_kw = tl.load(p_kw)
        else:
            b_kw = tl.load(p_kw, mask=(o_kb < KR)[None, :], other=0)
        for k in tl.static_range(N):
            b_op = masked_bytes(b_kw, prefix_mask(KB, k), COMPILED)
            if is_fine(KB, k):
                b_low = tl.dot(b_op, b_ops[k], b_low, out_dtype=tl.int32)
            else:
                b_high = tl.dot(b_op, b_ops[k], b_high, out_dtype=tl.int32)
        b_s = joined(b_high, BN, GP) * b_coarse_t[None, :] + b_bias_t[None, :]
        if KB < 8:
            b_s += joined(b_low, BN, GP) * b_fine_t[None, :]
        if G == 0:
            b_ks = tl.load(p_ks + i_hs * KEY_PAIRS + at + o_n)
            b_s = b_s * low_half(b_ks)[:, None] + high_half(b_ks)[:, None] * b_qsum[None, :]
        if KT:
            b_s *= token_scales(p_ks, i_hs, at, o_n, HS, KEY_PAIRS, PAGE)
        if SOFTCAP:
            b_s = soft_capped(b_s, cap)
        m_n = o_n < packed - n
        if WINDOW > 0:
            m_n = m_n & (o_n >= length - WINDOW - S - n)
        b_s = tl.where(m_n[:, None], b_s, NOTHING)

        b_max = tl.max(b_s, 0)
        b_new = tl.maximum(b_m, b_max)
        b_a = tl.math.exp2(b_m - b_new)[None, :]
        b_b = tl.math.exp2(b_max - b_new)[None, :]
        b_p = tl.math.exp2(b_s - b_max[None, :])
        b_m = b_new
        b_l = b_l * b_a + b_b * by_eight(b_p, BN, GP)
        b_p8 = ()
        b_o_scale = ()
        b_w_new = ()
        b_z_new = ()
        for g in tl.static_range(VG):
            b_vs = tl.load(
                p_vs + (i_hs * VG + g) * PAGE + at + o_n, mask=o_n < packed - n, other=0
            )
            b_pv = b_p * low_half(b_vs)[:, None]
            b_top = tl.maximum(tl.max(low_half(b_vs), 0), TINY)
            b_pz = b_b * by_eight(b_p * high_half(b_vs)[:, None], BN, GP)
            b_z_new = b_z_new + (b_pz if VT > 0 else b_z[g] * b_a + b_pz,)
            if has_top_bit(VB, VG, g):
                b_pw = b_b * by_eight(b_pv, BN, GP)
                b_w_new = b_w_new + (b_pw if VT > 0 else b_w[g] * b_a + b_pw,)
            else:
                b_w_new = b_w_new + (b_w[g],)
            b_i8 = fixed_point(b_pv, FIXED / b_top, BN, GP)
            b_p8 = b_p8 + (lane_order(b_i8, BN, 2 * GP),)
            b_o_scale = b_o_scale + (b_b * (b_top / FIXED),)
        b_w = b_w_new
        b_z = b_z_new
        b_acc_new = ()
        for k in tl.static_range(NF):
            if k == 0 or FIELDS[k][0] != FIELDS[k - 1][0]:
                p_vw = p_v + (FIELDS[k][0] * VROWS + o_vr[:, None]) * PAGE + o_n[None, :]
                if VW == VROWS:
                    b_vw = tl.load(p_vw)
                else:
                    b_vw = tl.load(p_vw, mask=(o_vr < VROWS)[:, None], other=0)
            if VG == 1 and VT == 0:
                b_op = masked_bytes(b_vw, prefix_mask(VB, FIELDS[k][1]), COMPILED)
            else:
                b_op = masked_bytes(b_vw, field_mask(VB, FIELDS[k]), COMPILED)
            b_d = tl.dot(b_op, b_p8[field_group(VB, VG, FIELDS[k])], out_dtype=tl.int32)
            b_d = joined(b_d, VW, GP) * b_o_scale[field_group(VB, VG, FIELDS[k])]
            if VT > 0:  # a tile's sums are states before they are scaled
                b_wk = b_w[field_group(VB, VG, FIELDS[k])]
                b_d = in_codes(b_d, b_wk, field_mask(VB, FIELDS[k]), field_weight(VB, FIELDS[k]))
                if not is_third_plane(VB, FIELDS[k]):
                    b_d += tl.sum(b_z[field_group(VB, VG, FIELDS[k])], 0)[None, :]
                b_d *= rows_of(b_vc[k], VW)
            b_acc_new = b_acc_new + (b_acc[k] * b_a + b_d,)
        b_acc = b_acc_new

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b_sum = tl.sum(b_l, 0)
    b_bits = ()  # the bits of 3-bit channels 6 and 7 that lie in the third plane
    for j in tl.static_range(NF - 1, -1, -1):
        b_o = b_acc[j]
        if VT == 0:
            if VG == 1 and j > 0:
                if FIELDS[j][0] == FIELDS[j - 1][0]:
                    b_o -= b_acc[j - 1]
            b_wj = b_w[field_group(VB, VG, FIELDS[j])]
            b_o = in_codes(b_o, b_wj, field_mask(VB, FIELDS[j]), field_weight(VB, FIELDS[j]))
        if is_third_plane(VB, FIELDS[j]):
            b_bits = b_bits + (b_o,)
        else:
            if VB == 3 and j == 2:  # channel 6
                b_o += b_bits[1]
            if VB == 3 and j == 5:  # channel 7
                b_o += b_bits[0]
            if VT == 0:
                b_o += tl.sum(b_z[field_group(VB, VG, FIELDS[j])], 0)[None, :]
            o_d = o_vr + field_channel(VB, DV, VG, FIELDS[j])
            store_partial(PO, PM, b_m, b_sum, b_o, p_part, o_d, o_vr < VROWS, o_g, m_g, DV)
