"""What a model's KV cache looks like: layer types, key/value heads and head dimensions.

Everything is read from the transformers config, the way the installed transformers reads it when
it builds a cache, so that no table of model names is needed. ``fingerprint`` identifies the
geometry: a plan made for one geometry is refused for another.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kvbits.errors import UnsupportedModelError

PACKABLE_LAYER_TYPE = "full_attention"
SHARING_LAYER_TYPE = "dummy"  # attends to the states of an earlier layer
# Types whose cache layer keeps no key and value states; recurrent states are not the KV cache's.
STATELESS_LAYER_TYPES = frozenset({SHARING_LAYER_TYPE, "conv", "linear_attention", "moe", "mlp"})


class LayerGeometry(BaseModel):
    """Shape of what one layer hands to its cache, ``[B, H_kv, T, D]`` per side.

    Args:
        layer_type: The type transformers resolves for the layer, such as ``full_attention``.
        num_key_value_heads: Cached heads H_kv; 1 for latent attention (MLA).
        key_head_dim: Channels of one cached key; the latent rank for MLA.
        value_head_dim: Channels of one cached value; the rotary key part for MLA.
        sliding_window: Tokens a sliding or chunked layer can see; None sees all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layer_type: str = Field(min_length=1)
    num_key_value_heads: int = Field(ge=1)
    key_head_dim: int = Field(ge=1)
    value_head_dim: int = Field(ge=1)
    sliding_window: int | None = Field(default=None, ge=1)

    @property
    def is_packable(self) -> bool:
        """Whether kvbits may store the layer packed; other layers keep the stock cache."""
        return self.layer_type == PACKABLE_LAYER_TYPE

    @property
    def holds_states(self) -> bool:
        """Whether the layer keeps key and value states at all."""
        return self.layer_type not in STATELESS_LAYER_TYPES

    @property
    def values_per_token(self) -> int:
        """Key and value numbers one token adds to the layer, over all heads."""
        return self.num_key_value_heads * (self.key_head_dim + self.value_head_dim)


class ModelGeometry(BaseModel):
    """The cache geometry of a decoder, layer by layer.

    Args:
        architecture: ``model_type`` of the text decoder.
        num_attention_heads: Query heads H_q.
        hidden_size: Width of the residual stream.
        layers: One entry per layer, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    architecture: str = Field(min_length=1)
    num_attention_heads: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    layers: tuple[LayerGeometry, ...] = Field(min_length=1)

    @classmethod
    def from_config(cls, config: Any) -> ModelGeometry:
        """Read the geometry of any transformers config; multimodal ones by their text decoder.

        Args:
            config: A transformers ``PretrainedConfig``.

        Raises:
            TypeError: If ``config`` is not a transformers config.
            UnsupportedModelError: If the config names no layers or no attention heads.
        """
        if not hasattr(config, "get_text_config"):
            raise TypeError(
                f"config must be a transformers config, got {type(config).__name__}; "
                "pass model.config"
            )
        decoder = config.get_text_config(decoder=True)
        layer_types, windows = _layer_types_and_windows(decoder)
        layer_configs = _layer_configs(decoder, len(layer_types))
        first = layer_configs[0] if layer_configs else decoder
        return cls(
            architecture=decoder.model_type,
            num_attention_heads=_required(first, "num_attention_heads"),
            hidden_size=_required(first, "hidden_size"),
            layers=tuple(map(_layer_geometry, layer_types, windows, layer_configs)),
        )

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the canonical JSON of all fields."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def num_hidden_layers(self) -> int:
        """Layers L, packable or not."""
        return len(self.layers)

    @property
    def packable_layers(self) -> tuple[int, ...]:
        """Indices of the layers that may be stored packed."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_packable)


def num_cache_layers(config: Any) -> int:
    """Layers of a cache the installed transformers makes.

    Up to 5.17 it makes none for the last layers of a model where those reuse an earlier layer's.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    return len(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0])


def _layer_types_and_windows(decoder: Any) -> tuple[list[str], list[int | None]]:
    """Resolve layer types and sliding windows as transformers' own cache classes do."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    layer_types, kwargs = get_layer_types_and_kwargs(decoder)
    if not layer_types:
        raise UnsupportedModelError(
            f"config must describe at least one layer, got {decoder.model_type!r} with none"
        )
    # transformers <= 5.17 returns one dict for all layers, later ones a list with one per layer.
    per_layer = [kwargs] * len(layer_types) if isinstance(kwargs, dict) else kwargs
    windows = [
        None if layer_type == PACKABLE_LAYER_TYPE else each.get("sliding_window")
        for layer_type, each in zip(layer_types, per_layer, strict=True)
    ]
    # ... and leaves out layers that reuse another layer's cache, which later ones call "dummy".
    num_shared = max(0, (getattr(decoder, "num_hidden_layers", 0) or 0) - len(layer_types))
    return [*layer_types, *[SHARING_LAYER_TYPE] * num_shared], [*windows, *[None] * num_shared]


def _layer_configs(decoder: Any, num_layers: int) -> list[Any]:
    """One config per layer; the same one throughout unless the model is heterogeneous."""
    if getattr(decoder, "is_heterogeneous", False):
        return list(decoder.per_layer_config)
    return [decoder] * num_layers


def _layer_geometry(layer_type: str, window: int | None, config: Any) -> LayerGeometry:
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:  # MLA caches the latent and the rotary key part, one shared head each
        heads, key_dim, value_dim = 1, rank, _required(config, "qk_rope_head_dim")
    else:
        is_sliding = window is not None
        heads = _num_key_value_heads(config, is_sliding)
        key_dim = _first(config, is_sliding, "head_dim", "kv_channels")
        if key_dim is None:
            key_dim = _required(config, "hidden_size") // _required(config, "num_attention_heads")
        value_dim = _first(config, is_sliding, "v_head_dim") or key_dim
    return LayerGeometry(
        layer_type=layer_type,
        num_key_value_heads=heads,
        key_head_dim=key_dim,
        value_head_dim=value_dim,
        sliding_window=window,
    )


def _num_key_value_heads(config: Any, is_sliding: bool) -> int:
    if getattr(config, "new_decoder_architecture", False):
        return _required(config, "num_attention_heads")  # Falcon repeats the heads before caching
    if getattr(config, "multi_query", False):
        return 1
    heads = _first(config, is_sliding, "num_key_value_heads", "num_kv_heads")
    return heads if heads is not None else _required(config, "num_attention_heads")


def _first(config: Any, is_sliding: bool, *names: str) -> int | None:
    """The first of the attributes that is set; sliding layers may have their own (``swa_``)."""
    candidates = [f"swa_{name}" for name in names] if is_sliding else []
    for name in [*candidates, *names]:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return None


def _required(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(
            f"config.{name} must be a positive integer, got {value!r} "
            f"for model type {getattr(config, 'model_type', '?')!r}"
        )
    return value
