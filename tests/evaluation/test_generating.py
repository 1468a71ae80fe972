"""Texts of a batch hold nothing but what each prompt's own generation says."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kvbits.evaluation.generating import complete, own_defaults
from kvbits.evaluation.stream import new_cache

PROMPTS = [[0, 50, 60], [0, 70], [0, 80, 90, 100, 110]]


def texts(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    with own_defaults(model):
        return complete(model, tokenizer, prompts, new_cache(model, None), max_new_tokens=12)


@pytest.mark.parametrize("as_list", [False, True])
def test_rows_that_end_early_are_not_filled_with_text(tiny, monkeypatch, as_list):
    """Llama 3 has no padding token: with token 0 in its place, answers ended in "!!!!"."""
    model, tokenizer = tiny
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    whole = texts(model, tokenizer, PROMPTS[:1])[0]
    end = tokenizer(whole, add_special_tokens=False)["input_ids"][4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end] if as_list else end)
    monkeypatch.setattr(model.config, "pad_token_id", 66)  # a letter
    single = [texts(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert len(single[0]) < len(whole)
    assert len({len(text) for text in single}) > 1
    assert texts(model, tokenizer, PROMPTS) == single
