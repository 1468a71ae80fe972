"""The only file of the replay that touches transformers: entries of a cache, and queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvbits.errors import UnsupportedModelError
from kvbits.geometry import ModelGeometry

WATCHER_NAME = "kvbits_replay"
PLAIN_LAYERS = ("full_attention", "sliding_attention")


def check_model(model: Any) -> ModelGeometry:
    """Refuse a model whose cache is not keys and values of every token in every layer.

    Raises:
        UnsupportedModelError: With the first layer that is not.
    """
    geometry = ModelGeometry.from_config(model.config)
    for index, layer in enumerate(geometry.layers):
        if layer.layer_type not in PLAIN_LAYERS:
            raise UnsupportedModelError(
                f"layer {index} must keep keys and values of every token to be replayed, got a "
                f"{layer.layer_type!r} layer"
            )
    return geometry


def entries_of(cache: Any) -> list[Tensor]:
    """Clones of everything a cache holds ``[1, H_kv, T, D]``: keys of all layers, then values."""
    keys = [layer.keys.detach().clone() for layer in cache.layers]
    return keys + [layer.values.detach().clone() for layer in cache.layers]


def cache_of(entries: Sequence[Tensor]) -> Any:
    """A new cache that holds these entries; a sliding layer keeps all of them, and masks."""
    cache = DynamicCache()
    half = len(entries) // 2
    for layer, (key, value) in enumerate(zip(entries[:half], entries[half:], strict=True)):
        cache.update(key, value, layer)
    return cache


def next_logits(model: Any, ids: Sequence[int], cache: Any) -> Tensor:
    """Logits ``[V]`` after the last of ``ids``, float32; the cache grows by them."""
    given = torch.tensor([list(ids)], device=model.device)
    logits: Tensor = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1].float()


class Queries:
    """The newest queries of every layer, after the rotary embedding.

    Args:
        most: How many to keep.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._is_paused = False
        self._kept: dict[int, tuple[Tensor, float]] = {}  # [H_q, N, D] and the factor of scores

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep nothing of what runs inside: a forward that is only looked at."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def see(self, layer: int, query: Tensor, scaling: float | None) -> None:
        """Keep the newest of ``[1, H_q, Q, D]``."""
        if self._is_paused:
            return
        former = self._kept.get(layer)
        both = query[0] if former is None else torch.cat([former[0], query[0]], 1)
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._kept[layer] = (both[:, -self._most :].detach().clone(), factor)

    def largest_weights(self, layer: int, keys: Tensor, newest: int) -> Tensor:
        """The largest weight that each token got from the ``newest`` queries, ``[H_kv, T]``.

        softmax(q Kᵀ scaling) with a causal mask, float32; a key/value head takes the largest of
        its query heads.

        Args:
            layer: The layer.
            keys: ``[1, H_kv, T, D]``, the last of them the newest query's own.
            newest: How many queries count.
        """
        query, scaling = self._kept[layer]
        query = query[:, -newest:].float()
        heads, num_tokens = keys.shape[1:3]
        groups = query.unflatten(0, (heads, -1))  # [H_kv, group, N, D]
        scores = groups @ keys[0].float()[:, None].transpose(-1, -2) * scaling
        position = torch.arange(num_tokens, device=keys.device)
        own = position[num_tokens - query.shape[1] :]
        scores = scores.masked_fill(position > own[:, None], -torch.inf)
        return scores.softmax(-1).amax((1, 2))


@contextmanager
def watched_queries(model: Any, queries: Queries) -> Iterator[None]:
    """Show ``queries`` every query of the model; its attention stays the one it has.

    Raises:
        UnsupportedModelError: If the model's attention is no registered function.
    """
    former = model.config._attn_implementation
    if former not in ALL_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"model must run attention by a registered function to have its queries read, got "
            f"{former!r}; load it with attn_implementation='sdpa'"
        )
    attend = ALL_ATTENTION_FUNCTIONS[former]

    def watch(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries.see(int(module.layer_idx), query, kwargs.get("scaling"))
        return attend(module, query, *args, **kwargs)

    AttentionInterface.register(WATCHER_NAME, watch)
    AttentionMaskInterface.register(WATCHER_NAME, ALL_MASK_ATTENTION_FUNCTIONS[former])
    model.set_attn_implementation(WATCHER_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(former)
