"""What a model answers to a batch of items, through the cache of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvbits.evaluation.benchmarks.base import Generate, Item, Response
from kvbits.evaluation.benchmarks.prompts import Prompter
from kvbits.evaluation.generating import complete
from kvbits.evaluation.likelihood import likelihoods
from kvbits.evaluation.stream import attention_for, cache_nbytes, new_cache

if TYPE_CHECKING:
    from kvbits.plan import CachePlan


class Engine:
    """Answers batches, each on a new cache, inside `own_defaults` of the model.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        plan: The cache plan; None is full precision.
        prompter: Makes tokens of prompts.
        quantize_prefill: Whether prompts of generation, too, see decoded states.

    Attributes:
        cache_bytes: Bytes of a batch's cache so far, at most.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: CachePlan | None,
        prompter: Prompter,
        quantize_prefill: bool,
    ) -> None:
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.prompter, self.quantize_prefill = prompter, quantize_prefill
        self.cache_bytes = 0

    def answer(self, batch: Sequence[Item]) -> list[Response]:
        """Answer items whose requests are of one kind, as `kind_of` tells."""
        asked = [item.request for item in batch]
        generates = [request for request in asked if isinstance(request, Generate)]
        if generates:  # then all are; batches are of one kind
            return [*self._texts(generates)]
        documents = [
            self.prompter.documents(request)
            for request in asked
            if not isinstance(request, Generate)
        ]
        flat = [document for each in documents for document in each]
        found, nbytes = likelihoods(self.model, self.tokenizer, flat, self.plan)
        self.cache_bytes = max(self.cache_bytes, nbytes)
        parts = iter(found)
        return [tuple(next(parts) for _ in each) for each in documents]

    def _texts(self, requests: Sequence[Generate]) -> list[str]:
        most, stop = requests[0].max_new_tokens, requests[0].stop
        prompts = [self.prompter.ids(request.prompt, most) for request in requests]
        cache = new_cache(self.model, self.plan, quantize_prefill=self.quantize_prefill)
        with attention_for(self.model, self.plan):
            texts = complete(
                self.model, self.tokenizer, prompts, cache, max_new_tokens=most, stop=stop
            )
        self.cache_bytes = max(self.cache_bytes, cache_nbytes(cache))
        return [_before(text, stop) for text in texts]


def _before(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop strings."""
    for each in stop:
        text = text.partition(each)[0]
    return text
