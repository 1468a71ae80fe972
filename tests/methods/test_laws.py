"""Laws that the plan of every method keeps, under its defaults and under what else it offers.

Appending in pieces, batch rows, crops, moved rows, drafts, saving: on the layers of a plan as
fitted to a model, against the naive layer. Bytes and full precision: on the model itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from naive_layer import compare_histories, needs_library
from transformers import DynamicCache

import kvbits
from kvbits import CachePlan
from kvbits.codecs.wrappers import Wrapper
from kvbits.layer_plan import SIDES
from kvbits.methods import METHODS, build_method
from kvbits.testing import tiny_model

HEADS, DIM, TOKENS = 2, 32, 341


class Variant(NamedTuple):
    """A method, its settings, and a codec that its plan must hold for the laws to mean it."""

    method: str
    settings: dict[str, object]
    kind: str


# Windows and sinks are short, so that most of a short history is packed.
VARIANTS = (
    Variant("per-token", {}, "affine"),
    Variant("per-token", {"key_bits": 2, "value_bits": 3, "group_size": 8}, "affine"),
    Variant("kivi", {}, "affine"),
    Variant("kivi", {"residual_length": 32, "sink_tokens": 4, "flush": "joint"}, "affine"),
    Variant("kivi", {"promoted_share": 0.25, "residual_length": 32}, "promoted"),
    Variant("kvquant", {}, "range_normalised"),
    Variant("kvquant", {"outlier_share": 0.1, "residual_length": 16}, "outliers"),
    Variant("kvquant", {"key_ranges": "block", "block_tokens": 32}, "codebook"),
    Variant("kvquant", {"q_norm": True, "key_bits": 2, "outlier_share": 0.0}, "nearest_level"),
    Variant("skvq", {}, "permuted"),
    Variant("skvq", {"reorder": "head", "group_size": 8, "residual_length": 8}, "permuted"),
    Variant("skvq", {"key_bits": 1.5, "residual_length": 0}, "affine"),
    Variant("qaq", {"value_error": 0.02}, "tiered"),
    Variant("qaq", {"level": "head", "value_error": 0.02}, "outliers"),
    Variant("qaq", {"level": "layer", "outlier_share": 0.0}, "affine"),
    Variant("qaq", {"levels": "normal", "value_error": 0.02}, "tiered"),
    Variant("hadamard", {}, "rotated"),
    Variant("oscar", {"sink_tokens": 4, "residual_length": 20}, "matrix_rotated"),
    Variant("turboquant", {"key_bits": 3}, "norm_scaled"),
    Variant("kvarn", {"tile_tokens": 32, "sink_tokens": 4}, "variance_normalised"),
    Variant("int8", {}, "affine"),
    Variant("fp8", {}, "float8"),
    Variant("nvfp4", {}, "float4"),
    Variant("mxfp4", {}, "float4"),
    Variant("quanto", {"residual_length": 8}, "quanto"),
    Variant("quanto", {"key_granularity": "per_channel", "key_bits": 2}, "quanto"),
    Variant("hqq", {"residual_length": 8}, "hqq"),
    Variant("hqq", {"key_granularity": "per_channel", "group_size": 32}, "hqq"),
)


def named(variants):
    return [
        pytest.param(each, marks=needs_library.get(each.method, ()), id="-".join(
            [each.method, *(f"{name}={value}" for name, value in each.settings.items())]
        ))
        for each in variants
    ]  # fmt: skip


every_variant = pytest.mark.parametrize("variant", named(VARIANTS))


@pytest.fixture(scope="module")
def model():
    """Heads of unlike size, so that not all need the same width."""
    model = tiny_model("llama").eval()
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.v_proj.weight.data.mul_(8)
        layer.self_attn.v_proj.weight.data[:DIM].mul_(4 * index + 1)
    return model


@functools.cache
def plan_of(index, model):
    variant = VARIANTS[index]
    method = build_method(variant.method, **variant.settings)
    text = torch.randint(5, 90, (300,), generator=torch.Generator().manual_seed(1))
    return method.calibrate(model, [text])


def kinds(codec):
    yield codec.kind
    if isinstance(codec, Wrapper):
        yield from kinds(codec.inner)


def draw(num_tokens, rows, seed):
    """Keys and values of the model's shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, HEADS, num_tokens, DIM, generator=generator) for _ in SIDES]


def test_no_method_is_left_out():
    """KVTuner's are uniform plans for models of their own: test_kvtuner_presets.py."""
    assert {each.method for each in VARIANTS} == set(METHODS) - {"kvtuner"}


@every_variant
def test_any_history_of_a_fitted_layer_equals_the_naive_one(variant, model):
    plan = plan_of(VARIANTS.index(variant), model)
    found = {kind for layer in plan.layers for group in layer.groups for side in SIDES
             for kind in kinds(group.codec(side))}  # fmt: skip
    assert variant.kind in found
    compare_histories(plan.layers[1], seed=3, draw=draw, steps=15)


@every_variant
@torch.no_grad()
def test_bytes_are_those_of_the_formula_and_reload_with_the_plan(variant, model, tmp_path):
    plan = plan_of(VARIANTS.index(variant), model)
    plan.save(tmp_path / "plan.json")
    loaded = CachePlan.load(tmp_path / "plan.json")
    assert loaded == plan
    ids = torch.randint(5, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    caches = [each.new_cache(model) for each in (plan, loaded)]
    with kvbits.enable(model):
        for start, stop in ((0, 200), (200, 201), (201, TOKENS - 1), (TOKENS - 1, TOKENS)):
            ours, theirs = (
                model(ids[:, start:stop], past_key_values=cache).logits for cache in caches
            )
            assert torch.equal(ours, theirs)
        kvbits.save_cache(caches[0], tmp_path / "cache.safetensors")
        restored = kvbits.load_cache(tmp_path / "cache.safetensors", model)
        step = ids[:, :1]
        ours, theirs = (
            model(step, past_key_values=cache).logits for cache in (caches[1], restored)
        )
        assert torch.equal(ours, theirs)
    assert ours.isfinite().all()
    assert caches[1].nbytes == plan.bytes(TOKENS + 1, batch=2, state_bits=32)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "kvtuner"])
@torch.no_grad()
def test_layers_left_exact_are_the_models_own_bit_for_bit(name, model):
    half = len(model.model.layers) // 2
    plan = build_method(name, exact_layers=half).plan(model.config)
    assert plan.effective_bits == 16
    ids = torch.randint(5, 90, (2, 50), generator=torch.Generator().manual_seed(0))
    ours, theirs = plan.new_cache(model), DynamicCache(config=model.config)
    for start, stop in ((0, 40), (40, 41), (41, 50)):
        steps = [model(ids[:, start:stop], past_key_values=c).logits for c in (ours, theirs)]
        assert torch.equal(*steps)
