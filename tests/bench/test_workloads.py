"""Caches by name, shapes, and batches of stored random states."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoConfig

from kvbits import CachePlan
from kvbits.bench.workloads import Variant, cache_bytes, fill, parse_shape, parse_variant
from kvbits.codecs import Affine
from kvbits.testing import tiny_model

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "benchmarks" / "shapes" / "llama-3.1-8b"
TUNED = ROOT / "benchmarks" / "plans" / "kvtuner-llama-3.1-8b-c3.25.yaml"


@pytest.fixture(scope="module")
def config():
    return tiny_model("llama").config


def test_transformers_own_cache_needs_no_plan(config):
    assert parse_variant("dynamic", config) == Variant("dynamic", None)


def test_the_stock_quantized_cache_is_named_by_its_backend_and_width(config):
    assert parse_variant("quanto2", config) == Variant("quanto2", None, quanto_bits=2)


def test_bytes_of_the_stock_quantized_cache_are_those_of_its_backends_tensors():
    class Layer:
        keys = torch.zeros(1, 2, 3, 4)
        values = torch.zeros(1, 2, 3, 4)
        _quantized_keys = TwoTensor(torch.zeros(5), torch.zeros(5))
        _quantized_values = torch.zeros(11, dtype=torch.uint8)

    assert cache_bytes(SimpleNamespace(layers=[Layer()])) == 2 * 24 * 4 + (5 + 5) * 4 + 11


def test_a_pair_is_a_uniform_plan(config):
    variant = parse_variant("K4V2", config)
    assert variant.plan == CachePlan.uniform(config, 4, 2)
    assert parse_variant("K4V2@kivi", config).plan == CachePlan.uniform(config, 4, 2, "kivi")


def test_a_number_behind_kivi_is_the_group_of_keys():
    config = AutoConfig.from_pretrained(LLAMA)
    (group,) = parse_variant("K4V2@kivi128", config).plan.layers[0].groups
    assert group.key == Affine(bits=4, granularity="per_channel", group_size=128)


def test_plan_files_of_both_kinds_are_read(config, tmp_path):
    plan = CachePlan.uniform(config, 8, 3)
    plan.save(tmp_path / "mine.json")
    assert parse_variant(str(tmp_path / "mine.json"), config) == Variant("mine", plan)
    llama = AutoConfig.from_pretrained(LLAMA)
    variant = parse_variant(f"{TUNED}@kivi", llama)
    assert variant.name == "kvtuner-llama-3.1-8b-c3.25@kivi"
    assert variant.plan == CachePlan.from_kvtuner_yaml(TUNED, llama, mode="kivi")


@pytest.mark.parametrize("text", ["", "K4", "K4V2@int8", "k4v2", "plan.txt"])
def test_other_names_are_refused(text, config):
    with pytest.raises(ValueError, match=r"plan must .*got"):
        parse_variant(text, config)


def test_a_shape_is_rows_by_tokens():
    assert parse_shape("8x32768") == (8, 32768)


@pytest.mark.parametrize("text", ["8", "x5", "0x5", "5x0", "8 x 5", "-1x5", "8x5x2"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError, match="shape must be BATCHxCONTEXT"):
        parse_shape(text)


@pytest.mark.parametrize("name", ["dynamic", "K4V2@kivi"])
def test_a_filled_cache_holds_random_states_of_every_layer(name, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("kvbits.bench.workloads.FILL_VALUES", 64 * 3 * 16 * 4)  # several chunks
    cache = parse_variant(name, model.config).new_cache(model)
    fill(model, cache, batch=3, num_tokens=200)
    assert cache.get_seq_length() == 200
    plan = parse_variant(name, model.config).plan
    if plan is None:
        assert cache_bytes(cache) == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        assert all(layer.keys.std() > 0.9 for layer in cache.layers)
    else:
        assert cache_bytes(cache) == plan.bytes(200, batch=3, state_bits=32)
        states = cache.packed_layers[0].states().dense("key")
        assert torch.isfinite(states).all()
        assert states.std() > 0.9
