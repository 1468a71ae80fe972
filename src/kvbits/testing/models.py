"""Tiny random decoders of eight model families, built from a config and a seed.

The families differ where caches do: grouped heads, sliding and hybrid layers, sink logits, key
norms, fused projections, latent attention.
"""

from __future__ import annotations

from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_HYBRID = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}

# family: prefix of the transformers classes, suffix of the config class, what differs
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "Config", {}),
    "mistral": ("Mistral", "Config", {"sliding_window": 16}),
    "qwen2": ("Qwen2", "Config", {}),
    "qwen3": ("Qwen3", "Config", {}),
    "gemma3": ("Gemma3", "TextConfig", _HYBRID),
    "gpt_oss": ("GptOss", "Config", _HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3", "Config", {"sliding_window": None}),
    "deepseek_v2": (
        "DeepseekV2",
        "Config",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)
"""Names ``tiny_model`` knows."""


def tiny_config(family: str, **overrides: Any) -> Any:
    """Make the config of a tiny decoder.

    Args:
        family: One of ``FAMILIES``.
        **overrides: Config fields to change.

    Raises:
        ValueError: If the family is unknown.
    """
    import transformers

    if family not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    prefix, suffix, fields = _FAMILIES[family]
    return getattr(transformers, prefix + suffix)(**(_COMMON | fields | overrides))


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Build a random decoder of four layers in float32, in evaluation mode.

    Args:
        family: One of ``FAMILIES``.
        seed: Seed of the weights; the caller's random state is left as it was.
        **overrides: Config fields to change.
    """
    import transformers

    config = tiny_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, _FAMILIES[family][0] + "ForCausalLM")(config).eval()
