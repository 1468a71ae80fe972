"""The only file that touches transformers' cache classes: packed layers inside a stock ``Cache``.

Layers that are not full attention, and layers whose plan is exact on both sides, are the stock
layers, so at 16 bits the model runs bit for bit as it would without kvbits.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvbits.attention.api import Impl
from kvbits.attention.states import StatesHandle
from kvbits.cache.layer import PackedLayer
from kvbits.cache.stepping import Clocks
from kvbits.errors import PlanError, UnsupportedModelError
from kvbits.layer_plan import LayerPlan

_HOOK = "_kvbits_padding_hook"


class PackedCacheLayer(DynamicLayer):  # type: ignore[misc]
    """transformers' view of a ``PackedLayer``: lengths, crop, reorder, repeat, select, offload."""

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, packed: PackedLayer) -> None:
        super().__init__()
        self.packed = packed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Models may ask for their shape. A plain slice would keep the prompt's states alive.
        self.keys, self.values = (x[:, :, :0].clone() for x in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states; return handles, or the states themselves for an exact first prefill."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_first = self.packed.num_tokens == 0
        states = self.packed.update(key_states, value_states)
        if is_first and key_states.shape[-2] > 1 and not self.packed.quantize_prefill:
            return key_states, value_states
        return (
            StatesHandle(states, "key", key_states.dtype),
            StatesHandle(states, "value", value_states.dtype),
        )

    def get_seq_length(self) -> int:
        return self.packed.num_tokens

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.22

    def reset(self) -> None:
        self.packed = self.packed.renewed()
        self.keys = self.values = None  # type: ignore[assignment]  # as the stock layer does
        self.is_initialized = False

    def activate_past_recording(self) -> None:
        """Hold flushes back until each following ``crop``, so that drafts are never packed.

        Assisted generation leaves this on; ``record_past = False`` ends it.
        """
        self.packed.is_recording = True

    @property
    def record_past(self) -> bool:
        """Whether flushes wait for a crop."""
        return self.packed.is_recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.packed.is_recording = value

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` tokens; a positive number is an absolute length."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        self.packed.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.packed.map_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = range(len(self.packed.padding))
        self.packed.map_rows([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(len(self.packed.padding), device=indices.device)
        self.packed.map_rows(rows[indices].tolist())

    def offload(self) -> None:
        self.packed.to(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.packed.to(self.device)


class QuantizedCache(Cache):  # type: ignore[misc]
    """A cache that stores each layer as its plan says.

    Args:
        plans: One plan per layer.
        config: The model's config; decides which layers may be packed.
        quantize_prefill: See ``PackedLayer``.
        offloading: Keep layers in CPU memory while they are not used (CUDA only).
        impl: See ``PackedLayer``.
        max_tokens: Reserve room for this many tokens a row, padding included. Every layer then
            lies in pages, exact ones too, and a step allocates nothing; sliding layers keep all
            tokens.

    Raises:
        PlanError: If the number of layers differs, or a layer that is not full attention would be
            packed.
        UnsupportedModelError: If room cannot be reserved for a layer of the model.
    """

    def __init__(
        self,
        plans: Sequence[LayerPlan],
        config: Any,
        *,
        quantize_prefill: bool = False,
        offloading: bool = False,
        impl: Impl = "auto",
        max_tokens: int | None = None,
    ) -> None:
        layers = DynamicCache(config=config).layers
        if len(plans) != len(layers):
            raise PlanError(
                f"plan must have one entry for each of the model's {len(layers)} layers, "
                f"got {len(plans)}; rebuild the plan for this model"
            )
        clocks = Clocks()
        for index, plan in enumerate(plans):
            if plan.is_exact and max_tokens is None:
                continue
            _check_layer(index, layers[index], plan)
            packed = PackedLayer(
                plan,
                layer_idx=index,
                quantize_prefill=quantize_prefill,
                impl=impl,
                max_tokens=max_tokens,
                clocks=clocks,
            )
            layers[index] = PackedCacheLayer(packed)
        super().__init__(layers=layers, offloading=offloading)
        self.plans = tuple(plans)
        self.quantize_prefill = quantize_prefill
        self.max_tokens = max_tokens

    @property
    def packed_layers(self) -> dict[int, PackedLayer]:
        """The packed layers by index."""
        return {
            index: layer.packed
            for index, layer in enumerate(self.layers)
            if isinstance(layer, PackedCacheLayer)
        }

    @property
    def nbytes(self) -> int:
        """Bytes allocated for cached states: packed layers, stock layers and page tables."""
        return sum(map(layer_nbytes, self.layers))

    @property
    def peak_nbytes(self) -> int:
        """Most bytes held so far: layers fill one by one, each exact before it is packed."""
        extra = [layer.peak_nbytes - layer.nbytes for layer in self.packed_layers.values()]
        return self.nbytes + max([0, *extra])

    @property
    def num_reencoded_tokens(self) -> int:
        """Tokens, over layers and sides, that crops returned from blocks to the residual."""
        return sum(layer.num_reencoded_tokens for layer in self.packed_layers.values())

    @property
    def is_packed(self) -> bool:
        """Whether every layer lies in pages; exact layers do if room was reserved."""
        return len(self.packed_layers) == len(self.layers)

    @property
    def steps_on_device(self) -> bool:
        """Whether all layers took their last token by kernels alone, on one device."""
        layers = self.packed_layers.values()
        is_one = len({layer.device for layer in layers}) == 1
        return self.is_packed and is_one and all(layer.is_stepping for layer in layers)

    def check_finite(self) -> None:
        """Raise ``CalibrationError`` if decode steps brought states that are not finite."""
        for layer in self.packed_layers.values():
            layer.check_finite()

    def count_replayed_step(self) -> None:
        """Count a decode step that a captured graph replays."""
        for layer in self.packed_layers.values():
            layer.count_replayed_step()

    def expect_tokens(self, num_tokens: int) -> None:
        """Launch the next steps so that they suit rows of up to ``num_tokens``."""
        for layer in self.packed_layers.values():
            layer.expect_tokens(num_tokens)

    def set_padding(self, padding: Sequence[int] | Tensor) -> None:
        """Declare the left padding of every row before the prompt arrives.

        ``plan.new_cache(model)`` does this from the 2-D attention mask; needed only when states
        reach the cache without the model's forward.
        """
        rows = padding.tolist() if isinstance(padding, Tensor) else list(padding)
        for layer in self.packed_layers.values():
            layer.set_padding(rows)


def _check_layer(index: int, layer: Any, plan: LayerPlan) -> None:
    """Refuse a layer that cannot lie in pages under its plan."""
    if type(layer) is DynamicLayer:
        return
    if not plan.is_exact:
        raise PlanError(
            f"layer {index} must be full attention to be packed, got {type(layer).__name__}; "
            "give it 16 bits in the plan"
        )
    if type(layer) is not DynamicSlidingWindowLayer:
        raise UnsupportedModelError(
            f"layer {index} must be full or sliding attention to have room reserved, got "
            f"{type(layer).__name__}; leave max_tokens out"
        )


def layer_nbytes(layer: Any) -> int:
    """Bytes of a layer's cached states, packed or of transformers' own."""
    if isinstance(layer, PackedCacheLayer):
        return layer.packed.nbytes
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def watch_padding(model: Any) -> None:
    """Let ``model`` tell packed caches the left padding of its 2-D attention mask; idempotent."""
    if not hasattr(model, _HOOK):
        hook = model.register_forward_pre_hook(_declare_padding, with_kwargs=True)
        setattr(model, _HOOK, weakref.ref(hook))


def _declare_padding(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if len(args) > 1:  # the mask, and perhaps the cache, by position
        kwargs = (
            dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        )
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, QuantizedCache) or not cache.packed_layers:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    num_tokens = cache.get_seq_length()
    if mask.shape[1] == num_tokens + 1 and not _awaits_padding(cache, num_tokens):
        return  # a decode step adds no padding; reading the mask would wait for the device
    real = mask.bool()
    padding = (~real).int().cumprod(-1).sum(-1)  # the whole width where a chunk holds no token yet
    if not bool((real.sum(-1) == real.shape[-1] - padding).all()):
        raise ValueError(
            "attention_mask must be left-padded (zeros, then ones) with a packed cache, got zeros "
            "after ones; pad prompts on the left"
        )
    cache.set_padding(padding)


def _awaits_padding(cache: QuantizedCache, num_tokens: int) -> bool:
    """Whether nothing is stored yet, or some row has had nothing but padding so far."""
    layer = next(iter(cache.packed_layers.values()))
    return num_tokens == 0 or any(padding >= num_tokens for padding in layer.padding)
