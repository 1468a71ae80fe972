"""What a decode benchmark runs: caches by name, and batches of long contexts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache as StockQuantizedCache

from kvbits.attention.api import Impl
from kvbits.cache.hf import layer_nbytes
from kvbits.geometry import ModelGeometry
from kvbits.plan import CachePlan
from kvbits.plan.modes import Mode

_UNIFORM = re.compile(r"K(\d+)V(\d+)")
_KIVI = re.compile(r"kivi(\d*)")
_QUANTO = re.compile(r"quanto([24])")
FILL_VALUES = 1 << 27  # states drawn at once, over the batch: 256 MiB in 16 bits


class Variant(NamedTuple):
    """A cache to measure.

    Attributes:
        name: As the user wrote it.
        plan: None for a cache of transformers' own.
        quanto_bits: Width of its ``QuantizedCache`` on optimum-quanto; None: its ``DynamicCache``.
    """

    name: str
    plan: CachePlan | None
    quanto_bits: int | None = None

    def new_cache(self, model: Any, max_tokens: int | None = None, impl: Impl = "auto") -> Any:
        """An empty cache of this kind."""
        if self.quanto_bits is not None:
            return StockQuantizedCache("quanto", model.config, nbits=self.quanto_bits)
        if self.plan is None:
            return DynamicCache(config=model.config)
        return self.plan.new_cache(model, max_tokens=max_tokens, impl=impl)


def parse_variant(text: str, config: Any) -> Variant:
    """Read ``dynamic``, ``quanto4``, ``K4V2``, ``K4V2@kivi128``, a plan file or a KVTuner file.

    ``quanto4`` and ``quanto2`` are transformers' ``QuantizedCache``, which needs optimum-quanto.
    ``@kivi`` shares key scales per channel, over 32 tokens or as many as it says. A KVTuner file
    (``.yaml``) takes the same suffix.

    Raises:
        ValueError: If the text is none of these.
    """
    if text == "dynamic":
        return Variant(text, None)
    if quanto := _QUANTO.fullmatch(text):
        return Variant(text, None, int(quanto[1]))
    name, _, suffix = text.partition("@")
    mode, settings = _mode(suffix, text)
    path = Path(name)
    if path.suffix == ".json":
        return Variant(path.stem, CachePlan.load(path))
    if path.suffix in {".yaml", ".yml"}:
        plan = CachePlan.from_kvtuner_yaml(path, config, mode=mode, **settings)
        return Variant(path.stem + (f"@{suffix}" if suffix else ""), plan)
    pair = _UNIFORM.fullmatch(name)
    if pair is None:
        raise ValueError(
            "plan must be 'dynamic', 'quanto4', 'quanto2', a pair such as K4V2 or K4V2@kivi128, "
            f"or a .json or .yaml file, got {text!r}"
        )
    plan = CachePlan.uniform(config, int(pair[1]), int(pair[2]), mode=mode, **settings)
    return Variant(text, plan)


def _mode(suffix: str, text: str) -> tuple[Mode, dict[str, Any]]:
    if not suffix:
        return "per_token", {}
    kivi = _KIVI.fullmatch(suffix)
    if kivi is None:
        raise ValueError(f"plan must end in @kivi or @kivi128 after '@', got {text!r}")
    if not kivi[1]:
        return "kivi", {}
    # Groups of fewer channels cost a kernel more than they cost memory; keys decide quality.
    return "kivi", {"group_size": int(kivi[1])}


def cache_bytes(cache: Any) -> int:
    """Bytes of cached states, of a packed or a stock cache."""
    return sum(map(layer_nbytes, cache.layers)) + sum(map(_quanto_nbytes, cache.layers))


def _quanto_nbytes(layer: Any) -> int:
    """Bytes of what a layer of transformers' ``QuantizedCache`` has quantized."""
    tensors = (getattr(layer, f"_quantized_{name}", None) for name in ("keys", "values"))
    return sum(_inner_nbytes(tensor) for tensor in tensors if tensor is not None)


def _inner_nbytes(tensor: Tensor) -> int:
    """Bytes of the tensors inside a tensor subclass; of a plain tensor, its own."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_inner_nbytes(getattr(tensor, name)) for name in names)


class Workload(NamedTuple):
    """Rows that hold ``context`` tokens each, and tokens to make."""

    batch: int
    context: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.context}"


def parse_shape(text: str) -> tuple[int, int]:
    """Read ``8x32768``: rows, tokens of a row.

    Raises:
        ValueError: If the text is no shape.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise ValueError(f"shape must be BATCHxCONTEXT such as 8x32768, got {text!r}")
    return int(match[1]), int(match[2])


@torch.no_grad()
def fill(model: Any, cache: Any, batch: int, num_tokens: int, *, seed: int = 0) -> None:
    """Append random states to every layer, through the cache's own update.

    Decoding takes as long over random states as over a text's, and a prompt need not be run.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    for index, layer in enumerate(ModelGeometry.from_config(model.config).layers):
        if not layer.holds_states:
            continue
        shapes = [
            (batch, layer.num_key_value_heads, width)
            for width in (layer.key_head_dim, layer.value_head_dim)
        ]
        chunk = max(64, FILL_VALUES // (batch * layer.num_key_value_heads * layer.key_head_dim))
        chunk = min(num_tokens, chunk - chunk % 64)
        keys, values = (
            torch.randn(
                (*shape[:2], chunk, shape[2]),
                generator=generator,
                device=model.device,
                dtype=model.dtype,
            )
            for shape in shapes
        )
        for start in range(0, num_tokens, chunk):
            count = min(chunk, num_tokens - start)
            cache.update(keys[:, :, :count], values[:, :, :count], index)
