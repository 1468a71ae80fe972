"""The decode loop against ``model.generate``, and its own promises."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import DynamicCache

import kvbits
from kvbits import generation
from kvbits.cache.hf import QuantizedCache, watch_padding
from kvbits.codecs import Affine, Identity
from kvbits.errors import CalibrationError, UnsupportedModelError
from kvbits.generation import Sampling, draw, generate
from kvbits.layer_plan import LayerPlan
from kvbits.testing import tiny_model

PLAN = LayerPlan.uniform(Affine(bits=8), Affine(bits=4, group_size=16), residual_length=6)
NEW = 12


@functools.cache
def shared_model(family="llama"):
    return tiny_model(family, num_hidden_layers=2)


@pytest.fixture
def model():
    model = shared_model()
    yield model
    kvbits.disable(model)


def new_cache(model, kind, **settings):
    if kind == "stock":
        return DynamicCache(config=model.config)
    watch_padding(model)
    return QuantizedCache([PLAN] * model.config.num_hidden_layers, model.config, **settings)


def prompt(rows=3, num_tokens=20, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (rows, num_tokens), generator=generator)


def padded(input_ids, padding=(0, 7, 19)):
    mask = torch.ones_like(input_ids)
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    return mask


def stock_tokens(model, input_ids, cache, mask=None, chunk=None):
    made = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        prefill_chunk_size=chunk,
    )
    return made[:, input_ids.shape[1] :]


@pytest.mark.parametrize("kind", ["stock", "packed"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("chunk", [None, 6], ids=["one prompt", "chunks"])
def test_greedy_tokens_are_those_of_model_generate(model, kind, is_padded, chunk):
    input_ids = prompt()
    mask = padded(input_ids) if is_padded else None
    made = generate(
        model,
        input_ids,
        new_cache(model, kind),
        max_new_tokens=NEW,
        attention_mask=mask,
        prefill_chunk=chunk,
    )
    kvbits.enable(model)
    expected = stock_tokens(model, input_ids, new_cache(model, kind), mask, chunk)
    assert torch.equal(made.tokens, expected)
    assert made.num_steps == NEW - 1
    assert not made.is_captured
    assert made.decode_seconds > 0


@pytest.mark.parametrize("kind", ["stock", "packed"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["even", "padded"])
def test_a_second_turn_continues_the_cache(model, kind, is_padded):
    """The cache holds every token but the last; the mask covers what it holds."""
    first, cache = prompt(), new_cache(model, kind)
    mask = padded(first) if is_padded else torch.ones_like(first)
    made = generate(model, first, cache, max_new_tokens=NEW, attention_mask=mask).tokens
    turn = torch.cat((made[:, -1:], prompt(seed=2)), 1)
    width = first.shape[1] + NEW - 1 + turn.shape[1]
    mask = torch.nn.functional.pad(mask, (0, width - mask.shape[1]), value=1)
    second = generate(model, turn, cache, max_new_tokens=NEW, attention_mask=mask).tokens
    whole = torch.cat((first, made[:, :-1], turn), 1)
    assert cache.get_seq_length() == width + NEW - 1
    if kind == "packed":  # decoded while new, so a prompt of all tokens sees something else
        return
    expected = generate(
        model, whole, new_cache(model, kind), max_new_tokens=NEW, attention_mask=mask
    )
    assert torch.equal(second, expected.tokens)


def test_padding_is_not_seen_by_layers_of_transformers_own(model):
    """A plan may leave layers exact, and those need the mask in every step."""
    watch_padding(model)
    plans = [PLAN, LayerPlan.uniform(Identity(), Identity())]
    input_ids = prompt()
    mask = padded(input_ids)
    made = generate(
        model,
        input_ids,
        QuantizedCache(plans, model.config),
        max_new_tokens=NEW,
        attention_mask=mask,
    )
    kvbits.enable(model)
    expected = stock_tokens(model, input_ids, QuantizedCache(plans, model.config), mask)
    assert torch.equal(made.tokens, expected)


def test_rows_end_at_their_stop_token(model):
    input_ids = prompt()
    free = generate(model, input_ids, new_cache(model, "packed"), max_new_tokens=NEW).tokens
    stops = sorted({int(free[0, 2]), int(free[1, 5])})
    made = generate(
        model,
        input_ids,
        new_cache(model, "packed"),
        max_new_tokens=NEW,
        stop_ids=stops,
        pad_id=96,
    ).tokens
    ends = []
    for row, tokens in enumerate(free.tolist()):
        end = next((i for i, token in enumerate(tokens) if token in stops), NEW - 1)
        ends.append(end)
        width = min(end + 1, made.shape[1])
        assert made[row, :width].tolist() == tokens[:width]
        assert (made[row, width:] == 96).all()
    assert made.shape[1] == max(ends) + 1


def test_stopping_at_the_first_token_makes_one(model):
    input_ids = prompt(rows=1)
    free = generate(model, input_ids, new_cache(model, "packed"), max_new_tokens=NEW).tokens
    made = generate(
        model,
        input_ids,
        new_cache(model, "packed"),
        max_new_tokens=NEW,
        stop_ids=[int(free[0, 0])],
    ).tokens
    assert made.tolist() == [[int(free[0, 0])]]


@pytest.mark.parametrize("new", [1, 2, NEW])
def test_every_token_is_streamed_in_order(model, new):
    seen = []
    made = generate(
        model, prompt(), new_cache(model, "packed"), max_new_tokens=new, on_tokens=seen.append
    )
    assert seen == made.tokens.T.tolist()


def test_sampling_repeats_under_a_seed_and_varies_without(model):
    def sampled(seed):
        torch.manual_seed(seed)
        return generate(
            model,
            prompt(),
            new_cache(model, "packed"),
            max_new_tokens=NEW,
            sampling=Sampling(temperature=2.0, top_k=50, top_p=0.9),
        ).tokens

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0]).expand(40_000, -1)
    shares = torch.bincount(draw(logits, Sampling(1.0)), minlength=5) / 40_000
    # five standard deviations of a share of 40000 draws
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.0125, rtol=0)
    assert (draw(logits, Sampling(0.0)) == 0).all()
    assert set(draw(logits, Sampling(1.0, top_k=2)).tolist()) == {0, 1}
    assert set(draw(logits, Sampling(1.0, top_p=0.7)).tolist()) == {0, 1}
    assert set(draw(logits, Sampling(1.0, top_p=0.01)).tolist()) == {0}
    cold = torch.bincount(draw(logits, Sampling(0.5)), minlength=5) / 40_000
    torch.testing.assert_close(cold, (logits[0] / 0.5).softmax(-1), atol=0.0125, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": Sampling(-1.0)}, "temperature must not be negative, got -1.0"),
        ({"sampling": Sampling(1.0, top_k=0)}, "top_k must be at least 1, got 0"),
        ({"sampling": Sampling(1.0, top_p=0.0)}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"input_ids": torch.zeros(2, 0)}, r"input_ids must be \[B, T\], got shape \[2, 0\]"),
    ],
)
def test_settings_out_of_range_are_refused(model, settings, message):
    arguments = {"input_ids": prompt(), "max_new_tokens": NEW} | settings
    cache = new_cache(model, "packed")
    with pytest.raises(ValueError, match=message):
        generate(model, cache=cache, **arguments)
    assert cache.get_seq_length() == 0


def test_more_tokens_than_room_are_refused_before_the_prompt(model):
    cache = new_cache(model, "packed", max_tokens=30)
    with pytest.raises(ValueError, match="max_tokens of the cache must be at least 31"):
        generate(model, prompt(), cache, max_new_tokens=NEW)
    assert cache.get_seq_length() == 0


def test_capturing_needs_a_gpu_and_room(model):
    with pytest.raises(UnsupportedModelError, match="capture must be None or False"):
        generate(model, prompt(), new_cache(model, "packed"), max_new_tokens=NEW, capture=True)


# ----- captured


def gpu_model(family="llama"):
    model = tiny_model(family, head_dim=64, max_position_embeddings=4096)
    return model.to(torch.bfloat16).cuda()


def gpu_tokens(model, capture, rows=3, new=90, padding=None, **settings):
    input_ids = prompt(rows, 70).cuda()
    mask = None if padding is None else padded(input_ids, padding)
    cache = new_cache(model, "packed", max_tokens=input_ids.shape[1] + new)
    return generate(
        model,
        input_ids,
        cache,
        max_new_tokens=new,
        attention_mask=mask,
        capture=capture,
        **settings,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [None, (0, 33, 69)], ids=["even", "padded"])
@pytest.mark.parametrize("horizon", [1024, 80], ids=["one graph", "several graphs"])
def test_captured_steps_make_the_tokens_of_plain_steps(padding, horizon, monkeypatch):
    monkeypatch.setattr(generation, "LEAST_HORIZON", horizon)
    model = gpu_model()
    captured = gpu_tokens(model, None, padding=padding)
    plain = gpu_tokens(model, False, padding=padding)
    assert captured.is_captured
    assert not plain.is_captured
    # A schedule made for more tokens may split otherwise: a rounding may turn a tie.
    assert (captured.tokens == plain.tokens).float().mean() > 0.9
    again = gpu_tokens(model, None, padding=padding)
    assert torch.equal(captured.tokens, again.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt_oss", "mistral"])
def test_families_are_captured(family):
    model = gpu_model(family)
    watch_padding(model)
    exact = kvbits.CachePlan.uniform(model.config, 16, 16).layers
    input_ids = prompt(2, 70).cuda()
    cache = QuantizedCache(exact, model.config, max_tokens=120)
    made = generate(model, input_ids, cache, max_new_tokens=50)
    assert made.is_captured
    cache = QuantizedCache(exact, model.config, max_tokens=120)
    plain = generate(model, input_ids, cache, max_new_tokens=50, capture=False)
    # A schedule made for more tokens may split otherwise: a rounding may turn a tie.
    assert (made.tokens == plain.tokens).float().mean() > 0.9


@pytest.mark.gpu
def test_captured_sampling_streams_and_stops():
    model, seen = gpu_model(), []
    torch.manual_seed(0)
    made = gpu_tokens(
        model, True, on_tokens=seen.append, sampling=Sampling(1.0, top_k=40), stop_ids=[5]
    )
    width = made.tokens.shape[1]
    assert seen[:width] == made.tokens.T.tolist()
    assert len({tuple(tokens) for tokens in seen}) > 10  # noise is drawn anew in every replay


@pytest.mark.gpu
def test_states_that_are_not_finite_are_reported_after_a_captured_loop():
    model = gpu_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
        model.lm_head.weight[:] = 0  # every token is the first of equals
    input_ids = torch.full((1, 10), 3, device="cuda")
    cache = new_cache(model, "packed", max_tokens=60)

    def poison(tokens):
        if len(tokens) == 1:
            model.model.embed_tokens.weight.data[0] = torch.nan

    with pytest.raises(CalibrationError):
        generate(model, input_ids, cache, max_new_tokens=50, on_tokens=poison)
