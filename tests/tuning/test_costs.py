from __future__ import annotations

import random

import pytest
from transformers import Gemma3TextConfig, Qwen2Config

from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.tuning.costs import cost_table
from kvbits.tuning.tables import candidate_pairs

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
@pytest.mark.parametrize("context", [None, 100, 4096])
def test_table_adds_up_to_what_the_plan_says_it_stores(make, mode, context):
    config = make()
    geometry = ModelGeometry.from_config(config)
    costs = cost_table(geometry, PAIRS, mode, context=context)
    generator = random.Random(0)
    for _ in range(10):
        choice = tuple(generator.randrange(len(PAIRS)) for _ in geometry.packable_layers)
        pairs = [(16, 16)] * geometry.num_hidden_layers
        for layer, index in zip(geometry.packable_layers, choice, strict=True):
            pairs[layer] = PAIRS[index]
        plan = CachePlan.from_pairs(config, pairs, mode=mode)
        stored = plan.effective_bits if context is None else plan.effective_bits_at(context)
        assert costs.effective_bits(choice) == pytest.approx(stored, rel=1e-12)


def test_rows_are_the_packable_layers_only():
    costs = cost_table(ModelGeometry.from_config(gemma()), PAIRS, "per_token")
    assert costs.units.shape == (2, len(PAIRS))


def test_four_bits_per_token_store_four_and_a_half():
    """One float16 scale and one offset for 64 values: 32 / 64 = 0.5 bits more than nominal."""
    costs = cost_table(ModelGeometry.from_config(qwen()), PAIRS, "per_token")
    assert costs.effective_bits((PAIRS.index((4, 4)),) * 5) == 4.5
    assert costs.effective_bits((PAIRS.index((16, 16)),) * 5) == 16.0
