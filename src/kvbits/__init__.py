"""kvbits: layer-wise mixed-precision KV caches that are really packed.

Names are loaded on first use, so that ``import kvbits`` and ``kvbits --help`` do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvbits._version import __version__

if TYPE_CHECKING:
    from kvbits.attention.hf import disable, enable
    from kvbits.cache.hf import QuantizedCache
    from kvbits.cache.saving import load_cache, save_cache
    from kvbits.layer_plan import HeadGroup, LayerPlan
    from kvbits.plan import CachePlan

_EXPORTS = {
    "CachePlan": "kvbits.plan",
    "HeadGroup": "kvbits.layer_plan",
    "LayerPlan": "kvbits.layer_plan",
    "QuantizedCache": "kvbits.cache.hf",
    "disable": "kvbits.attention.hf",
    "enable": "kvbits.attention.hf",
    "load_cache": "kvbits.cache.saving",
    "save_cache": "kvbits.cache.saving",
}

__all__ = [
    "CachePlan",
    "HeadGroup",
    "LayerPlan",
    "QuantizedCache",
    "__version__",
    "disable",
    "enable",
    "load_cache",
    "save_cache",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'kvbits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
