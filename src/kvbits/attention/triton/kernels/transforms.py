"""What wrapping codecs do to states before they are encoded: rotation, and turning back."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

TURN = tl.constexpr(2 * math.pi / 2**32)  # of one unit of the upper half of a phase, in radians


@triton.constexpr_function
def log2_of(width: Any) -> Any:
    """Exponent of a power of two."""
    return width.bit_length() - 1


@triton.constexpr_function
def root_of(width: Any) -> Any:
    """Square root, in double precision."""
    return math.sqrt(width)


@triton.jit
def hadamard(b_x):
    """Multiply rows ``[T, D]`` of float32 by the orthonormal Hadamard matrix.

    By sums and differences of pairs in the order of ``codecs/rotation.py``: the same bits.
    """
    T: tl.constexpr = b_x.shape[0]
    D: tl.constexpr = b_x.shape[1]
    o_p = tl.arange(0, 2)[None, None, :, None]
    for i in tl.static_range(log2_of(D)):
        STEP: tl.constexpr = 1 << i
        b_p = tl.reshape(b_x, [T, D // (2 * STEP), 2, STEP])
        b_sum = tl.sum(b_p, 2, keep_dims=True)
        b_difference = tl.sum(tl.where(o_p == 0, b_p, -b_p), 2, keep_dims=True)
        b_x = tl.reshape(tl.where(o_p == 0, b_sum, b_difference), [T, D])
    return b_x * (1 / root_of(D))


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
    b_angle = ((position.to(tl.int64)[:, None] * b_f[None, :]) >> 32).to(tl.float32) * TURN
    b_sin = tl.sin(b_angle)
    o_partner = tl.where(is_low, o_d + PAIRS, o_pair)
    m_partner = m_x & m_r[None, :]
    b_y = tl.load(p_x[:, None] + o_partner[None, :], mask=m_partner, other=0.0).to(tl.float32)
    b_turned = b_x * tl.cos(b_angle) + b_y * tl.where(is_low[None, :], b_sin, -b_sin)
    return tl.where(m_r[None, :], b_turned, b_x)
