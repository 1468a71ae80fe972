"""The measured path is the deployed path: teacher forcing in chunks equals decoding one by one."""

from __future__ import annotations

import pytest
import torch
from evaluation_helpers import logits_of, one_layer
from transformers import DynamicCache

from kvbits.attention.hf import is_enabled
from kvbits.evaluation.stream import cache_nbytes, new_cache, stream_logits
from kvbits.plan import CachePlan

EPS = torch.finfo(torch.float32).eps
MODES = ("per_token", "kivi")


@pytest.mark.parametrize("chunk_tokens", [7, 64, 150])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 2])
def test_chunks_of_any_size_equal_one_token_decoding(model, input_ids, layer, mode, chunk_tokens):
    """One packed layer in a float64 model: its codes cannot flip, only float32 attention rounds.

    Scores, softmax, weighted sum and the merge of parts round once each, relative to the output:
    about 4 EPS, with a factor of two for what the rest of the network makes of it.
    """
    plan = one_layer(model, layer, mode=mode)
    expected = logits_of(model, input_ids, plan, chunk_tokens=1)
    found = logits_of(model, input_ids, plan, chunk_tokens=chunk_tokens)
    assert (found - expected).abs().max() <= 8 * EPS * expected.abs().max()


@pytest.mark.parametrize("chunk_tokens", [7, 64, 150])
def test_chunks_of_any_size_equal_one_token_decoding_at_full_precision(
    model, input_ids, chunk_tokens
):
    expected = logits_of(model, input_ids, chunk_tokens=1)
    found = logits_of(model, input_ids, chunk_tokens=chunk_tokens)
    # float64 throughout: a thousand roundings at most along any path
    assert (found - expected).abs().max() <= 1000 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("mode", MODES)
def test_chunk_size_hardly_matters_when_every_layer_is_packed(model, input_ids, mode):
    """Rounding may flip single codes of later layers; that is noise beside what 2 bits cost."""
    plan = CachePlan.uniform(model.config, 2, 2, mode)
    one = logits_of(model, input_ids, plan, chunk_tokens=1)
    noise = (logits_of(model, input_ids, plan, chunk_tokens=64) - one).pow(2).mean()
    cost = (logits_of(model, input_ids) - one).pow(2).mean()
    assert noise < 1e-3 * cost


@pytest.mark.parametrize("mode", MODES)
def test_two_bits_differ_from_sixteen(model, input_ids, mode):
    exact = logits_of(model, input_ids)
    packed = logits_of(model, input_ids, CachePlan.uniform(model.config, 2, 2, mode))
    assert (packed - exact).abs().max() > 0.05 * exact.abs().max()


def test_a_single_forward_with_exact_prefill_sees_no_quantization(model, input_ids):
    """The trap this module exists for: at 2 bits, one pass over the text changes nothing."""
    cache = CachePlan.uniform(model.config, 2, 2).new_cache(model)
    with torch.no_grad():
        vacuous = model(input_ids, past_key_values=cache, use_cache=True).logits
    exact = logits_of(model, input_ids)
    assert torch.equal(vacuous, exact)


def test_sixteen_bits_equal_the_stock_cache_bit_for_bit(model, input_ids):
    with torch.no_grad():
        stock = model(input_ids, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(logits_of(model, input_ids, CachePlan.uniform(model.config, 16, 16)), stock)
    assert torch.equal(logits_of(model, input_ids), stock)


def test_only_kept_positions_are_returned(model, input_ids):
    keep = torch.zeros(150, dtype=torch.bool)
    keep[[3, 70, 71]] = True
    plan = CachePlan.uniform(model.config, 4, 2)
    found = logits_of(model, input_ids, plan, chunk_tokens=32, keep=keep)
    expected = logits_of(model, input_ids, plan, chunk_tokens=32)[:, keep]
    assert found.shape == (2, 3, model.config.vocab_size)
    # attention is float32, and its matrix products have other shapes: rounding of logits near 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_run_after_the_last_kept_position(model, input_ids):
    keep = torch.arange(150) == 40
    cache = new_cache(model, None)
    logits_of(model, input_ids, chunk_tokens=32, keep=keep, cache=cache)
    assert cache.get_seq_length() == 41


def test_right_padding_changes_nothing_that_counts(model, input_ids):
    other = input_ids.clone()
    other[:, 100:] = 0
    plan = CachePlan.uniform(model.config, 2, 2, "kivi")
    assert torch.equal(
        logits_of(model, input_ids, plan)[:, :100], logits_of(model, other, plan)[:, :100]
    )


def test_the_model_has_its_attention_back_between_chunks_and_after(model, input_ids):
    former = model.config._attn_implementation
    stream = stream_logits(
        model, input_ids, CachePlan.uniform(model.config, 4, 4), chunk_tokens=50
    )
    next(stream)
    assert not is_enabled(model)
    stream.close()
    assert model.config._attn_implementation == former


def test_streams_of_two_plans_can_be_interleaved(model, input_ids):
    plans = [CachePlan.uniform(model.config, bits, bits) for bits in (2, 4)]
    streams = [stream_logits(model, input_ids, plan, chunk_tokens=50) for plan in plans]
    parts = [[next(stream) for stream in streams] for _ in range(3)]
    for index, plan in enumerate(plans):
        found = torch.cat([part[index] for part in parts], dim=1)
        assert torch.equal(found, logits_of(model, input_ids, plan, chunk_tokens=50))


def test_cache_bytes_of_stock_and_packed_caches(model, input_ids):
    caches = {
        bits: new_cache(model, bits and CachePlan.uniform(model.config, bits, bits))
        for bits in (None, 8, 2)
    }
    for bits, cache in caches.items():
        plan = bits and CachePlan.uniform(model.config, bits, bits)
        logits_of(model, input_ids, plan, cache=cache)
    sizes = {bits: cache_nbytes(cache) for bits, cache in caches.items()}
    assert (
        sizes[None] == 3 * 2 * 2 * 150 * 64 * 8
    )  # layers, sides, rows, tokens, channels, float64
    assert sizes[2] < sizes[8] < sizes[None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"keep": torch.ones(3, dtype=torch.bool)}, r"keep must have shape \[150\].*got \[3\]"),
        ({"start_layer": 1}, "start_layer must be 0 without layer_inputs"),
    ],
)
def test_bad_arguments_are_refused(model, input_ids, settings, message):
    with pytest.raises(ValueError, match=message):
        logits_of(model, input_ids, **settings)


def test_empty_input_is_refused(model):
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\] with T > 0"):
        logits_of(model, torch.zeros(1, 0, dtype=torch.int64))
