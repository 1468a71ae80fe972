"""Perplexity through the cache, on sets of any size: nothing is kept but sums."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvbits.errors import CalibrationError
from kvbits.evaluation.batching import batches, counted_logits, vocab_size
from kvbits.evaluation.corpora import TokenSet
from kvbits.evaluation.statistics import clustered_mean
from kvbits.evaluation.stream import cache_nbytes, new_cache

if TYPE_CHECKING:
    from kvbits.plan import CachePlan


class Perplexity(NamedTuple):
    """Perplexity of a token set.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the counted tokens.
        nll_nats: that mean, in nats per token.
        nll_se: its standard error, clustered by document (here a window); nan for fewer than two.
        num_tokens: tokens that counted.
        num_documents: documents with at least one of them.
        seconds: wall time.
        cache_bytes: bytes of the caches of one batch, at most.
    """

    perplexity: float
    nll_nats: float
    nll_se: float
    num_tokens: int
    num_documents: int
    seconds: float
    cache_bytes: int


def perplexity(
    model: Any,
    token_set: TokenSet,
    plan: CachePlan | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a token set through a plan's cache, or at full precision for None.

    Windows do not see each other, so the value depends on their length and on nothing else of the
    cutting.

    Args:
        model: a causal language model of transformers.
        token_set: the documents.
        plan: the cache plan.
        progress: called with the number of documents done.

    Raises:
        CalibrationError: no token counts, or the logits are not finite.
    """
    started = time.perf_counter()
    sums = torch.zeros(token_set.num_documents, 2, dtype=torch.float64)
    most_bytes = 0
    for batch in batches(token_set, vocab_size(model)):
        cache = new_cache(model, plan)
        for cells, targets, logits in counted_logits(model, batch, plan, cache=cache):
            true = logits.gather(-1, targets.to(logits.device)[:, None])[:, 0].float()
            nll = torch.logsumexp(logits.float(), -1) - true
            values = torch.stack(
                [nll.double().cpu(), torch.ones(len(cells), dtype=torch.float64)], 1
            )
            sums.index_add_(0, batch.documents[cells], values)
        most_bytes = max(most_bytes, cache_nbytes(cache))
        if progress is not None:
            progress(len(batch.rows))
    sums = sums[sums[:, 1] > 0]
    if not len(sums) or not bool(torch.isfinite(sums.sum())):
        raise CalibrationError(
            f"token set {token_set.name!r} must give finite losses on at least one token, got "
            f"{len(sums)} documents with a sum of {float(sums.sum())}"
        )
    mean, error = clustered_mean(sums[:, 0].tolist(), sums[:, 1].tolist())
    return Perplexity(
        perplexity=math.exp(mean),
        nll_nats=mean,
        nll_se=error,
        num_tokens=int(sums[:, 1].sum()),
        num_documents=len(sums),
        seconds=time.perf_counter() - started,
        cache_bytes=most_bytes,
    )
