"""Save a cache to one safetensors file and load it back, bit for bit.

The file is data: tensors, and JSON in the header with the layout id, the plans and a checksum.
What the codecs of the plans were fitted with is in it too, so a cache needs no other file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvbits.cache.hf import PackedCacheLayer, QuantizedCache, watch_padding
from kvbits.cache.side import below
from kvbits.codecs.arrays import CONTEXT, Arrays, by_name
from kvbits.codecs.packing import LAYOUT_ID
from kvbits.errors import RecordError, UnsupportedModelError
from kvbits.layer_plan import LayerPlan

_FORMAT = "kvbits-cache-1"
_PLANS = TypeAdapter(tuple[LayerPlan, ...])
_ROOM = TypeAdapter(Annotated[int, Field(ge=1)] | None)


def save_cache(cache: QuantizedCache, path: str | Path) -> None:
    """Write ``cache`` to ``path``.

    Raises:
        UnsupportedModelError: If a layer keeps something other than keys and values.
    """
    fitted = by_name(array for plan in cache.plans for array in plan.arrays)
    tensors = {f"{CONTEXT}.{name}": tensor for name, tensor in fitted.items()}
    facts: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        own, fact = _export(layer, index)
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in own.items()}
        facts.append(fact)
    header = {
        "format": _FORMAT,
        "layout": LAYOUT_ID,
        "plans": _PLANS.dump_json(cache.plans).decode(),
        "layers": json.dumps(facts),
        "quantize_prefill": json.dumps(cache.quantize_prefill),
        "max_tokens": json.dumps(cache.max_tokens),
    }
    save_file(tensors, path, metadata=header | {"sha256": _checksum(tensors, header)})


def load_cache(path: str | Path, model: Any) -> QuantizedCache:
    """Read a cache that ``save_cache`` wrote, for a model of the same architecture.

    Raises:
        RecordError: If the file is not a kvbits cache, of another layout, or damaged.
        PlanError: If it does not fit the model.
    """
    tensors, header = _read(path)
    if header.pop("sha256", None) != _checksum(tensors, header):
        raise RecordError(f"path must match its checksum, got damaged states in {path}")
    try:
        fitted = Arrays(below(tensors, CONTEXT))
        plans = _PLANS.validate_json(header["plans"], context={CONTEXT: fitted})
        facts = json.loads(header["layers"])
        quantize_prefill = bool(json.loads(header["quantize_prefill"]))
        max_tokens = _ROOM.validate_json(header["max_tokens"])
    except (KeyError, ValueError, ValidationError) as error:
        raise RecordError(
            f"path must be a kvbits cache, got a damaged header in {path}"
        ) from error
    watch_padding(model)
    cache = QuantizedCache(
        plans, model.config, quantize_prefill=quantize_prefill, max_tokens=max_tokens
    )
    for index, (layer, fact) in enumerate(zip(cache.layers, facts, strict=True)):
        stored = below(tensors, str(index))
        own = {name: tensor.to(model.device) for name, tensor in stored.items()}
        _restore(layer, own, fact)
    return cache


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RecordError(
            f"path must be a readable safetensors file, got {path}: {error}"
        ) from error
    for name, expected in (("format", _FORMAT), ("layout", LAYOUT_ID)):
        if header.get(name) != expected:
            raise RecordError(
                f"{name} of a saved cache must be {expected!r}, got {header.get(name)!r} in {path}"
            )
    return tensors, header


def _export(layer: Any, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(layer, PackedCacheLayer):
        return layer.packed.export()
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UnsupportedModelError(
            f"layer {index} must keep keys and values to be saved, got {type(layer).__name__}"
        )
    if not layer.is_initialized:
        return {}, {}
    seen = getattr(layer, "cumulative_length", None)
    return {"keys": layer.keys, "values": layer.values}, {"cumulative_length": seen}


def _restore(layer: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    if isinstance(layer, PackedCacheLayer):
        layer.packed.restore(tensors, facts)
        if layer.packed.is_initialized:
            layer.lazy_initialization(tensors["key.tail"], tensors["value.tail"])
    elif tensors:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
        if facts["cumulative_length"] is not None:
            layer.cumulative_length = facts["cumulative_length"]


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
