"""Tools for testing codecs, caches and attention: tiny seeded models and naive oracles.

Everything here is slow and obvious on purpose: an oracle is worth something only if it can be
checked by reading it. Nothing needs the network.
"""

from __future__ import annotations

from kvbits.testing.models import FAMILIES, tiny_config, tiny_model
from kvbits.testing.oracles import attend_naively, pack_naively, unpack_naively, value_position

__all__ = [
    "FAMILIES",
    "attend_naively",
    "pack_naively",
    "tiny_config",
    "tiny_model",
    "unpack_naively",
    "value_position",
]
