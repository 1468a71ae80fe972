"""Bytes reported == bytes allocated == formula, for whole caches."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_models import generate, new_cache, padded_prompt, prompt, shared_model

import kvbits
from kvbits import CachePlan
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import LayerPlan
from kvbits.testing import FAMILIES, tiny_model

SETTINGS = {
    "per-token": ("per_token", {}),
    "kivi": ("kivi", {}),
    "kivi-small": ("kivi", {"group_size": 16, "residual_length": 16, "sink_tokens": 4}),
    "independent": ("kivi", {"flush": "independent"}),
}


def allocated_bytes(cache):
    """Every storage that can be reached from a cache, but for plans and index constants."""
    found, seen = {}, set()

    def visit(thing):
        if id(thing) in seen or isinstance(thing, (LayerPlan, torch.device, torch.dtype)):
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            for item in thing.values():
                visit(item)
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                visit(item)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            for name, item in vars(thing).items():
                if not (isinstance(thing, PageStore) and name == "_positions"):
                    visit(item)

    visit(cache.layers)
    return sum(found.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "settings"), SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_reported_bytes_are_allocated_bytes_and_the_plans_formula(family, mode, settings):
    model = shared_model(family)
    plan = CachePlan.uniform(model.config, 4, 2, mode, **settings)
    cache = plan.new_cache(model)
    seen = 0
    for count in (30, 1, 1, 40, 1):
        model(prompt(2, count, seed=count), past_key_values=cache)
        seen += count
        assert cache.nbytes == plan.bytes(seen, batch=2, state_bits=32)
        if family == "mistral" or any(layer.is_sliding for layer in cache.layers):
            continue  # transformers keeps a sliding window as a view of a larger storage
        assert cache.nbytes == allocated_bytes(cache)


@torch.no_grad()
def test_a_bfloat16_model_is_counted_in_sixteen_bits():
    model = tiny_model("llama").bfloat16()
    for key_bits, value_bits in ((8, 8), (4, 2), (16, 4), (16, 16)):
        plan = CachePlan.uniform(model.config, key_bits, value_bits)
        cache = plan.new_cache(model)
        model(prompt(3, 130), past_key_values=cache)
        assert cache.nbytes == allocated_bytes(cache) == plan.bytes(130, batch=3)


@torch.no_grad()
def test_reserved_room_is_counted():
    model = tiny_model("llama").bfloat16()
    for bits in (4, 16):
        plan = CachePlan.uniform(model.config, bits, bits)
        cache = plan.new_cache(model, max_tokens=300)
        model(prompt(3, 130), past_key_values=cache)
        assert cache.nbytes == allocated_bytes(cache)
        assert cache.nbytes == plan.bytes(130, batch=3, max_tokens=300)
        assert cache.nbytes > plan.bytes(130, batch=3)


@torch.no_grad()
def test_effective_bits_of_a_full_cache_are_what_the_plan_says():
    """At whole pages, codes and parameters are all there is but eight bytes per page."""
    model = tiny_model("llama").bfloat16()
    plan = CachePlan.uniform(model.config, 4, 2, "per_token")
    cache = plan.new_cache(model)
    model(prompt(1, 256), past_key_values=cache)
    values = 256 * 4 * 2 * (32 + 32)
    table = 8 * 2 * 4 * 4  # four pages in each store of two sides and four layers
    assert 8 * (cache.nbytes - table) / values == pytest.approx(plan.effective_bits)
    assert plan.effective_bits_at(256) == pytest.approx(8 * cache.nbytes / values)


def test_fewer_bits_take_fewer_bytes():
    model = shared_model("llama")
    sizes = []
    for bits in (16, 8, 4, 3, 2):
        cache = CachePlan.uniform(model.config, bits, bits).new_cache(model)
        generate(model, prompt(num_tokens=100), cache)
        sizes.append(cache.nbytes)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 5


@torch.no_grad()
def test_padding_costs_no_pages():
    model = shared_model("llama")
    input_ids, mask = padded_prompt((120, 120), num_tokens=130)
    plan = CachePlan.uniform(model.config, 4, 4)
    cache = plan.new_cache(model)
    model(input_ids, attention_mask=mask, past_key_values=cache)
    assert cache.nbytes == plan.bytes(10, batch=2, state_bits=32)


@torch.no_grad()
def test_peak_bytes_are_one_exact_layer_above_the_rest():
    """Layers are packed one by one, so a prefill never holds two exact layers at once."""
    model = shared_model("llama")
    cache = CachePlan.uniform(model.config, 4, 4).new_cache(model)
    model(prompt(2, 128), past_key_values=cache)
    exact_layer = 2 * 2 * 128 * (32 + 32) * 4
    assert exact_layer <= cache.peak_nbytes - 3 * cache.nbytes / 4 <= 2 * exact_layer
    assert kvbits.QuantizedCache.nbytes.fget(cache) < cache.peak_nbytes


def test_what_a_step_adds_does_not_grow_with_the_cache():
    """New storages per decode step, counted at 40 and at 140 tokens."""
    model = shared_model("llama")
    with kvbits.enable(model), torch.no_grad():
        cache = new_cache(model, CachePlan.uniform(model.config, 4, 4).layers[0])
        sizes = []
        for t in range(140):
            model(prompt(1, 1, seed=t), past_key_values=cache)
            sizes.append(cache.nbytes)
    growth = [after - before for before, after in itertools.pairwise(sizes)]
    page = max(growth)
    assert set(growth) == {0, page}, "between two pages nothing is allocated for good"
    assert [t + 1 for t, size in enumerate(growth) if size] == [64, 128]
