"""Log-likelihoods of documents through the cache: what ranks answers and what perplexity sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvbits.evaluation.batching import batches, counted_logits, max_batch_tokens, vocab_size
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
    a document never counts. Documents of which the last token alone counts, and that differ in it
    alone, such as the letters of a choice, are run once.

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
    groups = _groups(documents)
    sizes = torch.tensor([len(group) for group in groups])
    last = torch.tensor([document[-1].ids[-1] for document in documents])
    token_set = padded_set(
        tokenizer, "documents", "text", "test", [documents[group[0]] for group in groups]
    )
    sums = torch.zeros(len(documents), 3, dtype=torch.float64)
    most_bytes = 0
    for batch in batches(token_set, vocab_size(model), max_batch_tokens(model)):
        cache = new_cache(model, plan)
        for cells, targets, logits in counted_logits(model, batch, plan, cache=cache):
            rows = batch.documents[cells]
            pairs = [(i, n) for i, row in enumerate(rows.tolist()) for n in groups[row]]
            at, numbers = torch.tensor(pairs).T
            tokens = torch.where(sizes[rows[at]] > 1, last[numbers], targets[at])
            sums.index_add_(0, numbers, _outcomes(logits, at, tokens))
        most_bytes = max(most_bytes, cache_nbytes(cache))
    if not bool(torch.isfinite(sums).all()):
        raise ValueError("model must give finite logits, got a log-likelihood that is not finite")
    found = [Likelihood(total, int(n), misses == 0) for total, n, misses in sums.tolist()]
    return found, most_bytes


def _outcomes(logits: torch.Tensor, at: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability, 1, and whether it is not the most likely one, of token ``tokens[i]`` at
    position ``at[i]``: ``[N, 3]``, on the CPU."""
    at, tokens = at.to(logits.device), tokens.to(logits.device)
    logprobs = torch.log_softmax(logits.float(), -1)[at, tokens].double()
    misses = logits.argmax(-1)[at] != tokens
    return torch.stack([logprobs, torch.ones_like(logprobs), misses.double()], 1).cpu()


def _groups(documents: Sequence[Sequence[Segment]]) -> list[list[int]]:
    """Numbers of the documents that are run as one."""
    found: dict[Any, list[int]] = {}
    for number, (*before, end) in enumerate(documents):
        is_single = len(end.ids) == 1 and not any(segment.is_counted for segment in before)
        key = tuple(token for segment in before for token in segment.ids) if is_single else number
        found.setdefault(key, []).append(number)
    return list(found.values())
