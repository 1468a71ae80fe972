"""What kvbits changes in transformers: nothing on import, one model on ``enable``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from naive_layer import PLANS, random_states
from transformers import AttentionInterface, AttentionMaskInterface

import kvbits
from kvbits.attention.hf import ATTENTION_NAME, is_enabled, packed_attention
from kvbits.attention.states import StatesHandle
from kvbits.cache.layer import PackedLayer
from kvbits.errors import UnsupportedModelError
from kvbits.testing import attend_naively, tiny_model

SNAPSHOT = """
import torch, transformers
from transformers import cache_utils, masking_utils, modeling_utils
import transformers.models.llama.modeling_llama as llama

def facts():
    return (
        sorted(transformers.AttentionInterface().valid_keys()),
        sorted(transformers.AttentionMaskInterface().valid_keys()),
        sorted(map(str, cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.items())),
        {name: id(value) for name, value in vars(cache_utils).items() if callable(value)},
        {name: id(value) for name, value in vars(masking_utils).items() if callable(value)},
        {name: id(value) for name, value in vars(llama).items() if callable(value)},
        id(torch.nn.Module.__call__),
    )

before = facts()
"""
IMPORT_ALL = """
import kvbits, kvbits.attention.hf, kvbits.cache.hf, kvbits.cache.saving, kvbits.plan
import kvbits.testing
[getattr(kvbits, name) for name in kvbits.__all__]
after = facts()
assert before == after, [(a, b) for a, b in zip(before, after) if a != b]
print("unchanged")
"""


def test_importing_kvbits_changes_nothing_in_transformers():
    """A fresh interpreter, because this one has long enabled models."""
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + IMPORT_ALL], capture_output=True, text=True, check=False
    )
    assert done.stdout == "unchanged\n", done.stderr


def test_attention_and_mask_are_registered_together():
    """The one without the other leaves left-padded rows silently unmasked."""
    model = tiny_model("llama", num_hidden_layers=1)
    with kvbits.enable(model):
        assert is_enabled(model)
        assert ATTENTION_NAME in AttentionInterface().valid_keys()
        assert ATTENTION_NAME in AttentionMaskInterface().valid_keys()
    assert not is_enabled(model)


@pytest.mark.parametrize("name", ["token-4", "kivi-32", "head-groups"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"s_aux": torch.arange(6.0)}])
def test_packed_attention_returns_what_transformers_expects(name, options):
    layer = PackedLayer(PLANS[name])
    layer.update(*random_states(120))
    states = layer.update(*random_states(1, seed=2))
    query = torch.randn(2, 6, 1, 16, generator=torch.Generator().manual_seed(3))
    handles = [StatesHandle(states, side, torch.float32) for side in ("key", "value")]
    output, weights = packed_attention(torch.nn.Module(), query, *handles, None, **options)
    expected = attend_naively(
        query,
        states.dense("key"),
        states.dense("value"),
        None,
        16**-0.5,
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
    )
    assert weights is None
    torch.testing.assert_close(output.double(), expected.transpose(1, 2), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout must be unset with kvbits attention, got 0.1"),
        ({"position_bias": torch.zeros(1)}, "position_bias must be unset .* got a tensor"),
    ],
)
def test_what_packed_attention_does_not_implement_is_refused(options, message):
    layer = PackedLayer(PLANS["token-4"])
    states = layer.update(*random_states(1))
    handles = [StatesHandle(states, side, torch.float32) for side in ("key", "value")]
    with pytest.raises(UnsupportedModelError, match=message):
        packed_attention(torch.nn.Module(), torch.zeros(2, 6, 1, 16), *handles, None, **options)


def test_a_model_that_never_was_enabled_can_be_disabled():
    model = tiny_model("llama", num_hidden_layers=1)
    before = model.config._attn_implementation
    kvbits.disable(model)
    assert model.config._attn_implementation == before


def test_an_error_inside_the_context_still_disables():
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(RuntimeError, match="inside"), kvbits.enable(model):
        raise RuntimeError("inside")
    assert not is_enabled(model)
