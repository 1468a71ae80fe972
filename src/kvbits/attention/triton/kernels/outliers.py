"""Channels of a token that are corrected after decoding: which, and by how much."""

from __future__ import annotations

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def lower_median(b_x, m_d, D: tl.constexpr):
    """Median of D channels of rows ``[T, N]`` of float32, the lower of two: ``[T]``.

    Floats whose negative bits are flipped are in the order of integers, and the median's bits are
    found from the top: one is set if too few values lie below the number it makes.
    """
    RANK: tl.constexpr = (D - 1) // 2
    b_i = b_x.to(tl.int32, bitcast=True)
    b_i = tl.where(m_d[None, :], b_i ^ ((b_i >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    num_below = tl.sum((b_i < 0).to(tl.int32), 1)
    b_m = tl.where(num_below > RANK, -0x80000000, 0).to(tl.int32)
    for i in range(31):
        b_try = b_m | (1 << (30 - i))
        num_below = tl.sum((b_i < b_try[:, None]).to(tl.int32), 1)
        b_m = tl.where(num_below > RANK, b_m, b_try)
    return (b_m ^ ((b_m >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def distance_from_middle(b_x):
    """Distances of a block's values ``[T, N]`` from the middle of their channel, in half ranges,
    and the middles ``[N]``."""
    b_low = tl.min(b_x, 0)
    b_high = tl.max(b_x, 0)
    b_middle = (b_low + b_high) * 0.5
    b_half = (b_high - b_low) * 0.5
    b_half = tl.broadcast_to(tl.where(b_half == 0, 1.0, b_half)[None, :], b_x.shape)
    return tl.div_rn(b_x - b_middle[None, :], b_half), b_middle


@triton.jit
def extreme_channels(b_score, o_d, HALF: tl.constexpr):
    """The HALF channels of least score of every row, then those of highest: a tuple of ``[T]``.

    Of equals, low ones come first and high ones last, as a stable sort has them. ``o_d``:
    channels, -1 where there is none.
    """
    m_d = (o_d >= 0)[None, :]
    b_c = ()
    b_s = tl.where(m_d, b_score, float("inf"))
    for _ in tl.static_range(HALF):
        m_least = b_s == tl.min(b_s, 1)[:, None]
        channel = tl.min(tl.where(m_least & m_d, o_d[None, :], 0xFF), 1)
        b_s = tl.where(o_d[None, :] == channel[:, None], float("inf"), b_s)
        b_c = b_c + (channel,)
    b_s = tl.where(m_d, b_score, float("-inf"))
    for _ in tl.static_range(HALF):
        m_highest = b_s == tl.max(b_s, 1)[:, None]
        channel = tl.max(tl.where(m_highest, o_d[None, :], -1), 1)
        b_s = tl.where(o_d[None, :] == channel[:, None], float("-inf"), b_s)
        b_c = b_c + (channel,)
    return b_c


@triton.jit
def are_any(o_d, b_c, SLOTS: tl.constexpr):
    """Which channels ``o_d [N]`` are among ``b_c``, by row: ``[T, N]``."""
    m_c = o_d[None, :] == b_c[0][:, None]
    for i in tl.static_range(1, SLOTS):
        m_c = m_c | (o_d[None, :] == b_c[i][:, None])
    return m_c


@triton.jit
def store_outliers(b_missing, o_d, b_c, p_channel, p_value, m_t, SLOTS: tl.constexpr):
    """Write channels ``b_c`` in order, and what decoding misses there, ``[T, N]``, as fp16.

    ``p_channel [T]``, ``p_value [T]``: the first slot of every token.
    """
    for i in tl.static_range(SLOTS):
        rank = tl.zeros(b_c[i].shape, tl.int32)
        for j in tl.static_range(SLOTS):
            rank += (b_c[j] < b_c[i]).to(tl.int32)
        m_c = o_d[None, :] == b_c[i][:, None]
        b_v = tl.max(tl.where(m_c, b_missing, float("-inf")), 1)
        b_v = tl.minimum(tl.maximum(b_v, -FP16_MAX), FP16_MAX).to(tl.float16)
        tl.store(p_channel + rank, b_c[i].to(tl.int8), mask=m_t)
        tl.store(p_value + rank, b_v, mask=m_t)
