"""How far a plan moves a model's predictions: forward KL, top-1 agreement, flips and perplexity.

KL(full precision || quantized) of the next-token distribution, in nats, is the tuner's signal: it
needs no labels, has little noise, and isolated layers' KLs nearly add up. Everything is measured
through `stream.stream_logits`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvbits.evaluation.batching import (
    DocumentBatch,
    batches,
    counted_cells,
    counted_logits,
    vocab_size,
)
from kvbits.evaluation.positions import PositionBin, PositionSums
from kvbits.evaluation.reference import (
    Progress,
    Reference,
    check_counted,
    check_finite,
    reference_logits,
    slices,
)
from kvbits.evaluation.statistics import clustered_mean
from kvbits.evaluation.stream import (
    cache_nbytes,
    first_quantized_layer,
    new_cache,
    skipped_nbytes,
)
from kvbits.evaluation.token_set import TokenSet

if TYPE_CHECKING:
    from kvbits.plan import CachePlan


class Divergence(NamedTuple):
    """Distance of a plan from full precision over the counted tokens of a set.

    Attributes:
        kl_nats: mean forward KL per token.
        kl_se: its standard error, clustered by document; nan for fewer than two documents.
        top1_agreement: share of tokens where both models' likeliest next token is the same.
        flips: share of tokens where exactly one of the two models' likeliest next token is the
            true one.
        perplexity: of the text under the plan.
        perplexity_reference: of the text at full precision.
        num_tokens: predictions that counted.
        num_documents: documents with at least one of them.
        seconds: wall time.
        cache_bytes: bytes of the caches of one batch, at most.
        document_kl_nats: mean KL of each document.
        document_tokens: counted predictions of each document.
        excess_nll: mean negative log-likelihood of the true tokens under the plan minus that at
            full precision, nats per token; the logarithm of the ratio of the perplexities.
        excess_nll_se: its standard error, paired and clustered by document.
        positions: forward KL by the number of tokens in front of a prediction.
    """

    kl_nats: float
    kl_se: float
    top1_agreement: float
    flips: float
    perplexity: float
    perplexity_reference: float
    num_tokens: int
    num_documents: int
    seconds: float
    cache_bytes: int = 0
    document_kl_nats: tuple[float, ...] = ()
    document_tokens: tuple[int, ...] = ()
    excess_nll: float = 0.0
    excess_nll_se: float = math.nan
    positions: tuple[PositionBin, ...] = ()


def measure(
    model: Any,
    plan: CachePlan | None,
    token_set: TokenSet,
    reference: Reference | None = None,
    *,
    progress: Progress | None = None,
) -> Divergence:
    """Measure how far a plan is from full precision on a token set.

    To compare many plans on a set, make its reference once: layers before a plan's first quantized
    layer are then not run again. Without one, full precision runs alongside and nothing is kept,
    so that the set may be of any size.

    Args:
        model: a causal language model of transformers; the one that made the reference.
        plan: the plan to measure; None measures full precision against itself.
        token_set: the set; the one that made the reference.
        reference: from `reference_logits`.
        progress: called with the number of documents done.

    Raises:
        CalibrationError: the logits are not finite, or nothing counts.
    """
    if reference is not None and reference.checksum != token_set.checksum:
        raise ValueError(
            f"reference must be of token set {token_set.name!r} ({token_set.checksum[:12]}), "
            f"got {reference.checksum[:12]}; make it with reference_logits(model, token_set)"
        )
    check_counted(token_set)
    started = time.perf_counter()
    sums = torch.zeros(token_set.num_documents, len(_Sums._fields), dtype=torch.float64)
    positions = PositionSums(*token_set.input_ids.shape)
    most_bytes = 0
    for index, batch in enumerate(batches(token_set, vocab_size(model))):
        inputs = None if reference is None else reference.layer_inputs[index]
        start = 0 if plan is None or inputs is None else first_quantized_layer(plan)
        cache = new_cache(model, plan)
        new = counted_logits(
            model, batch, plan, start_layer=start, layer_inputs=inputs, cache=cache
        )
        old = _log_probs(model, batch, None if reference is None else reference.log_probs[index])
        for (cells, targets, logits), log_probs in zip(new, old, strict=True):
            values, documents = _compare(log_probs, targets, logits), batch.documents[cells]
            sums.index_add_(0, documents, values)
            positions.add(documents, batch.positions[cells], _Sums(*values.unbind(1)).kl)
        held = cache_nbytes(cache)
        if plan is not None:
            held += skipped_nbytes(model, plan, start, batch.input_ids.numel())
        most_bytes = max(most_bytes, held)
        if progress is not None:
            progress(len(batch.rows))
    check_finite(sums, "the model under the plan")
    return _summary(sums, positions, time.perf_counter() - started, most_bytes)


def _log_probs(
    model: Any, batch: DocumentBatch, stored: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """Yield the full-precision log-probabilities of each chunk's predictions, [M, V]."""
    if stored is None:
        for _, _, logits in counted_logits(model, batch):
            yield logits.float().log_softmax(-1)
        return
    for cells in counted_cells(batch):
        yield stored[cells]


