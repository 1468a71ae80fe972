"""The registry, what every method promises, and what is special about some."""

from __future__ import annotations

import functools
import inspect
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from naive_layer import LIBRARIES, needs_library
from transformers import DynamicCache

import kvbits
from kvbits import CachePlan
from kvbits.codecs import Affine, Identity, Outliers, PreRope, Promoted
from kvbits.errors import PlanError, UnsupportedModelError
from kvbits.methods import METHODS, build_method
from kvbits.methods.listing import markdown_table
from kvbits.testing import tiny_model

# KVTuner's plans are for models of their own.
named = [name for name in METHODS if name != "kvtuner"]
every_method = pytest.mark.parametrize("name", named)
every_installed_method = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_library.get(name, ())) for name in named]
)
NARROWEST = ("per-token", "kivi", "kvquant", "skvq", "hadamard", "turboquant", "kvarn", *LIBRARIES)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@functools.cache
def plan_of(name, model):
    """A method's plan under its defaults, fitted to some text if it wants any."""
    method = build_method(name)
    text = torch.randint(5, 90, (300,), generator=torch.Generator().manual_seed(1))
    return method.calibrate(model, [text]) if method.needs_data else method.plan(model.config)


def prompt(num_tokens=40):
    return torch.randint(5, 90, (2, num_tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_documented(name):
    method = METHODS[name]
    assert method.name == name
    assert method.source
    assert inspect.getdoc(method)


def test_the_table_of_the_readme_is_that_of_the_classes():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert markdown_table() in readme


@every_method
def test_a_plan_survives_its_file(name, model, tmp_path):
    plan = plan_of(name, model)
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan
    assert plan.provenance.method == name


@every_installed_method
@torch.no_grad()
def test_decoding_with_a_plan_works_and_bytes_are_those_of_the_formula(name, model):
    plan = plan_of(name, model)
    cache = plan.new_cache(model)
    with kvbits.enable(model):
        for start, stop in ((0, 200), (200, 201), (201, 340), (340, 341)):
            logits = model(prompt(400)[:, start:stop], past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.nbytes == plan.bytes(341, batch=2, state_bits=32)


@every_installed_method
@torch.no_grad()
def test_attention_sees_what_the_codecs_decode(name, model):
    """With and without kvbits attention: the handle materialises what the reference walks."""
    plan = plan_of(name, model)
    steps = []
    for is_enabled in (True, False):
        cache = plan.new_cache(model)
        model(prompt(300), past_key_values=cache)
        if is_enabled:
            with kvbits.enable(model):
                steps.append(model(prompt(1), past_key_values=cache).logits)
        else:
            steps.append(model(prompt(1), past_key_values=cache).logits)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_library.get(name, ())) for name in NARROWEST]
)
@torch.no_grad()
def test_more_bits_are_closer_to_the_exact_model(name, model):
    """With exact tokens only where the method must have some, so that all is packed."""
    settings = {"sink_tokens": 0} | (
        {"residual_length": 32} if name in {"kivi", "skvq", *LIBRARIES} else {}
    )
    exact = DynamicCache(config=model.config)
    model(prompt(300), past_key_values=exact)
    expected = model(prompt(1), past_key_values=exact).logits
    errors = []
    for bits in (2, 4):
        plan = build_method(name, key_bits=bits, value_bits=bits, **settings).plan(model.config)
        cache = plan.new_cache(model)
        model(prompt(300), past_key_values=cache)
        found = model(prompt(1), past_key_values=cache).logits
        errors.append((found - expected).square().mean().item())
    assert 0 < errors[1] < errors[0] / 4


def test_layers_at_the_ends_can_stay_exact(model):
    plan = build_method("turboquant", exact_layers=1).plan(model.config)
    assert [layer.is_exact for layer in plan.layers] == [True, False, False, True]


def test_kivi_is_kivi(model):
    (layer, *_) = build_method("kivi").plan(model.config).layers
    (group,) = layer.groups
    assert group.key == Affine(bits=2, granularity="per_channel", group_size=32)
    assert group.value == Affine(bits=2, group_size=32)
    assert (layer.residual_length, layer.flush, layer.sink_tokens) == (128, "independent", 0)


