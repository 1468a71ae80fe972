"""Forward KL and its companions, against direct computation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from evaluation_helpers import logits_of, one_layer

from kvbits.errors import CalibrationError
from kvbits.evaluation import reference as reference_module
from kvbits.evaluation.batching import batches
from kvbits.evaluation.divergence import forward_kl, measure, reference_logits
from kvbits.evaluation.token_set import TokenSet
from kvbits.plan import CachePlan

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def reference(model, token_set):
    return reference_logits(model, token_set)


def direct(model, plan, token_set):
    """Every number by its definition, one document at a time, nothing skipped or sliced."""
    documents = []
    for ids, counted in zip(token_set.input_ids, token_set.counted, strict=True):
        where = counted[1:]
        p = logits_of(model, ids[None])[0, :-1][where].double().log_softmax(-1)
        q = logits_of(model, ids[None], plan)[0, :-1][where].double().log_softmax(-1)
        true = ids[1:][where]
        agree = p.argmax(-1) == q.argmax(-1)
        flips = (p.argmax(-1) == true) != (q.argmax(-1) == true)
        nll = -q.gather(-1, true[:, None])[:, 0]
        documents.append(
            torch.stack([(p.exp() * (p - q)).sum(-1), agree.double(), flips.double(), nll])
        )
    return documents


@pytest.mark.parametrize("mode", ["per_token", "kivi"])
@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_equal_their_definitions(model, token_set, reference, bits, mode):
    plan = CachePlan.uniform(model.config, bits, bits, mode)
    found = measure(model, plan, token_set, reference)
    documents = direct(model, plan, token_set)
    every = torch.cat(documents, dim=1)
    # float32 log-probabilities: EPS * |log p| (about 7) each, against a KL of 1e-4 and more; and
    # packed codes may flip, as the two run in batches of other shapes
    assert found.kl_nats == pytest.approx(float(every[0].mean()), rel=2e-2)
    assert found.top1_agreement == pytest.approx(float(every[1].mean()), abs=2 / 200)
    assert found.flips == pytest.approx(float(every[2].mean()), abs=2 / 200)
    assert found.perplexity == pytest.approx(math.exp(float(every[3].mean())), rel=1e-4)
    assert (found.num_tokens, found.num_documents) == (149 + 39 + 10, 3)
    for value, document in zip(found.document_kl_nats, documents, strict=True):
        # KIVI packs nothing of 40 tokens; float32 leaves 1e-10 where the definition has 1e-15
        assert value == pytest.approx(float(document[0].mean()), rel=5e-2, abs=1e-9)


def test_full_precision_has_no_divergence_from_itself(model, token_set, reference):
    for plan in (None, CachePlan.uniform(model.config, 16, 16)):
        found = measure(model, plan, token_set, reference)
        assert (found.kl_nats, found.top1_agreement, found.flips) == (0.0, 1.0, 0.0)
        assert found.perplexity == found.perplexity_reference


def test_fewer_bits_diverge_more(model, token_set, reference):
    kl = [
        measure(model, CachePlan.uniform(model.config, bits, bits), token_set, reference).kl_nats
        for bits in (8, 4, 3, 2)
    ]
    assert 0 < kl[0] < kl[1] < kl[2] < kl[3]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_restarting_does_not_change_the_measurement(model, token_set, reference, layer):
    plan = one_layer(model, layer, (2, 4))
    restarted = measure(model, plan, token_set, reference)
    without = reference._replace(layer_inputs=(None,) * len(reference.layer_inputs))
    full = measure(model, plan, token_set, without)
    assert restarted._replace(seconds=0) == full._replace(seconds=0)


def test_only_counted_tokens_and_what_precedes_them_matter(model, token_set, reference):
    """Tokens after a document's last counted one are padding, whatever they hold."""
    other = token_set.input_ids.clone()
    other[1, 40:] = 5
    changed = token_set._replace(input_ids=other)
    plan = CachePlan.uniform(model.config, 2, 2)
    found = measure(model, plan, changed, reference_logits(model, changed))
    assert found.kl_nats == measure(model, plan, token_set, reference).kl_nats


def test_small_batches_and_slices_give_the_same_numbers(model, token_set, reference, monkeypatch):
    plan = one_layer(model, 0)
    expected = measure(model, plan, token_set, reference)
    monkeypatch.setattr("kvbits.evaluation.batching.MAX_LOGITS", 97 * 45)
    monkeypatch.setattr(reference_module, "_SLICE_VALUES", 97 * 7)
    assert len(list(batches(token_set, 97))) == 3
    found = measure(model, plan, token_set, reference_logits(model, token_set))
    # one packed layer of a float64 model: only float32 attention and softmax round
    assert found.kl_nats == pytest.approx(expected.kl_nats, rel=1e-4)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert found.num_tokens == expected.num_tokens


