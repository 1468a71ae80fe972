"""QAQ: both formulas, what they ask for on a model, and that it is stored."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

import kvbits
from kvbits import CachePlan
from kvbits.codecs import Codebook, Outliers, Tiered
from kvbits.errors import CalibrationError
from kvbits.methods import build_method
from kvbits.methods.qaq import bits_needed, key_deviation, value_deviation
from kvbits.testing import tiny_model

PLAIN = {"outlier_share": 0.0, "squared_query_norm": 300.0}


@pytest.fixture(scope="module")
def model():
    """Values of some heads are made larger, so that not all heads need the same."""
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.v_proj.weight.mul_(100)
            layer.self_attn.v_proj.weight[: 16 * index].mul_(16)
            layer.self_attn.k_proj.weight.mul_(15)
            layer.self_attn.k_proj.weight[16 : 16 * index].mul_(6)
    return model


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 90, (n,), generator=generator) for n in (150, 90, 33)]


@pytest.mark.parametrize(("error", "deviation"), [(1.0, 0.2146), (30.0, 0.2622)])
def test_keys_may_err_as_published(error, deviation):
    """T = 1000 and a squared norm of 300: sqrt(13.8165 / 300) and sqrt(20.6189 / 300)."""
    assert key_deviation(1000, error, 300.0).item() == pytest.approx(deviation, abs=5e-5)


def test_values_may_err_less_where_attention_is():
    """0.3 / (sqrt(400) * 0.05) = 0.3, and a tenth of that for ten times the attention."""
    found = value_deviation(400, 0.3, torch.tensor([0.05, 0.5, 0.0]))
    assert found[:2].tolist() == pytest.approx([0.3, 0.03])
    assert found[2] > 1e20


@pytest.mark.parametrize(
    ("spread", "paper", "code"),
    [
        # range / (2 sqrt(3) 0.2146) is 10.76, 5.38, 53.8 and 0.13; the code's is half, and one
        (8.0, 4, 3),
        (4.0, 3, 2),
        (40.0, 6, 5),
        (0.1, 0, 1),
        (0.0, 0, 0),
    ],
)
def test_both_formulas(spread, paper, code):
    """log2 of 10.76, 5.38, 53.8 is 3.43, 2.43, 5.75; of 6.38, 3.69, 27.9 and 1.07 it is 2.67,
    1.88, 4.80 and 0.09."""
    deviation = torch.tensor([0.2146])
    assert bits_needed(torch.tensor([spread]), deviation, "paper") == paper
    assert bits_needed(torch.tensor([spread]), deviation, "code") == code


def naive_needs(model, ids, key_error, value_error, window):
    """Bits by layer and side, head by head and token by token, from eager attention."""
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        rows = model(ids[None], past_key_values=cache, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    count, found = len(ids), {}
    for index, layer in enumerate(cache.layers):
        for side, states in (("key", layer.keys[0]), ("value", layer.values[0])):
            bits = []
            for head, tokens in enumerate(states.tolist()):
                seen = rows[index][0, 2 * head : 2 * head + 2, -window:].amax((0, 1)).tolist()
                for token, attention in zip(tokens[: count - 4], seen[: count - 4], strict=True):
                    if side == "key":
                        variance = math.log(count**3 / (count - 1) * key_error**2 + 1) / 300
                    else:
                        variance = (value_error / attention) ** 2 / count
                    step = 2 * math.sqrt(3 * variance)
                    bits.append(max(0, math.ceil(math.log2((max(token) - min(token)) / step))))
            found[index, side] = torch.tensor(bits).view(len(states), -1)
    return found


def test_needs_are_those_of_the_formula_on_the_attention_of_the_window(model, documents):
    ids = documents[1]
    method = build_method("qaq", key_error=0.5, value_error=0.05, **PLAIN)
    found = method.needs(model, [ids])
    expected = naive_needs(model, ids, 0.5, 0.05, window=5)
    for (index, side), bits in expected.items():
        ours = getattr(found[index], side)
        assert ours.shape == bits.shape
        # A logarithm next to a whole number may fall on either side of it.
        assert (ours != bits).double().mean() < 0.01, (index, side)
    assert len({int(bits) for each in expected.values() for bits in each.flatten()}) > 3


def test_the_norm_of_queries_is_the_90th_percentile_of_their_head(model, documents):
    """A rotation keeps norms, so they can be read before the rotary embedding."""
    seen = []
    projection = model.model.layers[0].self_attn.q_proj
    hook = projection.register_forward_hook(lambda *call: seen.append(call[-1]))
    ours = build_method("qaq", outlier_share=0.0).needs(model, documents[:1])[0].key
    hook.remove()
    norms = seen[0][0].detach().view(-1, 4, 2 * 16 // 16, 16).square().sum(-1)
    for head in range(4):
        norm = torch.quantile(norms[:, head].flatten().double(), 0.9).item()
        method = build_method("qaq", outlier_share=0.0, squared_query_norm=norm)
        alone = method.needs(model, documents[:1])[0].key[head]
        assert (ours[head] != alone).double().mean() < 0.01


def test_heads_get_the_tier_that_is_enough_for_their_tokens(model, documents):
    method = build_method("qaq", level="head", tiers=(2, 4, 8), value_error=2.0, **PLAIN)
    needs, plan = method.needs(model, documents), method.calibrate(model, documents)
    num_pairs = set()
    for index, layer in enumerate(plan.layers):
        for group in layer.groups:
            for head in group.heads or range(4):
                for side in ("key", "value"):
                    bits, own = (
                        sorted(getattr(needs[index], side)[head].tolist()),
                        group.codec(side),
                    )
                    share = sum(need <= own.bits for need in bits) / len(bits)
                    assert share >= 0.9 or own.bits == 8
                    narrower = sum(need <= own.bits / 2 for need in bits) / len(bits)
                    assert narrower < 0.9 or own.bits == 2
        num_pairs.add(len(layer.groups))
    assert max(num_pairs) > 1  # heads differ
    layered = build_method("qaq", level="layer", tiers=(2, 4, 8), value_error=2.0, **PLAIN)
    assert all(len(each.groups) == 1 for each in layered.calibrate(model, documents).layers)


def test_tiles_hold_as_many_wide_tokens_as_need_them(model, documents):
    method = build_method("qaq", tiers=(2, 4), value_error=1.0, **PLAIN)
    needs, plan = method.needs(model, documents), method.calibrate(model, documents)
    kinds = set()
    for index, layer in enumerate(plan.layers):
        for side in ("key", "value"):
            codec = layer.groups[0].codec(side)
            kinds.add(codec.kind)
            share = (getattr(needs[index], side) > 2).double().mean().item()
            stored = codec.num_wide[0] if codec.kind == "tiered" else 64 * (codec.bits == 4)
            assert stored == round(64 * share)
    assert "tiered" in kinds


@pytest.mark.parametrize("level", ["layer", "head", "token"])
@pytest.mark.parametrize("levels", ["uniform", "normal"])
@torch.no_grad()
def test_what_is_calibrated_is_really_stored(level, levels, model, documents, tmp_path):
    method = build_method("qaq", level=level, levels=levels, value_error=1.0)
    plan = method.calibrate(model, documents)
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    for layer in plan.layers:
        for codec in (group.codec(side) for group in layer.groups for side in ("key", "value")):
            assert isinstance(codec, Outliers)
            inner = codec.inner.codecs[0] if isinstance(codec.inner, Tiered) else codec.inner
            assert isinstance(inner, Codebook) == (levels == "normal")
    cache = plan.new_cache(model)
    ids = torch.stack((documents[0], documents[0].flip(0)))
    with kvbits.enable(model):
        for start, stop in ((0, 100), (100, 101), (101, 150)):
            logits = model(ids[:, start:stop], past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.nbytes == plan.bytes(150, batch=2, state_bits=32)


@torch.no_grad()
def test_a_smaller_error_is_asked_for_in_more_bits(model, documents):
    bits = [
        build_method("qaq", key_error=error, value_error=error, formula=formula)
        .calibrate(model, documents)
        .effective_bits
        for formula, error in (("code", 1.0), ("paper", 1.0), ("paper", 0.01))
    ]
    assert bits == sorted(set(bits))


def test_one_tier_needs_no_data(model):
    method = build_method("qaq", tiers=[4], outlier_share=0.0)
    assert not method.needs_data
    assert method.calibrate(model, []).pairs == [(4, 4)] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tiers": (4, 2)}, r"tiers must ascend, got \(4, 2\)"),
        (
            {"tiers": (2, 8)},
            r"tiers must be 1, 2 or 4 bits apart when level='token', got \(2, 8\)",
        ),
        ({"tiers": (2, 5)}, "must be 2, 3, 4 or 8"),
        ({"value_error": 0.0}, "value_error must be greater than 0, got 0.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_method("qaq", **settings)


def test_text_that_stays_exact_is_refused(model):
    with pytest.raises(CalibrationError, match=r"one of more than 5 tokens, .* got none"):
        build_method("qaq").calibrate(model, [torch.arange(5)])
