"""Outliers of keys and values, beside what the matrix unit sums: steps of ``level_form.py``.

Those of a key: a row of the query's table (see ``spread_queries``) for every one of them. Those of
a value: a matrix product of a matrix with a one in every column, at half the outlier's channel,
and its share of the output, with a second column for the sign of its parity.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.layout import high16, low16, padded
from kvbits.attention.triton.kernels.lookup import cos_sin, even_of, is_at


@triton.jit
def outlier_pairs(p_channel, p_value, place, m_n):
    """Channels and values of two outliers of every token, two in one."""
    b_pair = tl.load(p_channel.to(tl.pointer_type(tl.int16)) + place, mask=m_n, other=0)
    b_value = tl.load(p_value.to(tl.pointer_type(tl.int32)) + place, mask=m_n, other=0)
    return b_pair, b_value


@triton.jit
def value_of(b_value, HALF: tl.constexpr):
    """One of two values, float32."""
    return (high16(b_value) if HALF else low16(b_value)).to(tl.float32)


@triton.jit
def outlier_scores(
    p_q,
    PHASES,
    b_pair,
    b_value,
    position,
    HALF: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    IS_TURNED: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """What one outlier of every key adds to the scores: ``[BN, GP]``."""
    BN: tl.constexpr = b_pair.shape[0]
    b_c = (b_pair.to(tl.int32) >> (8 * HALF)) & 0xFF
    b_c = tl.minimum(b_c, D - 1)  # of a token that does not count it may be anything
    b_d = value_of(b_value, HALF)
    b_q = tl.load(p_q + b_c[:, None] * (2 * GP) + tl.arange(0, 2 * GP)[None, :])
    b_own, b_partner = tl.split(tl.reshape(b_q.to(tl.float32), [BN, GP, 2]))
    if IS_TURNED:
        b_phase = tl.load(PHASES + b_c % (D // 2))
        b_cos, b_sin = cos_sin(((position * b_phase) >> 32).to(tl.int32), COMPILED)
        return b_own * (b_d * b_cos)[:, None] + b_partner * (b_d * b_sin)[:, None]
    else:
        return b_own * b_d[:, None]


@triton.jit
def spread_queries(
    QR,
    QT,
    sq_b,
    sq_h,
    H: tl.constexpr,
    D: tl.constexpr,
    GQ: tl.constexpr,
    GP: tl.constexpr,
    PDL: tl.constexpr,
):
    """The queries of a head by channel; grid (B * H).

    QT: fp16 ``[B * H, D, GP, 2]``: the query's channel, and that which the rotary embedding turns
    it towards, with its sign.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    o_d = tl.arange(0, padded(D, 16))
    o_g = tl.arange(0, 2 * GP)
    is_partner = (o_g % 2 == 1)[None, :]
    is_low = (o_d < D // 2)[:, None]
    o_c = tl.where(
        is_partner, tl.where(is_low, o_d[:, None] + D // 2, o_d[:, None] - D // 2), o_d[:, None]
    )
    p_q = QR + (i_bh // H) * sq_b + ((i_bh % H) * GQ + o_g // 2)[None, :] * sq_h + o_c
    m_q = (o_d < D)[:, None] & (o_g // 2 < GQ)[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32)
    b_q = tl.where(is_partner & ~is_low, -b_q, b_q)
    p_t = QT + (i_bh * D + o_d)[:, None] * (2 * GP) + o_g[None, :]
    tl.store(p_t, b_q.to(tl.float16), mask=(o_d < D)[:, None])
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def twice(b_a, GP: tl.constexpr):
    """Factors ``[1, GP]`` of heads for the columns of outlier sums."""
    return tl.reshape(tl.join(b_a, b_a), [1, 2 * GP])


@triton.jit
def outlier_sums(
    b_p,
    b_pair,
    b_value,
    b_rows,
    b_extra,
    HALF: tl.constexpr,
    BN: tl.constexpr,
    GP: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Add one outlier of every value, times its probability, to the sums of two channels.

    In the columns of a head: their sum, and the sum of the even one less that of the odd one.
    """
    b_even = even_of(b_pair, HALF, COMPILED)
    b_is_row = is_at(b_rows[:, None], b_even[None, :], COMPILED)  # [DV / 2, BN]
    b_d = value_of(b_value, HALF)
    b_sign = (b_pair.to(tl.int32) >> (8 * HALF)) << 31
    b_signed = (b_d.to(tl.int32, bitcast=True) ^ b_sign).to(tl.float32, bitcast=True)
    b_x = tl.reshape(tl.join(b_p * b_d[:, None], b_p * b_signed[:, None]), [BN, 2 * GP])
    return tl.dot(b_is_row, b_x.to(tl.float16), b_extra)
