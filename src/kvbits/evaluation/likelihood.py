"""Log-likelihoods of documents through the cache: what ranks answers and what perplexity sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvbits.evaluation.batching import batches, counted_logits, vocab_size
from kvbits.evaluation.stream import cache_nbytes, new_cache
from kvbits.evaluation.token_set import Segment, padded_set

if TYPE_CHECKING:
    from kvbits.plan import CachePlan


class Likelihood(NamedTuple):
    """How likely a model finds the counted tokens of a document.

    Attributes:
        logprob: sum of their log-probabilities, in nats.
        num_tokens: how many they are.
        is_greedy: whether each is the most likely one where it stands.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


def likelihoods(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Sequence[Segment]],
    plan: CachePlan | None = None,
) -> tuple[list[Likelihood], int]:
    """Score documents by teacher forcing through a plan's cache, or at full precision for None.

    Each counted token is predicted as decoding token by token would predict it. The first token of
    a document never counts.

    Args:
        model: a causal language model of transformers.
        tokenizer: gives the padding token.
        documents: each a sequence of segments, of which some count.
        plan: the cache plan.

    Returns:
        One `Likelihood` a document, and the bytes of the caches of one batch, at most.

    Raises:
        ValueError: the logits are not finite.
    """
    token_set = padded_set(tokenizer, "documents", "text", "test", documents)
    sums = torch.zeros(len(documents), 3, dtype=torch.float64)
    most_bytes = 0
    for batch in batches(token_set, vocab_size(model)):
        cache = new_cache(model, plan)
        for cells, targets, logits in counted_logits(model, batch, plan, cache=cache):
            targets = targets.to(logits.device)
            logprobs = torch.log_softmax(logits.float(), -1).gather(-1, targets[:, None])[:, 0]
            misses = logits.argmax(-1) != targets
            values = [logprobs.double(), torch.ones_like(logprobs).double(), misses.double()]
            sums.index_add_(0, batch.documents[cells], torch.stack(values, 1).cpu())
        most_bytes = max(most_bytes, cache_nbytes(cache))
    if not bool(torch.isfinite(sums).all()):
        raise ValueError("model must give finite logits, got a log-likelihood that is not finite")
    found = [Likelihood(total, int(n), misses == 0) for total, n, misses in sums.tolist()]
    return found, most_bytes