def test_kivi_promotes_channels_of_two_bit_keys(model):
    (layer, *_) = build_method("kivi", promoted_share=0.125).plan(model.config).layers
    assert layer.groups[0].key == Promoted(group_size=32, num_promoted=4)
    with pytest.raises(ValueError, match="key_bits must be 2 where channels are promoted, got 4"):
        build_method("kivi", promoted_share=0.125, key_bits=4)


def test_kivi_takes_the_bits_its_paper_leaves_out():
    """Two fp16 numbers a group of 32: 2-bit KIVI stores 3 bits."""
    model = tiny_model("llama")
    assert build_method("kivi").plan(model.config).effective_bits == 3.0


def test_kvquant_counts_its_outliers(model):
    """D = 32: the least is 2 slots of 24 bits, beside two fp16 numbers a block or token."""
    (layer, *_) = build_method("kvquant").plan(model.config).layers
    (group,) = layer.groups
    assert isinstance(group.key, PreRope)
    assert isinstance(group.key.inner, Outliers)
    assert group.key.stored_bits(32) == 3 + Fraction(48, 32) + Fraction(32, 128)
    assert group.value.stored_bits(32) == 3 + Fraction(48, 32) + Fraction(32, 32)
    dense = build_method("kvquant", outlier_share=0.0).plan(model.config).layers[0].groups[0]
    assert dense.value.stored_bits(32) == 3 + 1


def test_skvq_stores_its_one_and_a_half_bits(model):
    """32 values are 7 bytes of 5 codes; scale and offset take a byte each."""
    (layer, *_) = build_method("skvq").plan(model.config).layers
    assert layer.groups[0].value.stored_bits(32) == Fraction(7 * 8 + 16, 32)


def test_heads_that_cannot_be_rotated_are_refused():
    model = tiny_model("llama", head_dim=48)
    with pytest.raises(PlanError, match="power of two to be rotated"):
        build_method("hadamard").plan(model.config)


def test_layers_that_cannot_be_packed_stay_as_they_are():
    plan = build_method("kvarn").plan(tiny_model("gemma3").config)
    kinds = [layer.is_packable for layer in plan.model.layers]
    assert [not layer.is_exact for layer in plan.layers] == kinds
    assert not all(kinds)
    assert plan.layers[kinds.index(False)].groups[0].key == Identity()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("kivy", {}, "method must be one of per-token, kivi, .*got 'kivy'"),
        ("kivi", {"key_bits": 5}, "key_bits must be 2, 3, 4 or 8, got 5"),
        ("kivi", {"sinks": 3}, "sinks must not be given, got 3; no such field exists"),
        ("kvquant", {"outlier_share": 0.7}, "outlier_share must be less than 0.5, got 0.7"),
        ("skvq", {"key_bits": 5}, "bits must be 1.5, 2, 3, 4 or 8, got 5"),
        ("skvq", {"key_bits": 2.0}, "bits must be 1.5, 2, 3, 4 or 8, got 2.0"),
        ("kivi", {"group_size": 48}, "residual_length must be a multiple of the key block, 48"),
        ("fp8", {"scale": -1.0}, "scale must be greater than or equal to .*, got -1.0"),
        ("fp8", {"scale": float("inf")}, "scale must be .*, got inf"),
        ("hadamard", {"exact_layers": -3}, "exact_layers must be .*, got -3"),
    ],
)
def test_bad_settings_are_one_sentence(name, settings, message, model):
    with pytest.raises(ValueError, match=message) as caught:
        build_method(name, **settings).plan(model.config)
    assert "\n" not in str(caught.value)


def test_an_unknown_rotary_embedding_is_refused():
    config = tiny_model("llama").config
    config.model_type = "unheard_of"
    with pytest.raises(UnsupportedModelError, match="model_type must be one whose rotary"):
        build_method("kvquant").plan(config)
