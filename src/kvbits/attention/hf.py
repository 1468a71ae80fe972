"""The attention and mask functions registered with transformers, and how a model takes them.

``update()`` of a packed layer hands the model a ``StatesHandle``; the function registered here
takes the packed states out of it. Without it (``enable`` not called, or a model that works on its
keys first) the handle materialises the dense tensors and the model's own attention runs.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvbits.attention.api import attend
from kvbits.attention.states import LayerStates, SideStates, StatesHandle
from kvbits.errors import UnsupportedModelError

ATTENTION_NAME = "kvbits"
_FORMER = "_kvbits_former_attention"
_PLAIN = "_kvbits_is_plain"  # marks a mask that holds nothing but causality, window and padding


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to packed states; dense keys and values go to transformers' SDPA unchanged.

    Args:
        module: The attention module that calls.
        query: ``[B, H_q, Q, D]``.
        key: A handle from a packed layer, or dense ``[B, H_kv, T, D]``.
        value: Like ``key``.
        attention_mask: Boolean or additive ``[B, 1, Q, T]``, or None for causal.
        dropout: Must be 0 over packed states.
        scaling: Factor on the scores; default ``D ** -0.5``.
        softcap: Cap on the scores (Gemma 2).
        s_aux: Sink logits ``[H_q]`` (GPT-OSS).
        sliding_window: Newest tokens a query sees, as the mask says too.

    Returns:
        ``[B, Q, H_q, D_v]`` and None, as transformers expects.
    """
    is_packed = isinstance(key, StatesHandle)
    is_plain = getattr(attention_mask, _PLAIN, False)
    if not is_packed and softcap is None and s_aux is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if dropout or kwargs.get("position_bias") is not None:
        name = "dropout" if dropout else "position_bias"
        raise UnsupportedModelError(
            f"{name} must be unset with kvbits attention, got {dropout or 'a tensor'}; "
            "call kvbits.disable(model) to use the model's own attention"
        )
    states = key.source if isinstance(key, StatesHandle) else dense_states(key, value, query)
    output = attend(
        query,
        states,
        attention_mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_plain=is_plain,
        softcap=softcap,
        window=sliding_window,
        sink_logits=s_aux,
    )
    return output, None


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Make transformers' SDPA mask, and mark it where kernels need not read it.

    transformers forbids skipping a mask exactly when a model composed it with something of its
    own; a mask it may skip is causal, within the window or chunk, with the padding of the 2-D
    mask. All but chunks a packed cache knows. A lone query without padding sees everything.
    """
    is_plain = allow_is_causal_skip and not getattr(config, "attention_chunk_size", None)
    if is_plain and q_length == 1 and attention_mask is None:
        return None
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        *args,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        config=config,
        **kwargs,
    )
    if mask is not None and is_plain:
        setattr(mask, _PLAIN, True)
    return mask


def dense_states(key: Tensor, value: Tensor, query: Tensor) -> LayerStates:
    """View dense keys and values ``[B, H_kv, T, D]`` as states without a packed part."""
    nothing = np.zeros((key.shape[0], query.shape[2]), dtype=np.int64)
    sides = [
        SideStates(stores=(), sinks=states[:, :, :0], tail=states, decoded_until=nothing)
        for states in (key, value)
    ]
    return LayerStates(
        key=sides[0], value=sides[1], num_tokens=key.shape[2], padding=[0] * key.shape[0]
    )


class enable:
    """Make ``model`` attend to packed states; undo with ``disable`` or by leaving the context.

    Sets the attention and the mask function of this model only. Registering one without the other
    would leave left-padded rows silently unmasked.

    Args:
        model: A transformers decoder.
    """

    def __init__(self, model: Any) -> None:
        AttentionInterface.register(ATTENTION_NAME, packed_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, packed_mask)
        self._model = model
        self._was_enabled = is_enabled(model)
        if not self._was_enabled:
            setattr(model, _FORMER, model.config._attn_implementation)
            model.set_attn_implementation(ATTENTION_NAME)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._was_enabled:
            disable(self._model)


def disable(model: Any) -> None:
    """Give ``model`` back the attention it had before ``enable``; does nothing otherwise."""
    if is_enabled(model):
        model.set_attn_implementation(getattr(model, _FORMER))
        delattr(model, _FORMER)


def is_enabled(model: Any) -> bool:
    """Whether ``model`` attends to packed states."""
    return hasattr(model, _FORMER)
