"""Perplexity through the cache, against the loss that transformers computes."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from kvbits.errors import CalibrationError
from kvbits.evaluation.divergence import measure, reference_logits
from kvbits.evaluation.perplexity import perplexity
from kvbits.plan import CachePlan


def test_full_precision_equals_the_loss_of_transformers(model, token_set):
    labels = token_set.input_ids.masked_fill(~token_set.counted, -100)
    with torch.no_grad():
        loss = model(token_set.input_ids, labels=labels).loss
    found = perplexity(model, token_set)
    assert found.nll_nats == pytest.approx(float(loss), rel=1e-6)  # ours is summed from float32
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert found.cache_bytes > 0


@pytest.mark.parametrize("bits", [2, 4])
def test_perplexity_is_that_of_the_divergence(model, token_set, bits):
    plan = CachePlan.uniform(model.config, bits, bits, "kivi")
    both = measure(model, plan, token_set, reference_logits(model, token_set))
    found = perplexity(model, token_set, plan)
    assert found.perplexity == pytest.approx(both.perplexity, rel=1e-6)
    assert (found.num_tokens, found.num_documents) == (both.num_tokens, both.num_documents)
    assert found.cache_bytes == both.cache_bytes


def test_two_bits_change_the_perplexity(model, token_set):
    """A forward pass that never reads the cache would give both the same number."""
    exact = perplexity(model, token_set).nll_nats
    packed = perplexity(model, token_set, CachePlan.uniform(model.config, 2, 2)).nll_nats
    with torch.no_grad():
        labels = token_set.input_ids.masked_fill(~token_set.counted, -100)
        cache = DynamicCache(config=model.config)
        vacuous = model(token_set.input_ids, labels=labels, past_key_values=cache).loss
    assert exact == pytest.approx(float(vacuous), rel=1e-6)
    assert abs(packed - exact) > 1e-3


def test_one_document_has_no_standard_error(model, token_set):
    one = token_set._replace(input_ids=token_set.input_ids[:1], counted=token_set.counted[:1])
    assert math.isnan(perplexity(model, one).nll_se)


def test_a_set_that_counts_nothing_is_refused(model, token_set):
    nothing = token_set._replace(counted=torch.zeros_like(token_set.counted))
    with pytest.raises(CalibrationError, match="must give finite losses on at least one token"):
        perplexity(model, nothing)
