from __future__ import annotations

import random

import pytest
from transformers import Gemma3TextConfig, Qwen2Config
from tuning_synthetic import candidate_pairs

from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.tuning.candidates import of_mode
from kvbits.tuning.costs import cost_table

PAIRS = candidate_pairs((8, 4, 3, 2))


def qwen() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=64, hidden_size=256, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip


def gemma() -> Gemma3TextConfig:
    """Every third layer is full attention; the others slide and are never packed."""
    return Gemma3TextConfig(
        vocab_size=64, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip


@pytest.mark.parametrize("make", [qwen, gemma])
@pytest.mark.parametrize("mode", ["per_token", "kivi"])
@pytest.mark.parametrize(("context", "batch"), [(None, 1), (100, 1), (4096, 3)])
def test_table_adds_up_to_what_the_plan_says_it_stores(make, mode, context, batch):
    config = make()
    geometry = ModelGeometry.from_config(config)
    candidates = of_mode(config, mode, (8, 4, 3, 2))
    costs = cost_table(candidates, context=context, batch=batch)
    generator = random.Random(0)
    for _ in range(10):
        choice = tuple(generator.randrange(len(PAIRS)) for _ in geometry.packable_layers)
        pairs = [(16, 16)] * geometry.num_hidden_layers
        for layer, index in zip(geometry.packable_layers, choice, strict=True):
            pairs[layer] = PAIRS[index]
        plan = CachePlan.from_pairs(config, pairs, mode=mode)
        assert candidates.plan(choice).layers == plan.layers
        stored = plan.effective_bits if context is None else plan.effective_bits_at(context, batch)
        assert costs.effective_bits(choice) == pytest.approx(stored, rel=1e-12)


def test_rows_are_the_packable_layers_only():
    costs = cost_table(of_mode(gemma(), "per_token", (8, 4, 3, 2)))
    assert costs.units.shape == (2, len(PAIRS))


def test_four_bits_per_token_store_four_and_a_half():
    """One float16 scale and one offset for 64 values: 32 / 64 = 0.5 bits more than nominal."""
    costs = cost_table(of_mode(qwen(), "per_token", (8, 4, 3, 2)))
    assert costs.effective_bits((PAIRS.index((4, 4)),) * 5) == 4.5
    assert costs.effective_bits((PAIRS.index((16, 16)),) * 5) == 16.0
