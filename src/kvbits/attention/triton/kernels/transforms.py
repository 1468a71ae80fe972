"""What wrapping codecs do to states before they are encoded: rotation, and turning back."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

RADIANS = tl.constexpr(2 * math.pi / 2**32)  # of a turn in 2**32 parts


@triton.constexpr_function
def log2_of(width: Any) -> Any:
    """Exponent of a power of two."""
    return width.bit_length() - 1


@triton.constexpr_function
def root_of(width: Any) -> Any:
    """Square root, in double precision."""
    return math.sqrt(width)


@triton.jit
def sums_and_differences(b_x, STEP: tl.constexpr):
    """Sums of channels STEP apart, and differences, in runs of twice as many: ``[T, D]``."""
    T: tl.constexpr = b_x.shape[0]
    D: tl.constexpr = b_x.shape[1]
    o_p = tl.arange(0, 2)[None, None, :, None]
    b_p = tl.reshape(b_x, [T, D // (2 * STEP), 2, STEP])
    b_sum = tl.sum(b_p, 2, keep_dims=True)
    b_difference = tl.sum(tl.where(o_p == 0, b_p, -b_p), 2, keep_dims=True)
    return tl.reshape(tl.where(o_p == 0, b_sum, b_difference), [T, D])


@triton.jit
def hadamard(b_x, D: tl.constexpr):
    """Multiply rows ``[T, D]`` of float32 by the orthonormal Hadamard matrix.

    By sums and differences of pairs in the order of ``codecs/rotation.py``: the same bits.
    """
    for i in tl.static_range(log2_of(D)):
        b_x = sums_and_differences(b_x, 1 << i)
    return b_x * (1 / root_of(D))


@triton.jit
def cos_and_sin(b_turn):
    """Cosine and sine of 2**-32 turns, int32, as float32: by Taylor series within an eighth of a
    turn, whose next terms are below 3e-8, and quadrants."""
    b_quadrant = (b_turn + (1 << 29)) >> 30
    b_a = (b_turn - (b_quadrant << 30)).to(tl.float32) * RADIANS
    b_2 = b_a * b_a
    b_cos = 1 + b_2 * (-1 / 2 + b_2 * (1 / 24 + b_2 * (-1 / 720 + b_2 * (1 / 40320))))
    b_sin = b_2 * (-1 / 6 + b_2 * (1 / 120 + b_2 * (-1 / 5040 + b_2 * (1 / 362880))))
    b_sin = b_a + b_a * b_sin
    m_odd = (b_quadrant & 1) == 1
    b_x = tl.where(m_odd, b_sin, b_cos)
    b_y = tl.where(m_odd, b_cos, b_sin)
    m_behind = (b_quadrant & 2) == 2
    return tl.where(m_behind ^ m_odd, -b_x, b_x), tl.where(m_behind, -b_y, b_y)


@triton.jit
def turned_back(b_x, p_x, m_x, position, o_d, p_phases, PAIRS: tl.constexpr):
    """Channels ``o_d [N]`` of tokens at ``p_x [T]`` as before the rotary embedding: ``[T, N]``.

    A phase counts 2**-64 turns, so that the angle of any position is exact: what overflows is
    whole turns. ``p_phases``: int64 ``[PAIRS]``, phases of one token.
    """
    is_low = o_d < PAIRS
    o_pair = tl.where(is_low, o_d, o_d - PAIRS)
    m_r = (o_d >= 0) & (o_d < 2 * PAIRS)
    b_f = tl.load(p_phases + o_pair, mask=m_r, other=0)
    # [T, N]
    b_phase = position.to(tl.int64)[:, None] * b_f[None, :]
    b_cos, b_sin = cos_and_sin((b_phase >> 32).to(tl.int32))
    o_partner = tl.where(is_low, o_d + PAIRS, o_pair)
    m_partner = m_x & m_r[None, :]
    b_y = tl.load(p_x[:, None] + o_partner[None, :], mask=m_partner, other=0.0).to(tl.float32)
    b_turned = b_x * b_cos + b_y * tl.where(is_low[None, :], b_sin, -b_sin)
    return tl.where(m_r[None, :], b_turned, b_x)
