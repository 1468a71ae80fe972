"""The rotary embedding of a model, as far as a codec must know it to turn keys back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvbits.codecs import Codec, EncodeContext, PreRope
from kvbits.errors import UnsupportedModelError
from kvbits.geometry import LayerGeometry

# Decoders of transformers that rotate channel i with channel i + half, and keys only once.
HALVES = frozenset(
    (
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        *("phi", "phi3", "gemma", "gemma2", "gemma3_text", "gpt_oss"),
        *("granite", "olmo", "olmo2", "starcoder2", "stablelm"),
    )
)
# Their frequencies depend on the length of the context.
CHANGING = frozenset({"dynamic", "longrope"})


def frequencies(layer: LayerGeometry, config: Any) -> tuple[float, ...]:
    """Radians per token of every pair of channels of a layer's keys.

    Scaling of the context is in them; the factor that YaRN puts on keys is none of the rotation
    and stays in the keys.

    Raises:
        UnsupportedModelError: If the model has another rotary embedding, or none.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    decoder = config.get_text_config(decoder=True)
    if decoder.model_type not in HALVES:
        raise UnsupportedModelError(
            f"model_type must be one whose rotary embedding is known, such as llama or qwen3, for "
            f"keys to be stored before it, got {decoder.model_type!r}"
        )
    found = getattr(decoder, "rope_parameters", None) or {}
    is_by_type = layer.layer_type in found
    rope = found[layer.layer_type] if is_by_type else found
    kind = rope.get("rope_type", "default")
    if kind in CHANGING:
        raise UnsupportedModelError(
            f"rope_type must not depend on the length for keys to be stored before the rotary "
            f"embedding, got {kind!r}"
        )
    if kind != "default":
        settings = {"layer_type": layer.layer_type} if is_by_type else {}
        values, _ = ROPE_INIT_FUNCTIONS[kind](decoder, device="cpu", **settings)
        return tuple(values.double().tolist())
    share = rope.get("partial_rotary_factor") or getattr(decoder, "partial_rotary_factor", None)
    width = int(layer.key_head_dim * (share or 1.0))
    theta = float(rope["rope_theta"])
    return tuple(theta ** (-channel / width) for channel in range(0, width, 2))


def before_rotary(codec: Codec, states: Tensor, first_position: int) -> Tensor:
    """Keys ``[B, H_kv, T, D]``, or their gradients, as ``codec`` turns them back.

    Args:
        codec: The codec of the keys.
        states: Of tokens that follow each other.
        first_position: Position of the first of them.
    """
    assert isinstance(codec, PreRope)
    stop = first_position + states.shape[-2]
    positions = torch.arange(first_position, stop, device=states.device)[None]
    return codec.apply(states.float(), EncodeContext(positions))
