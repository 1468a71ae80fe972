"""Saved caches: bit for bit back, continuing as if never saved, and damage is noticed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models import (
    EXACT,
    FAMILIES,
    PLANS,
    generate,
    new_cache,
    padded_prompt,
    prompt,
    shared_model,
)
from transformers.cache_utils import DynamicLayer

import kvbits
from kvbits.errors import PlanError, RecordError, UnsupportedModelError

plans = pytest.mark.parametrize(
    "plan", [PLANS["token-8"], PLANS["kivi-4"], EXACT], ids=["token-8", "kivi-4", "exact"]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.fixture
def saved(path):
    """A saved cache of the tiny Llama after 30 tokens, and the model."""
    model = shared_model("llama")
    cache = new_cache(model, PLANS["kivi-4"])
    with torch.no_grad():
        model(prompt(num_tokens=30), past_key_values=cache)
    kvbits.save_cache(cache, path)
    return model, cache


@plans
def test_a_cache_with_room_keeps_it(plan, path):
    model = shared_model("llama")
    with kvbits.enable(model), torch.no_grad():
        cache = new_cache(model, plan, max_tokens=300)
        model(prompt(num_tokens=100), past_key_values=cache)
        kvbits.save_cache(cache, path)
        loaded = kvbits.load_cache(path, model)
        assert loaded.max_tokens == 300
        assert loaded.nbytes == cache.nbytes
        for _ in range(150):
            step = prompt(num_tokens=1, seed=5)
            ours, theirs = (model(step, past_key_values=c).logits for c in (loaded, cache))
            assert torch.equal(ours, theirs)
        assert loaded.nbytes == cache.nbytes


@plans
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_cache_continues_bit_for_bit(family, plan, path):
    model = shared_model(family)
    input_ids, mask = padded_prompt((7, 0), num_tokens=40)
    with kvbits.enable(model), torch.no_grad():
        cache = new_cache(model, plan)
        model(input_ids[:, :39], attention_mask=mask[:, :39], past_key_values=cache)
        kvbits.save_cache(cache, path)
        loaded = kvbits.load_cache(path, model)
        assert loaded.get_seq_length() == 39
        assert loaded.nbytes <= cache.nbytes
        assert loaded.plans == cache.plans
        for step in (input_ids[:, 39:], prompt(2, 1, seed=5), prompt(2, 6, seed=6)):
            mask = torch.nn.functional.pad(
                mask, (0, loaded.get_seq_length() + step.shape[1] - mask.shape[1]), value=1
            )
            ours = model(step, attention_mask=mask, past_key_values=loaded).logits
            theirs = model(step, attention_mask=mask, past_key_values=cache).logits
            assert torch.equal(ours, theirs)


def content(path):
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    return header, load_file(path)


def test_saving_again_writes_the_same_states_and_header(saved, path, tmp_path):
    model, cache = saved
    header, tensors = content(path)
    again = tmp_path / "again.safetensors"
    for each in (cache, kvbits.load_cache(path, model)):
        kvbits.save_cache(each, again)
        other_header, other_tensors = content(again)
        assert other_header == header
        assert other_tensors.keys() == tensors.keys()
        assert all(torch.equal(other_tensors[name], tensors[name]) for name in tensors)


def test_a_loaded_cache_keeps_quantize_prefill(path):
    model = shared_model("llama")
    kvbits.save_cache(new_cache(model, PLANS["token-8"], quantize_prefill=True), path)
    loaded = kvbits.load_cache(path, model)
    assert all(layer.quantize_prefill for layer in loaded.packed_layers.values())


def test_an_empty_cache_is_saved_and_loaded(path):
    model = shared_model("llama")
    kvbits.save_cache(new_cache(model, PLANS["kivi-4"]), path)
    loaded = kvbits.load_cache(path, model)
    assert loaded.get_seq_length() == 0
    expected = generate(model, prompt(), new_cache(model, PLANS["kivi-4"]))
    assert torch.equal(generate(model, prompt(), loaded), expected)


def test_a_packed_file_is_smaller_than_an_exact_one(path, tmp_path):
    model, sizes = shared_model("llama"), []
    for plan in (PLANS["token-8"], EXACT):
        cache = new_cache(model, plan)
        with torch.no_grad():
            model(prompt(num_tokens=64), past_key_values=cache)
        kvbits.save_cache(cache, path)
        sizes.append(path.stat().st_size)
    assert sizes[0] < 0.5 * sizes[1]


def rewrite(path, *, tensors=None, **header):
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(tensors or load_file(path), path, metadata=old | header)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "other"}, "format of a saved cache must be 'kvbits-cache-1', got 'other'"),
        ({"layout": "kvbits-9"}, "layout of a saved cache must be 'kvbits-1', got 'kvbits-9'"),
        ({"plans": "[{}]"}, "must match its checksum"),
        ({"layers": "[]"}, "must match its checksum"),
        ({"quantize_prefill": "true"}, "must match its checksum"),
        ({"sha256": "0"}, "must match its checksum"),
    ],
)
def test_a_damaged_header_is_refused(saved, path, header, message):
    rewrite(path, **header)
    with pytest.raises(RecordError, match=message):
        kvbits.load_cache(path, saved[0])


def test_one_changed_byte_is_noticed(saved, path):
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("codes"))
    tensors[name].view(torch.uint8).flatten()[7] ^= 1
    rewrite(path, tensors=tensors)
    with pytest.raises(RecordError, match=r"must match its checksum, got damaged states"):
        kvbits.load_cache(path, saved[0])


def test_changed_lengths_are_noticed(saved, path):
    """The facts are under the checksum too: a length that was edited would shift every token."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["layers"])
    facts[0]["num_tokens"] += 1
    rewrite(path, layers=json.dumps(facts))
    with pytest.raises(RecordError, match=r"must match its checksum"):
        kvbits.load_cache(path, saved[0])


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x00" * 100])
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(RecordError, match="path must be a readable safetensors file"):
        kvbits.load_cache(path, shared_model("llama"))


def test_a_missing_file_is_refused(path):
    with pytest.raises(RecordError, match="path must be a readable safetensors file"):
        kvbits.load_cache(path, shared_model("llama"))


def test_a_truncated_file_is_refused(saved, path):
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match="path must be a readable safetensors file"):
        kvbits.load_cache(path, saved[0])


def test_a_model_with_other_layers_is_refused(saved, path):
    with pytest.raises(PlanError, match="layer 0 must be full attention to be packed"):
        kvbits.load_cache(path, shared_model("gemma3"))


def test_a_layer_that_is_not_plain_keys_and_values_is_refused(saved, path):
    class Other(DynamicLayer):
        pass

    _, cache = saved
    cache.layers[2] = Other()
    with pytest.raises(UnsupportedModelError, match="layer 2 must keep keys and values"):
        kvbits.save_cache(cache, path)
