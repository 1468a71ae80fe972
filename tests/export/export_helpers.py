"""Geometries and plans for the tests of the exporters."""

from __future__ import annotations

from kvbits import CachePlan
from kvbits.geometry import LayerGeometry, ModelGeometry


def geometry(*layer_types, head_dim=64, value_head_dim=None):
    """A model with layers of these types, two heads each."""
    layers = tuple(
        LayerGeometry(
            layer_type=name,
            num_key_value_heads=2,
            key_head_dim=head_dim,
            value_head_dim=value_head_dim or head_dim,
            sliding_window=128 if name == "sliding_attention" else None,
        )
        for name in layer_types
    )
    return ModelGeometry(
        architecture="qwen2", num_attention_heads=4, hidden_size=256, layers=layers
    )


def full(num_layers, **settings):
    """A model of full-attention layers."""
    return geometry(*["full_attention"] * num_layers, **settings)


def plan_of(*pairs, mode="per_token", **settings):
    """A plan of these pairs for a model of full-attention layers."""
    return CachePlan.from_pairs(full(len(pairs)), pairs, mode=mode, **settings)
