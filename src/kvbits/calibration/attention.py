"""Every layer's queries, keys and values on a document, as its attention sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kvbits.errors import CalibrationError

OBSERVER_NAME = "kvbits_observe"
QUERY_CHUNK = 256

Observer: TypeAlias = Callable[["Observed"], None]


class Observed(NamedTuple):
    """One layer's attention over one document, at full precision."""

    layer_idx: int
    query: Tensor  # [H_q, Q, D], a sample of the positions
    key_states: Tensor  # [H_kv, T, D], as they enter the cache
    value_states: Tensor  # [H_kv, T, D_v]
    mask: Tensor  # [Q, T], additive
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None  # [H_q]

    def of_head(self, head: int) -> Observed:
        """Return what one key/value head sees: its states and the queries that read them."""
        repeats = self.query.shape[0] // self.key_states.shape[0]
        mine = slice(head * repeats, (head + 1) * repeats)
        return self._replace(
            query=self.query[mine],
            key_states=self.key_states[head : head + 1],
            value_states=self.value_states[head : head + 1],
            sink_logits=None if self.sink_logits is None else self.sink_logits[mine],
        )

    def weights(self, key_states: Tensor) -> Tensor:
        """Return the attention weights ``[H_q, Q, T]`` over the given keys, float32."""
        return attention_weights(
            self.query, key_states, self.mask, self.scaling, self.softcap, self.sink_logits
        )

    def check(self) -> None:
        """Raise ``CalibrationError`` if states or queries hold NaN or infinity."""
        check_finite("key_states", self.key_states, self.layer_idx)
        check_finite("value_states", self.value_states, self.layer_idx)
        check_finite("queries", self.query, self.layer_idx)


def check_finite(name: str, found: Tensor, layer_idx: int) -> None:
    """Raise ``CalibrationError`` if something seen of a layer holds NaN or infinity."""
    if not found.isfinite().all():
        raise CalibrationError(
            f"{name} must be finite, got NaN or infinity in layer {layer_idx}; "
            "check the model's weights and dtype"
        )


def attention_weights(
    query: Tensor,
    key_states: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return softmax(q Kᵀ scaling + mask), ``[..., H_q, Q, T]``.

    ``softcap`` is Gemma 2's cap on the scores, ``sink_logits`` GPT-OSS's extra column.
    """
    repeats = query.shape[-3] // key_states.shape[-3]
    keys = key_states.float().repeat_interleave(repeats, dim=-3)
    scores = (query.float() * scaling) @ keys.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask.float()
    if sink_logits is None:
        return scores.softmax(-1)
    sinks = sink_logits.float().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


@contextmanager
def observed_attention(model: Any, observer: Observer, *, num_queries: int) -> Iterator[None]:
    """Run the model's attention in plain PyTorch and show every layer's states to ``observer``.

    Args:
        model: A transformers decoder that follows the attention interface.
        observer: Called once per layer and forward; batches must hold one document.
        num_queries: Most query positions to show, evenly spaced, the last one included.
    """
    from transformers.masking_utils import eager_mask

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        picked = _sample_positions(query.shape[2], num_queries)
        mask = attention_mask[0, 0, :, : key.shape[2]]
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        observer(
            Observed(
                layer_idx,
                query[0, :, picked],
                key[0],
                value[0],
                mask[picked],
                scale,
                softcap,
                s_aux,
            )
        )
        repeats = query.shape[1] // value.shape[1]
        values = value.float().repeat_interleave(repeats, dim=1)
        parts = [
            attention_weights(q, key, m, scale, softcap, s_aux) @ values
            for q, m in zip(
                query.split(QUERY_CHUNK, dim=2), mask.split(QUERY_CHUNK, dim=0), strict=True
            )
        ]
        return torch.cat(parts, dim=2).to(query.dtype).transpose(1, 2).contiguous(), None

    with attending_by(model, attend, eager_mask):
        yield


@contextmanager
def attending_by(
    model: Any, attend: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """Have a model attend by a function of the attention interface, with masks of ``mask``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(OBSERVER_NAME, attend)
    AttentionMaskInterface.register(OBSERVER_NAME, mask)
    former = model.config._attn_implementation
    model.set_attn_implementation(OBSERVER_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(former)


def _sample_positions(num_positions: int, limit: int) -> Tensor:
    count = min(num_positions, limit)
    return torch.linspace(num_positions / count - 1, num_positions - 1, count).round().long()
