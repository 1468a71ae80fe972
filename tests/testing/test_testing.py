"""The shipped test tools: models are tiny and repeatable, oracles agree with worked examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvbits.testing import (
    FAMILIES,
    attend_naively,
    pack_naively,
    tiny_config,
    tiny_model,
    unpack_naively,
    value_position,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_a_function_of_its_seed(family):
    state = torch.random.get_rng_state()
    one, same, other = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is kept"
    weights = [next(iter(model.parameters())) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert sum(p.numel() for p in one.parameters()) < 500_000
    assert not one.training


def test_config_fields_can_be_changed():
    assert tiny_config("llama", num_hidden_layers=2).num_hidden_layers == 2
    assert len(tiny_model("qwen2", num_hidden_layers=1).model.layers) == 1


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"family must be one of llama, .*, got 'gpt2'"):
        tiny_config("gpt2")


def test_three_bit_planes_worked_by_hand():
    """Codes 0 to 7 of eight channels: each plane is one byte of the documented picture."""
    packed = pack_naively(np.arange(8, dtype=np.uint8), 3)
    p0 = 0 | 1 << 3 | (6 & 3) << 6
    p2 = 4 | 5 << 3 | (7 >> 1) << 6
    p1 = 2 | 3 << 3 | (6 >> 2) << 6 | (7 & 1) << 7
    assert packed.tolist() == [p0 ^ 0x80, p2 & 0xFF ^ 0x80, p1 ^ 0x80]
    assert unpack_naively(packed, 3).tolist() == list(range(8))


def test_value_positions_are_a_permutation_within_32_tokens():
    positions = [value_position(token) for token in range(64)]
    assert sorted(positions[:32]) == list(range(32))
    assert positions[32:] == [p + 32 for p in positions[:32]]
    assert positions[:9] == [0, 4, 8, 12, 16, 20, 24, 28, 1]


def test_naive_attention_is_torchs_where_torch_can():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator).double()
    keys = torch.randn(2, 2, 9, 8, generator=generator).double()
    values = torch.randn(2, 2, 9, 6, generator=generator).double()
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(attend_naively(query, keys, values, None, 0.3), expected)
    sinks = torch.full((4,), -1e9)
    with_sinks = attend_naively(query, keys, values, mask[None, None], 0.3, sink_logits=sinks)
    torch.testing.assert_close(with_sinks, expected)
