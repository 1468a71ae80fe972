"""Greedy generation of left-padded batches through a cache, whatever the model's own defaults."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from kvbits.calibration.placement import input_device


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its completion holds one of the stop strings."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length
        # a token holds at least one byte, so the newest end of a string lies within these
        self.num_tokens = max(len(each.encode()) for each in stop) + 1

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_length :][:, -self.num_tokens :]
        texts = self.tokenizer.batch_decode(new)
        ends = [any(each in text for each in self.stop) for text in texts]
        return torch.tensor(ends, device=input_ids.device)


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    cache: Any,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> list[str]:
    """Complete prompts greedily, as one left-padded batch.

    Args:
        model: a causal language model of transformers, inside `own_defaults`.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt.
        cache: an empty cache of the model.
        max_new_tokens: tokens of an answer at most.
        stop: strings after which an answer ends.

    Returns:
        The texts; a stop string may stand in them, with what its last token brought along.
    """
    width = max(map(len, prompts))
    padding = _padding_token(model, tokenizer)
    ids = torch.full((len(prompts), width), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ends = _end_tokens(model, tokenizer)
    criteria = [_StopStrings(tokenizer, stop, width)] if stop else []
    with torch.no_grad():
        output = model.generate(
            ids.to(input_device(model)),
            attention_mask=mask.to(input_device(model)),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            eos_token_id=ends,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    # rows that ended early are filled up, by a token that may be one of text
    rows = [_before_end(row, ends) for row in output[:, width:].tolist()]
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts


@contextmanager
def own_defaults(model: Any) -> Iterator[None]:
    """Set the model's generation config aside: Qwen's, for one, penalises repetition."""
    former = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=former.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = former


def _padding_token(model: Any, tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, model.config.get_text_config().pad_token_id):
        if token is not None and token >= 0:
            return int(token)
    return 0


def _end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    own = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if own is None else own
    return [found] if isinstance(found, int) else found


def _before_end(row: list[int], ends: list[int] | None) -> list[int]:
    """The tokens before the first that ends a text."""
    return list(itertools.takewhile(lambda token: token not in (ends or ()), row))
