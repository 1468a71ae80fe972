"""The reference attention, against one float64 softmax over what each query should see."""

from __future__ import annotations

import pytest
import torch
from naive_layer import HEADS, KEY_DIM, PLANS, random_states

from kvbits.attention import reference
from kvbits.attention.hf import dense_states
from kvbits.attention.reference import attend
from kvbits.attention.states import StatesHandle
from kvbits.cache.layer import PackedLayer
from kvbits.errors import UnsupportedModelError
from kvbits.testing import attend_naively

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
REPEATS = 2  # query heads per key/value head
SCALE = KEY_DIM**-0.5
# Sums of a few hundred float32 products of numbers up to 30; the oracle is float64.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def random_query(num_queries, rows=2, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS * REPEATS, num_queries, KEY_DIM, generator=generator)


def filled(plan, num_tokens, padding=(0, 0), rows=2, **settings):
    layer = PackedLayer(plan, **settings)
    layer.set_padding(padding)
    return layer, layer.update(*random_states(num_tokens, rows=rows))


def last_step(plan, num_tokens=200, num_queries=1, padding=(0, 0)):
    """States that the last queries see, and the same dense: decoded below, exact above."""
    layer, _ = filled(plan, num_tokens - num_queries, padding)
    keys, values = random_states(num_queries, seed=3)
    states = layer.update(keys, values)
    return states, states.dense("key"), states.dense("value")


def left_padding_mask(num_queries, num_tokens, padding):
    causal = torch.ones(num_queries, num_tokens, dtype=torch.bool).tril(num_tokens - num_queries)
    real = torch.arange(num_tokens) >= torch.tensor(padding)[:, None]
    return causal & real[:, None, None]


@every_plan
@pytest.mark.parametrize("num_queries", [1, 5])
def test_output_is_attention_over_the_decoded_states(plan, num_queries):
    states, keys, values = last_step(plan, num_queries=num_queries)
    query = random_query(num_queries)
    output = attend(query, states, None, SCALE)
    expected = attend_naively(query, keys, values, None, SCALE)
    torch.testing.assert_close(output.double(), expected, **CLOSE)
    assert output.dtype == query.dtype
    assert output.shape == (2, HEADS * REPEATS, num_queries, values.shape[-1])


@every_plan
@pytest.mark.parametrize("kind", ["boolean", "additive", "per head"])
@pytest.mark.parametrize("padding", [(0, 0), (3, 90)], ids=["even", "padded"])
def test_masks_and_padding_are_obeyed(plan, kind, padding):
    states, keys, values = last_step(plan, num_queries=4, padding=padding)
    query = random_query(4)
    mask = left_padding_mask(4, 200, padding)
    mask[:, :, :, 120:125] = False  # a hole that is not padding
    if kind == "per head":
        mask = mask.repeat(1, HEADS * REPEATS, 1, 1)
        mask[:, 1, :, 150:160] = False
    if kind == "additive":
        bias = torch.randn(2, 1, 4, 200, generator=torch.Generator().manual_seed(1))
        mask = bias.masked_fill(~mask, torch.finfo(torch.float32).min)
    output = attend(query, states, mask, SCALE)
    expected = attend_naively(query, keys, values, mask, SCALE)
    torch.testing.assert_close(output.double(), expected, **CLOSE)


@every_plan
def test_without_a_mask_padding_is_not_attended_to(plan):
    padding = (0, 60)
    states, keys, values = last_step(plan, num_queries=3, padding=padding)
    query = random_query(3)
    expected = attend_naively(query, keys, values, left_padding_mask(3, 200, padding), SCALE)
    output = attend(query, states, None, SCALE)
    torch.testing.assert_close(output.double(), expected, **CLOSE)


@pytest.mark.parametrize("plan", [PLANS[n] for n in ("token-4", "kivi-64-sinks", "head-groups")])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sink_logits_take_part(plan, softcap, with_sinks):
    states, keys, values = last_step(plan, num_queries=2)
    query = random_query(2)
    logits = torch.randn(HEADS * REPEATS, generator=torch.Generator().manual_seed(2))
    options = {"softcap": softcap, "sink_logits": 4 * logits if with_sinks else None}
    output = attend(query, states, None, SCALE, **options)
    expected = attend_naively(query, keys, values, None, SCALE, **options)
    torch.testing.assert_close(output.double(), expected, **CLOSE)
    plain = attend_naively(query, keys, values, None, SCALE)
    if softcap or with_sinks:
        assert (expected - plain).abs().max() > 0.01, "the option must matter for the test to tell"


@every_plan
@pytest.mark.parametrize("span_tokens", [1, 37])
def test_bounded_spans_give_the_same_result(plan, span_tokens, monkeypatch):
    for padding in ((0, 0), (3, 90)):
        _, states = filled(plan, 150, padding, quantize_prefill=True)
        query = random_query(150)
        whole = attend(query, states, None, SCALE)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "SPAN_TOKENS", span_tokens)
            assert max(s.stop - s.start for s in reference.spans(states)) <= span_tokens
            pieces = attend(query, states, None, SCALE)
        torch.testing.assert_close(pieces, whole, **CLOSE)


def test_many_queries_get_shorter_spans(monkeypatch):
    """Scores of all queries over one span stay below the limit, but a span is never tiny."""
    _, states = filled(next(iter(PLANS.values())), 150, (0, 0), quantize_prefill=True)
    query = random_query(150)
    whole = attend(query, states, None, SCALE)
    monkeypatch.setattr(reference, "MAX_SCORES", 100 * 150)
    lengths = [s.stop - s.start for s in reference.spans(states, num_rows=150)]
    assert max(lengths) == 100
    assert max(s.stop - s.start for s in reference.spans(states, num_rows=10**6)) == 64
    torch.testing.assert_close(attend(query, states, None, SCALE), whole, **CLOSE)


