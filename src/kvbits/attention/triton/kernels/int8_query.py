"""The query of the int8 form: coefficients in fixed point; see ``int8_form.py``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.layout import (
    low_half,
    num_segments,
    padded,
    row_bytes,
    segment_channel,
    segment_weight,
)

FIXED = tl.constexpr(16383.0)  # largest magnitude in 15-bit fixed point
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 to its low bits
TINY = tl.constexpr(1e-20)  # keeps the scale of an all-zero query or value finite


@triton.constexpr_function
def key_width(bits: Any, head_dim: Any) -> Any:
    """Bytes of a key row, padded to what a step of the matrix unit takes."""
    return padded(row_bytes(bits, head_dim), 32)


@triton.constexpr_function
def is_fine(bits: Any, prefix: Any) -> Any:
    """Whether a prefix belongs to the accumulator of low bits."""
    return prefix < (1 if bits == 3 else 4 // bits)


@triton.jit
def fixed_point(b_x, b_inverse, ROWS: tl.constexpr, GP: tl.constexpr):
    """``[ROWS, GP]`` float32 to ``[ROWS, 2 * GP]`` int8: high and low 7 bits side by side."""
    b_i = (b_x * b_inverse + ROUND).to(tl.int32, bitcast=True)
    return tl.reshape(tl.join((b_i >> 7).to(tl.int8), (b_i & 127).to(tl.int8)), [ROWS, 2 * GP])


@triton.jit
def segment_query(p_q, o_b, m_g, SEGMENT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """w of one segment for the bytes ``o_b`` of a row: ``[KW, GP]``."""
    m_b = o_b < row_bytes(BITS, D)
    o_ok = tl.where(m_b, o_b, 0)
    weight = tl.where(m_b, segment_weight(o_ok, SEGMENT, BITS, D), 0.0)
    channel = segment_channel(o_ok, SEGMENT, BITS, D)
    b_q = tl.load(p_q[None, :] + channel[:, None], mask=m_g[None, :], other=0.0)
    return b_q.to(tl.float32) * weight[:, None]


@triton.jit
def channel_scaled(b_w, p_pairs, o_kb, KB: tl.constexpr, D: tl.constexpr):
    """w of every segment times the scales of its channels, which are one group's pairs."""
    o_ok = tl.where(o_kb < row_bytes(KB, D), o_kb, 0)
    b_scaled = ()
    for k in tl.static_range(num_segments(KB)):
        b_s = low_half(tl.load(p_pairs + segment_channel(o_ok, k, KB, D)))
        b_scaled = b_scaled + (b_w[k] * b_s[:, None],)
    return b_scaled


@triton.jit
def coefficients(b_w, b_bias, scale, KB: tl.constexpr, D: tl.constexpr, GP: tl.constexpr):
    """Operands of the query from w ``[KW, GP]`` each, in fixed point.

    Returns the operands, the scale of the fine ones, of the coarse ones, and the constant term, to
    which ``b_bias`` is added; all but the operands times ``scale``.
    """
    N: tl.constexpr = num_segments(KB)
    KW: tl.constexpr = key_width(KB, D)
    b_fine = tl.full([GP], TINY, tl.float32)
    b_coarse = tl.full([GP], TINY, tl.float32)
    b_a = ()
    for k in tl.static_range(N):
        if k == N - 1:
            b_bias += 128 * tl.sum(b_w[k], 0)
            b_c = b_w[k]
        else:
            b_c = b_w[k] - b_w[k + 1]
        if is_fine(KB, k):
            b_fine = tl.maximum(b_fine, tl.max(tl.abs(b_c), 0))
        else:
            b_coarse = tl.maximum(b_coarse, tl.max(tl.abs(b_c), 0))
        b_a = b_a + (b_c,)
    b_ops = ()
    for k in tl.static_range(N):
        if is_fine(KB, k):
            b_inverse = FIXED / b_fine
        else:
            b_inverse = FIXED / b_coarse
        b_ops = b_ops + (fixed_point(b_a[k], b_inverse[None, :], KW, GP),)
    return b_ops, b_fine * (scale / FIXED), b_coarse * (scale / FIXED), b_bias * scale


@triton.jit
def prepare_queries(
    Q,
    QA,
    QC,
    scale,
    sq_b,
    sq_h,
    H: tl.constexpr,
    D: tl.constexpr,
    KB: tl.constexpr,
    GQ: tl.constexpr,
    GP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Coefficients of the queries of one key/value head, for per-token keys; grid (B * H).

    QA: int8 ``[B * H, segments, 2 * GP, KW]``. QC: float32 ``[B * H, 4, GP]``: scale of the fine
    and of the coarse operands, constant term, sum of the query, all times ``scale``. Read back
    from memory, operands have the order the matrix unit wants; computed where they are used, they
    cost the main loop a fifth more instructions.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    N: tl.constexpr = num_segments(KB)
    KW: tl.constexpr = key_width(KB, D)
    o_w = tl.arange(0, KW)
    o_g = tl.arange(0, GP)
    o_d = tl.arange(0, padded(D, 16))
    m_g = o_g < GQ
    p_q = Q + (i_bh // H) * sq_b + ((i_bh % H) * GQ + o_g) * sq_h
    m_q = m_g[None, :] & (o_d < D)[:, None]
    b_q = tl.load(p_q[None, :] + o_d[:, None], mask=m_q, other=0.0).to(tl.float32)
    b_w = ()
    for k in tl.static_range(N):
        b_w = b_w + (segment_query(p_q, o_w, m_g, k, KB, D),)
    b_zero = tl.zeros([GP], tl.float32)
    b_ops, b_fine, b_coarse, b_bias = coefficients(b_w, b_zero, scale, KB, D, GP)
    p_a = QA + (i_bh * N * 2 * GP + tl.arange(0, 2 * GP)[None, :]) * KW + o_w[:, None]
    for k in tl.static_range(N):
        tl.store(p_a + k * 2 * GP * KW, b_ops[k])
    if PDL:  # late: programs of the next launch that arrive early are spread unevenly
        tl.extra.cuda.gdc_launch_dependents()
    p_c = QC + i_bh * 4 * GP + o_g
    tl.store(p_c, b_fine)
    tl.store(p_c + GP, b_coarse)
    tl.store(p_c + 2 * GP, b_bias)
    tl.store(p_c + 3 * GP, tl.sum(b_q, 0) * scale)