class _Sums(NamedTuple):
    """Columns of the per-document sums: one number per counted prediction, added up."""

    kl: Any
    agreement: Any
    flip: Any
    nll: Any
    nll_reference: Any
    count: Any


def _compare(log_probs: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the `_Sums` columns of each prediction, float64 [M, 6], in slices of bounded size."""
    rows = []
    for part in slices(len(targets), logits.shape[-1]):
        new = logits[part].float().log_softmax(-1)
        old = log_probs[part].to(new.device)
        true = targets[part].to(new.device)[:, None]
        best_old, best_new = old.argmax(-1), new.argmax(-1)
        rows.append(
            _Sums(
                kl=forward_kl(old, new),
                agreement=best_old == best_new,
                flip=(best_old == true[:, 0]) != (best_new == true[:, 0]),
                nll=-new.gather(-1, true)[:, 0],
                nll_reference=-old.gather(-1, true)[:, 0],
                count=torch.ones_like(best_old),
            )
        )
    return torch.cat([torch.stack([x.double().cpu() for x in row], dim=1) for row in rows])


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) over the last axis, in nats, summed in float64.

    sum(p * (exp(d) - 1 - d)) with d = log q - log p: equal to sum(-p * d) for distributions, but
    no term is negative, and errors of the two normalisations cancel to second order. At 8 bits KL
    is near 1e-7, which the plain sum would lose in its own float32 rounding.

    Args:
        log_p: ``[..., V]`` natural logarithms of p.
        log_q: ``[..., V]`` natural logarithms of q.
    """
    difference = log_q - log_p
    near = log_p.exp() * (torch.expm1(difference) - difference)
    far = log_q.exp() - log_p.exp() * (1 + difference)  # where exp(d) may overflow
    return torch.where(difference < 1, near, far).sum(-1, dtype=torch.float64)


def _summary(
    sums: torch.Tensor, positions: PositionSums, seconds: float, most_bytes: int
) -> Divergence:
    column = _Sums(*sums[sums[:, -1] > 0].unbind(1))
    kl, kl_se = clustered_mean(column.kl.tolist(), column.count.tolist())
    excess = (column.nll - column.nll_reference).tolist()
    excess_nll, excess_nll_se = clustered_mean(excess, column.count.tolist())
    total = float(column.count.sum())
    return Divergence(
        kl_nats=kl,
        kl_se=kl_se,
        top1_agreement=float(column.agreement.sum()) / total,
        flips=float(column.flip.sum()) / total,
        perplexity=math.exp(float(column.nll.sum()) / total),
        perplexity_reference=math.exp(float(column.nll_reference.sum()) / total),
        num_tokens=int(total),
        num_documents=len(column.count),
        seconds=seconds,
        cache_bytes=most_bytes,
        document_kl_nats=tuple((column.kl / column.count).tolist()),
        document_tokens=tuple(int(n) for n in column.count.tolist()),
        excess_nll=excess_nll,
        excess_nll_se=excess_nll_se,
        positions=positions.bins(),
    )


__all__ = ["Divergence", "Reference", "forward_kl", "measure", "reference_logits"]
