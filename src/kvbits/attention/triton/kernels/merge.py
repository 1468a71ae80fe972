"""What comes before and after the splits of an attention call: the query is rotated as keys are,
and splits become one output, rotated back."""

from __future__ import annotations

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.common import LOG2E, NOTHING


@triton.jit(do_not_specialize=["sq_b", "sq_h", "sq_t"])
def rotate_queries(
    Q,
    MATRIX,
    OUT,
    sq_b,
    sq_h,
    sq_t,
    H: tl.constexpr,
    NQ: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DB: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries times a matrix ``[D, D]``, in float32; grid (B * H * NQ / R, D / DB).

    H: query heads. OUT has the strides of Q.
    """
    o_d = tl.arange(0, D)
    o_b = tl.program_id(1) * DB + tl.arange(0, DB)
    b_m = tl.load(MATRIX + o_d[:, None] * D + o_b[None, :])
    if PDL:
        tl.extra.cuda.gdc_wait()
    for r in tl.static_range(R):
        i_r = tl.program_id(0) * R + r
        at = (i_r // (H * NQ)).to(tl.int64) * sq_b + i_r // NQ % H * sq_h + i_r % NQ * sq_t
        b_q = tl.load(Q + at + o_d).to(tl.float32)
        tl.store(OUT + at + o_b, tl.sum(b_q[:, None] * b_m, 0))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def weighted_sum(
    PO,
    PM,
    row,
    column,
    first,
    stop,
    top,
    o_d,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sum of the outputs of splits from ``first`` to ``stop``, by weight."""
    b_o = tl.zeros(o_d.shape, tl.float32)
    for s in tl.range(first, stop, STEP):
        o_s = s + tl.arange(0, STEP)
        place = (row + o_s) * COLUMNS + column
        b_m = tl.load(PM + place, mask=o_s < stop, other=NOTHING)
        b_w = tl.where(b_m > NOTHING / 2, tl.math.exp2(b_m - top), 0.0)
        m_o = (o_s < stop)[:, None] & (o_d < D)[None, :]
        b_x = tl.load(PO + place[:, None] * D + o_d[None, :], mask=m_o, other=0.0)
        b_o += tl.sum(b_x * b_w[:, None], 0)
    return b_o


@triton.jit(do_not_specialize=["num_splits", "num_packed"])
def merge_splits(
    PO,
    PM,
    SINK_LOGITS,
    MATRIX,
    OUT,
    num_splits,
    num_packed,
    H: tl.constexpr,
    GQ: tl.constexpr,
    NQ: tl.constexpr,
    D: tl.constexpr,
    DB: tl.constexpr,
    NSP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_ROTATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge partial outputs by their log-sum-exp; grid (B * NQ * H * GQ, channel blocks of DB).

    The outputs of the first ``num_packed`` splits, if rotated, are times MATRIX ``[D, D]``.

    PO: float32 ``[B * H, splits, NQ * GQ, D]``. PM: the same without D, in base 2. OUT:
    ``[B, NQ, H * GQ, D]``. A sink logit takes part in the softmax and has no value.
    """
    i_o = tl.program_id(0)
    i_b = i_o // (NQ * H * GQ)
    i_q = i_o // (H * GQ) % NQ
    i_hq = i_o % (H * GQ)
    row = (i_b * H + i_hq // GQ).to(tl.int64) * num_splits
    column = i_q * GQ + i_hq % GQ
    o_s = tl.arange(0, NSP)
    o_d = tl.program_id(1) * DB + tl.arange(0, DB)
    if PDL:
        tl.extra.cuda.gdc_wait()
    p_m = PM + (row + o_s) * (NQ * GQ) + column
    b_m = tl.load(p_m, mask=o_s < num_splits, other=NOTHING)
    top = tl.max(b_m, 0)
    if HAS_SINK:
        sink = tl.load(SINK_LOGITS + i_hq).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    b_w = tl.where(b_m > NOTHING / 2, tl.math.exp2(b_m - top), 0.0)
    total = tl.sum(b_w, 0)
    if HAS_SINK:
        total += tl.math.exp2(sink - top)
    if IS_ROTATED:
        COLUMNS: tl.constexpr = NQ * GQ
        o_k = tl.arange(0, D)
        b_r = weighted_sum(PO, PM, row, column, 0, num_packed, top, o_k, COLUMNS, D, 8)
        b_t = tl.load(MATRIX + o_d[:, None] * D + o_k[None, :])  # [DB, D]
        b_o = tl.sum(b_t * b_r[None, :], 1)
        b_o += weighted_sum(PO, PM, row, column, num_packed, num_splits, top, o_d, COLUMNS, D, 8)
    else:
        p_o = PO + ((row + o_s) * (NQ * GQ) + column)[:, None] * D + o_d[None, :]
        # [NSP, DB]; every split wrote its part, those without tokens zeros
        b_o = tl.load(p_o, mask=(o_s < num_splits)[:, None] & (o_d < D)[None, :], other=0.0)
        b_o = tl.sum(b_o * b_w[:, None], 0)
    b_o = b_o / tl.maximum(total, 1e-30)
    tl.store(OUT + i_o.to(tl.int64) * D + o_d, b_o.to(OUT.dtype.element_ty), mask=o_d < D)
