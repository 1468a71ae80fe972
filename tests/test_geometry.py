"""Geometry is what the model really hands to its cache, on every transformers we support."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvbits.errors import UnsupportedModelError
from kvbits.geometry import LayerGeometry, ModelGeometry

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
SLIDING_FULL = ["sliding_attention", "full_attention"]

# family, settings beyond SMALL, expected layer types, (heads, key_head_dim, value_head_dim)
FAMILIES: list[tuple[str, dict[str, Any], list[str], tuple[int, int, int]]] = [
    ("Llama", {}, ["full_attention"] * 2, (2, 8, 8)),
    ("Llama", {"head_dim": 16}, ["full_attention"] * 2, (2, 16, 16)),
    ("Mistral", {"sliding_window": 16}, ["sliding_attention"] * 2, (2, 8, 8)),
    ("Mistral", {"sliding_window": None}, ["full_attention"] * 2, (2, 8, 8)),
    ("Qwen2", {"sliding_window": 16}, ["full_attention"] * 2, (2, 8, 8)),
    (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        ["full_attention", "sliding_attention"],
        (2, 8, 8),
    ),
    ("Qwen3", {"head_dim": 12}, ["full_attention"] * 2, (2, 12, 12)),
    (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 16, "layer_types": SLIDING_FULL},
        SLIDING_FULL,
        (2, 16, 16),
    ),
    (
        "GptOss",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": SLIDING_FULL,
        },
        SLIDING_FULL,
        (2, 16, 16),
    ),
    ("Phi3", {}, ["full_attention"] * 2, (2, 8, 8)),
    ("DeepseekV2", MLA, ["full_attention"] * 2, (1, 24, 8)),
]


def build_config(family: str, settings: dict[str, Any]) -> Any:
    return getattr(transformers, f"{family}Config")(**(SMALL | settings))


@pytest.mark.parametrize(("family", "settings", "layer_types", "shape"), FAMILIES)
def test_geometry_is_what_the_cache_receives(family, settings, layer_types, shape):
    """Compared with the stock cache after a forward, not with what the config claims."""
    torch.manual_seed(0)
    config = build_config(family, settings)
    geometry = ModelGeometry.from_config(config)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    received = [
        (layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1])
        for layer in cache.layers
    ]
    read = [
        (layer.num_key_value_heads, layer.key_head_dim, layer.value_head_dim)
        for layer in geometry.layers
    ]
    assert read == received == [shape] * 2
    assert [layer.layer_type for layer in geometry.layers] == layer_types
    assert [layer.is_packable for layer in geometry.layers] == [
        layer_type == "full_attention" for layer_type in layer_types
    ]


def test_sliding_layers_carry_their_window_and_full_ones_none():
    config = build_config(
        "Gemma3Text", {"head_dim": 16, "sliding_window": 16, "layer_types": SLIDING_FULL}
    )
    windows = [layer.sliding_window for layer in ModelGeometry.from_config(config).layers]
    assert windows == [16, None]


def test_multimodal_config_is_read_by_its_text_decoder():
    text = build_config(
        "Gemma3Text", {"head_dim": 16, "sliding_window": 16, "layer_types": SLIDING_FULL}
    )
    whole = transformers.Gemma3Config(text_config=text.to_dict())
    assert ModelGeometry.from_config(whole) == ModelGeometry.from_config(text)


def test_linear_attention_layers_hold_no_states():
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    geometry = ModelGeometry.from_config(config)
    assert [layer.holds_states for layer in geometry.layers] == [False] * 3 + [True]
    assert geometry.packable_layers == (3,)


def test_heads_may_differ_between_layers():
    """Gemma4 gives its global layers wider heads."""
    geometry = ModelGeometry.from_config(transformers.Gemma4TextConfig())
    sliding, full = geometry.layers[0], geometry.layers[geometry.packable_layers[0]]
    assert (sliding.key_head_dim, full.key_head_dim) == (256, 512)


def test_layers_that_share_a_cache_are_counted_and_hold_none():
    """transformers 5.17 leaves them out of the layer types, later ones call them dummy."""
    config = transformers.Gemma3nTextConfig()
    layers = ModelGeometry.from_config(config).layers
    shared = [layer for layer in layers if not layer.holds_states]
    assert len(layers) == config.num_hidden_layers
    assert len(shared) == config.num_kv_shared_layers > 0
    assert {layer.layer_type for layer in shared} == {"dummy"}


def test_multi_query_models_cache_one_head():
    geometry = ModelGeometry.from_config(transformers.FalconConfig(num_hidden_layers=1))
    assert geometry.layers[0].num_key_value_heads == 1


def test_fingerprint_depends_on_every_field_and_on_nothing_else():
    base = ModelGeometry.from_config(build_config("Llama", {}))
    again = ModelGeometry.model_validate_json(base.model_dump_json())
    assert again.fingerprint == base.fingerprint
    assert len(base.fingerprint) == 64
    layer = base.layers[0]
    changed = [
        base.model_copy(update={"architecture": "other"}),
        base.model_copy(update={"num_attention_heads": 8}),
        base.model_copy(update={"hidden_size": 64}),
        base.model_copy(update={"layers": base.layers[:1]}),
        *(
            base.model_copy(update={"layers": (layer.model_copy(update=update), base.layers[1])})
            for update in (
                {"layer_type": "sliding_attention"},
                {"num_key_value_heads": 1},
                {"key_head_dim": 16},
                {"value_head_dim": 16},
                {"sliding_window": 16},
            )
        ),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in changed)}) == 10


def test_fingerprint_ignores_what_a_cache_does_not_see():
    names = [
        ModelGeometry.from_config(build_config("Llama", {"vocab_size": size})).fingerprint
        for size in (64, 128)
    ]
    assert names[0] == names[1]


def test_values_per_token_counts_both_sides_of_all_heads():
    layer = LayerGeometry(
        layer_type="full_attention", num_key_value_heads=3, key_head_dim=8, value_head_dim=4
    )
    assert layer.values_per_token == 36


def test_object_that_is_no_config_is_refused():
    with pytest.raises(TypeError, match=r"config must be a transformers config, got dict"):
        ModelGeometry.from_config({})


def test_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="num_attention_heads must be a positive"):
        ModelGeometry.from_config(transformers.MambaConfig(num_hidden_layers=2))


def test_config_without_layers_is_refused():
    config = SimpleNamespace(
        model_type="nothing", layer_types=[], per_layer_config=[], num_hidden_layers=0
    )
    config.get_text_config = lambda decoder: config
    with pytest.raises(UnsupportedModelError, match="config must describe at least one layer"):
        ModelGeometry.from_config(config)