@every_plan
def test_spans_cover_every_position_once(plan):
    for padding in ((0, 0), (3, 90), (150, 149)):
        _, states = filled(plan, 150, padding, quantize_prefill=True)
        covered = [p for s in reference.spans(states) for p in range(s.start, s.stop)]
        assert covered == list(range(max(states.row_lengths)))


@every_plan
def test_memory_of_a_long_context_is_bounded_by_the_span(plan, monkeypatch):
    """No read decodes more than ``SPAN_TOKENS`` tokens at a time."""
    layer, _ = filled(plan, 400)
    states = layer.update(*random_states(1))
    widths = []
    for store in (*layer.stores("key"), *layer.stores("value")):
        real = store.read

        def watched(start, stop, real=real):
            widths.append(stop - start)
            return real(start, stop)

        monkeypatch.setattr(store, "read", watched)
    monkeypatch.setattr(reference, "SPAN_TOKENS", 100)
    attend(random_query(1), states, None, SCALE)
    assert widths
    assert max(widths) <= 100


@every_plan
def test_queries_that_may_see_nothing_get_zeros(plan):
    states, *_ = last_step(plan, num_queries=2)
    mask = torch.ones(2, 1, 2, 200, dtype=torch.bool)
    mask[1, :, 0] = False
    for each in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        output = attend(random_query(2), states, each, SCALE)
        assert output.isfinite().all()
        assert (output[1, :, 0] == 0).all()
        assert (output[0] != 0).all()


@every_plan
@pytest.mark.parametrize("padding", [(0, 0), (4, 110)], ids=["even", "padded"])
def test_a_prefill_in_chunks_of_any_size_equals_one_token_at_a_time(plan, padding):
    """With ``quantize_prefill`` a query sees what decoding would have shown it, no more."""
    keys, values = random_states(150)
    query = random_query(150)

    def run(chunks, **settings):
        layer = PackedLayer(plan, **settings)
        layer.set_padding(padding)
        outputs, start = [], 0
        for count in chunks:
            part = slice(start, start + count)
            states = layer.update(keys[:, :, part], values[:, :, part])
            outputs.append(attend(query[:, :, part], states, None, SCALE))
            start += count
        output = torch.cat(outputs, 2)
        for row, pad in enumerate(padding):
            output[row, :, :pad] = 0
        return output

    steps = run([1] * 150)
    for chunks in ([150], [64, 64, 22], [100, 1, 1, 1, 40, 7]):
        torch.testing.assert_close(run(chunks, quantize_prefill=True), steps, **CLOSE)


@pytest.mark.parametrize("name", ["token-2", "kivi-32"])
def test_an_exact_prefill_differs_from_decoding(name):
    """The trap: without ``quantize_prefill`` one forward says nothing about the packed cache."""
    _, states = filled(PLANS[name], 100)
    query = random_query(100)
    exact = attend_naively(query, *random_states(100), None, SCALE)
    torch.testing.assert_close(attend(query, states, None, SCALE).double(), exact, **CLOSE)
    _, states = filled(PLANS[name], 100, quantize_prefill=True)
    assert (attend(query, states, None, SCALE) - exact).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries_are_computed_in_float32(dtype):
    states, keys, values = last_step(PLANS["kivi-32"])
    query = random_query(1).to(dtype)
    output = attend(query, states, None, SCALE)
    expected = attend_naively(query, keys, values, None, SCALE)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_large_scores_do_not_overflow():
    states, keys, values = last_step(PLANS["token-8-groups"])
    query = 1000 * random_query(1)
    output = attend(query, states, None, SCALE)
    expected = attend_naively(query, keys, values, None, SCALE)
    assert output.isfinite().all()
    torch.testing.assert_close(output.double(), expected, rtol=1e-2, atol=1e-2)


def test_dense_tensors_take_the_same_path():
    keys, values = random_states(50)
    query = random_query(6)
    output = attend(query, dense_states(keys, values, query), None, SCALE)
    expected = attend_naively(query, keys, values, None, SCALE)
    torch.testing.assert_close(output.double(), expected, **CLOSE)


# ----- the handle


@every_plan
def test_a_handle_looks_like_the_dense_tensor_and_becomes_it(plan):
    states, keys, values = last_step(plan, num_queries=1)
    for side, dense in (("key", keys), ("value", values)):
        handle = StatesHandle(states, side, torch.bfloat16)
        assert isinstance(handle, torch.Tensor)
        assert handle.shape == dense.shape
        assert handle.dtype == torch.bfloat16
        assert torch.equal(handle.dense(), dense.bfloat16())
        assert torch.equal(handle * 1, dense.bfloat16())
        assert torch.equal(torch.cat((handle, handle), 2)[:, :, :200], dense.bfloat16())
        assert repr(handle) == (
            f"StatesHandle({side}, shape={tuple(dense.shape)}, dtype=torch.bfloat16)"
        )


@every_plan
def test_any_slice_of_positions_can_be_materialised(plan):
    for padding in ((0, 0), (3, 90)):
        states, *both = last_step(plan, padding=padding)
        for side, dense in zip(("key", "value"), both, strict=True):
            for start, stop in ((0, 1), (0, 200), (2, 60), (64, 130), (150, 200), (199, 200)):
                part = states.dense(side, start, stop)
                assert torch.equal(part, dense[:, :, start:stop])


def test_a_handle_that_differs_by_query_cannot_be_dense():
    _, states = filled(PLANS["token-4"], 150, quantize_prefill=True)
    with pytest.raises(UnsupportedModelError, match=r"call kvbits.enable\(model\) first"):
        StatesHandle(states, "key", torch.float32).dense()
