"""The second kernel of an attention call: splits become one output."""

from __future__ import annotations

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.common import LOG2E, NOTHING


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits(
    PO,
    PM,
    SINK_LOGITS,
    OUT,
    num_splits,
    H: tl.constexpr,
    GQ: tl.constexpr,
    NQ: tl.constexpr,
    D: tl.constexpr,
    DB: tl.constexpr,
    NSP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge partial outputs by their log-sum-exp; grid (B * NQ * H * GQ, channel blocks of DB).

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
    p_o = PO + ((row + o_s) * (NQ * GQ) + column)[:, None] * D + o_d[None, :]
    # [NSP, DB]; every split wrote its part, those without tokens zeros
    b_o = tl.load(p_o, mask=(o_s < num_splits)[:, None] & (o_d < D)[None, :], other=0.0)
    top = tl.max(b_m, 0)
    if HAS_SINK:
        sink = tl.load(SINK_LOGITS + i_hq).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    b_w = tl.where(b_m > NOTHING / 2, tl.math.exp2(b_m - top), 0.0)
    total = tl.sum(b_w, 0)
    if HAS_SINK:
        total += tl.math.exp2(sink - top)
    b_o = tl.sum(b_o * b_w[:, None], 0) / tl.maximum(total, 1e-30)
    tl.store(OUT + i_o.to(tl.int64) * D + o_d, b_o.to(OUT.dtype.element_ty), mask=o_d < D)