def test_forward_kl_keeps_its_digits_when_tiny():
    """KL is near 1e-7 at 8 bits, where a plain float32 sum would be nothing but rounding."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 4096, generator=generator, dtype=torch.float64)
    moved = logits + 3e-4 * torch.randn(64, 4096, generator=generator, dtype=torch.float64)
    p, q = logits.log_softmax(-1), moved.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert exact.median() < 1e-7
    log_p, log_q = logits.float().log_softmax(-1), moved.float().log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    # d is near 3e-4 and off by EPS * |log p| / 2, |log p| near 13: each term by a part in 400,
    # and 4096 terms average out
    assert float(((forward_kl(log_p, log_q) - exact) / exact).abs().max()) < 1 / 400
    assert float((plain - exact).abs().mean()) > EPS / 2


def test_forward_kl_of_distant_distributions():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.8])
    expected = 0.7 * math.log(7) + 0.2 * math.log(2) - 0.1 * math.log(8)
    assert float(forward_kl(p.log(), q.log())) == pytest.approx(expected, rel=1e-6)


def test_cache_bytes_count_the_layers_that_were_skipped(model, token_set, reference):
    found = measure(model, one_layer(model, 2, (8, 8)), token_set, reference)
    packed = measure(
        model, CachePlan.uniform(model.config, 8, 8), token_set, reference
    ).cache_bytes
    stock = measure(model, None, token_set, reference).cache_bytes
    assert found.cache_bytes * 3 == pytest.approx(2 * stock + packed)


@pytest.mark.parametrize("bits", [2, 8])
def test_a_set_too_large_to_keep_is_measured_chunk_by_chunk(
    model, token_set, reference, bits, monkeypatch
):
    """Without a reference both passes run side by side, here in chunks of 45 tokens."""
    plan = CachePlan.uniform(model.config, bits, bits, "kivi")
    expected = measure(model, plan, token_set, reference)
    assert measure(model, plan, token_set)._replace(seconds=0) == expected._replace(seconds=0)
    monkeypatch.setattr("kvbits.evaluation.batching.MAX_LOGITS", 97 * 45)
    found = measure(model, plan, token_set)
    assert found.num_tokens == expected.num_tokens
    # codes of later layers may flip with the shapes of the batches
    assert found.kl_nats == pytest.approx(expected.kl_nats, rel=2e-2)


def test_progress_counts_documents(model, token_set):
    done = []
    reference = reference_logits(model, token_set, progress=done.append)
    measure(model, None, token_set, reference, progress=done.append)
    assert sum(done) == 2 * token_set.num_documents


def test_a_reference_of_other_data_is_refused(model, token_set, reference):
    other = token_set._replace(input_ids=token_set.input_ids.flip(0))
    with pytest.raises(ValueError, match="reference must be of token set 'random'"):
        measure(model, None, other, reference)


def test_a_reference_too_large_is_refused_with_a_remedy(model, token_set):
    with pytest.raises(CalibrationError, match=r"max_bytes=1000, got \d+.*use fewer or shorter"):
        reference_logits(model, token_set, max_bytes=1000)


def test_the_bound_on_bytes_is_what_is_kept(model, token_set, reference):
    """Padding may make the estimate larger than what is kept, never smaller."""
    kept = sum(part.nbytes for part in reference.log_probs)
    kept += sum(part.nbytes for part in reference.layer_inputs)
    reference_logits(model, token_set, max_bytes=2 * kept)
    with pytest.raises(CalibrationError, match="max_bytes"):
        reference_logits(model, token_set, max_bytes=kept - 1)


def test_a_set_that_counts_nothing_is_refused(model, token_set):
    nothing = token_set._replace(counted=torch.zeros_like(token_set.counted))
    for call in (reference_logits, lambda model, nothing: measure(model, None, nothing)):
        with pytest.raises(CalibrationError, match="'random' must count at least one token, got"):
            call(model, nothing)


def test_logits_that_are_not_finite_are_refused(make_model, token_set):
    model = make_model(1)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(CalibrationError, match="the full-precision model must be finite"):
        reference_logits(model, token_set)


def test_documents_that_count_nothing_are_left_out(model, token_set):
    counted = token_set.counted.clone()
    counted[1] = False
    partly = TokenSet("partly", "text", "heldout", token_set.input_ids, counted)
    found = measure(model, None, partly, reference_logits(model, partly))
    assert (found.num_documents, found.num_tokens) == (2, 149 + 10)


def test_forward_kl_stays_finite_where_exp_overflows():
    log_p = torch.tensor([0.0, -200.0])
    log_q = torch.tensor([-200.0, 0.0])
    assert float(forward_kl(log_p, log_q)) == pytest.approx(200.0, rel=1e-6)
