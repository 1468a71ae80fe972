"""Teacher forcing through the cache: the one path on which quality is measured.

Running a model once over a text never reads the cache back, so quantization would change nothing.
Here the text goes through ``plan.new_cache(model, quantize_prefill=True)`` in chunks, where every
query sees what decoding one token at a time would show it; how the text is cut into chunks
changes neither the cache nor the logits.

A plan that leaves the layers before ``l`` exact can be restarted at layer ``l`` from the hidden
states that `capture_layer_inputs` stored in a full-precision pass: the same model, cache and
attention run, on fewer layers.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache

from kvbits.attention.hf import enable
from kvbits.calibration.placement import input_device
from kvbits.errors import UnsupportedModelError
from kvbits.evaluation.restart import (
    LayerInputs,
    can_skip_in_chunks,
    capturing,
    layer_list,
    resuming,
    skip_cache_layers,
)
from kvbits.plan import CachePlan

DEFAULT_CHUNK = 512


def stream_logits(
    model: Any,
    input_ids: torch.Tensor,
    plan: CachePlan | None = None,
    *,
    chunk_tokens: int = DEFAULT_CHUNK,
    keep: torch.Tensor | None = None,
    start_layer: int = 0,
    layer_inputs: LayerInputs | None = None,
    cache: Any = None,
) -> Iterator[torch.Tensor]:
    """Yield a batch's next-token logits, chunk by chunk, as decoding through the cache gives them.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[B, T]``, padded on the right if at all.
        plan: the cache plan; None means full precision, with `DynamicCache` and the model's own
            attention.
        chunk_tokens: tokens of a forward pass; changes speed and memory, not results.
        keep: ``[T]`` bool, the positions whose logits are wanted, all if None. Nothing after the
            last one is run.
        start_layer: first layer to run; the plan must leave the layers before it exact.
        layer_inputs: what `capture_layer_inputs` returned for the same ids; needed if
            ``start_layer`` is above 0.
        cache: an empty cache to fill, made from the plan if None; give one to read its bytes
            afterwards.

    Yields:
        ``[B, Q, V]`` logits in the model's dtype, for the kept positions of each chunk that has
        any.
    """
    _check_arguments(input_ids, chunk_tokens, keep, plan, start_layer, layer_inputs)
    keep = torch.ones(input_ids.shape[1], dtype=torch.bool) if keep is None else keep.cpu()
    num_tokens = int(keep.nonzero().max()) + 1 if bool(keep.any()) else 0
    cache = new_cache(model, plan) if cache is None else cache
    step_tokens = chunk_tokens if plan is None or reads_packed(model) else 1
    start_layer = start_layer if step_tokens == chunk_tokens else 0
    if start_layer and not can_skip_in_chunks(cache, start_layer) and num_tokens > chunk_tokens:
        start_layer = 0
    for start in range(0, num_tokens, chunk_tokens):
        stop = min(start + chunk_tokens, num_tokens)
        columns = keep[start:stop].nonzero()[:, 0]
        resumed: AbstractContextManager[None] = nullcontext()
        if start_layer and layer_inputs is not None:
            skip_cache_layers(cache, start_layer, start)
            resumed = resuming(model, start_layer, layer_inputs.chunk(start_layer, start, stop))
        # not held open over the yield: the caller may use the model in between
        with attention_for(model, plan), resumed, torch.no_grad():
            ids = input_ids[:, start:stop].to(input_device(model))
            logits = _forward_in_steps(model, ids, cache, columns, step_tokens)
        if len(columns):
            yield logits


def reads_packed(model: Any) -> bool:
    """Return whether several queries at a time can see packed states as decoding shows them.

    They can where the model attends to the states it caches through transformers' attention
    interface. Others (latent attention, attention of a model's own) are run token by token, which
    is as exact and much slower.
    """
    if model not in _READS_PACKED:
        probe = CachePlan.uniform(model.config, 8, 8)
        ids = torch.zeros(1, 3, dtype=torch.int64, device=input_device(model))
        try:
            with enable(model), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(input_ids=ids, past_key_values=new_cache(model, probe), use_cache=True)
            _READS_PACKED[model] = True
        except UnsupportedModelError:
            _READS_PACKED[model] = False
    return _READS_PACKED[model]


_READS_PACKED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def capture_layer_inputs(
    model: Any, input_ids: torch.Tensor, *, chunk_tokens: int = DEFAULT_CHUNK
) -> LayerInputs | None:
    """Store the hidden states that enter every decoder layer in a full-precision pass.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[B, T]``, padded on the right if at all.
        chunk_tokens: tokens of a forward pass.

    Returns:
        The states on the CPU in the model's dtype, or None if the model's decoder layers cannot
        be told apart from its other modules; measurements then run all layers.
    """
    keep = torch.zeros(input_ids.shape[1], dtype=torch.bool)
    keep[-1] = True  # the pass has to reach the last token; its logits are not used
    with capturing(model) as captured:
        for _ in stream_logits(model, input_ids, chunk_tokens=chunk_tokens, keep=keep):
            pass
    return captured.collect()


def new_cache(model: Any, plan: CachePlan | None, *, quantize_prefill: bool = True) -> Any:
    """Return the empty cache of a plan, or a `DynamicCache` for None."""
    if plan is None:
        return DynamicCache(config=model.config)
    return plan.new_cache(model, quantize_prefill=quantize_prefill)


@contextmanager
def attention_for(model: Any, plan: CachePlan | None) -> Iterator[None]:
    """Give the model the attention that reads packed caches, and afterwards its own."""
    if plan is None:
        yield
        return
    with enable(model):
        yield


def cache_nbytes(cache: Any) -> int:
    """Return the bytes a cache holds: its own account, or the states of a `DynamicCache`."""
    own = getattr(cache, "nbytes", None)
    if own is not None:
        return int(own)
    states = [
        state
        for layer in cache.layers
        for state in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if state is not None
    ]
    return sum(state.nbytes for state in states)


def skipped_nbytes(model: Any, plan: CachePlan, layers: int, num_tokens: int) -> int:
    """Return the bytes that the first ``layers`` layers, exact and not run, would have held.

    Args:
        model: the model; its dtype is that of exact states.
        plan: the plan.
        layers: number of skipped layers.
        num_tokens: cached tokens, over all rows.
    """
    values = sum(layer.values_per_token for layer in plan.model.layers[:layers])
    return int(values * num_tokens * model.dtype.itemsize)


def first_quantized_layer(plan: CachePlan) -> int:
    """Return the index of the first layer that is not exact; 0 if all are exact."""
    return next((i for i, layer in enumerate(plan.layers) if not layer.is_exact), 0)


def _forward_in_steps(
    model: Any, ids: torch.Tensor, cache: Any, columns: torch.Tensor, step_tokens: int
) -> torch.Tensor:
    """Run a chunk at once, or in steps of one token; return the logits of ``columns``."""
    if step_tokens >= ids.shape[1]:
        return _forward(model, ids, cache, columns)
    kept, wanted = [], set(columns.tolist())
    for position in range(ids.shape[1]):
        here = torch.zeros(int(position in wanted), dtype=torch.int64)
        logits = _forward(model, ids[:, position : position + 1], cache, here)
        if len(here):
            kept.append(logits)
    return torch.cat(kept, dim=1) if kept else logits[:, :0]


def _forward(model: Any, ids: torch.Tensor, cache: Any, columns: torch.Tensor) -> torch.Tensor:
    """Run one chunk and return the logits of ``columns`` only, [B, len(columns), V]."""
    arguments = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        columns = columns if len(columns) else torch.zeros(1, dtype=torch.int64)
        kept: torch.Tensor = model(**arguments, logits_to_keep=columns.to(ids.device)).logits
        return kept
    logits: torch.Tensor = model(**arguments).logits
    return logits[:, columns.to(logits.device)]


def _check_arguments(
    input_ids: torch.Tensor,
    chunk_tokens: int,
    keep: torch.Tensor | None,
    plan: CachePlan | None,
    start_layer: int,
    layer_inputs: LayerInputs | None,
) -> None:
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [B, T] with T > 0, got shape {list(input_ids.shape)}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if keep is not None and tuple(keep.shape) != (input_ids.shape[1],):
        raise ValueError(
            f"keep must have shape [{input_ids.shape[1]}], one flag per position, "
            f"got {list(keep.shape)}"
        )
    if start_layer == 0:
        return
    if layer_inputs is None or not 0 < start_layer < layer_inputs.num_layers:
        raise ValueError(
            f"start_layer must be 0 without layer_inputs, and below the number of layers, "
            f"got {start_layer}"
        )
    if plan is not None and not all(layer.is_exact for layer in plan.layers[:start_layer]):
        raise ValueError(
            f"start_layer must not skip a quantized layer, got {start_layer} for a plan whose "
            f"layer {first_quantized_layer(plan)} is quantized"
        )


__all__ = [
    "LayerInputs",
    "attention_for",
    "cache_nbytes",
    "capture_layer_inputs",
    "first_quantized_layer",
    "layer_list",
    "new_cache",
    "skipped_nbytes",
    "stream_logits",
]
