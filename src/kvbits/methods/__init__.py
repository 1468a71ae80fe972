"""Published methods, by name: each makes the cache plan of a model."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from kvbits.methods.backends import HqqBackend, QuantoBackend
from kvbits.methods.base import Method
from kvbits.methods.formats import Fp8, Int8, MxFp4, NvFp4
from kvbits.methods.kivi import Kivi
from kvbits.methods.kvarn import KVarN
from kvbits.methods.kvquant import KVQuant
from kvbits.methods.kvtuner import KVTuner
from kvbits.methods.oscar import Oscar
from kvbits.methods.per_token import Hadamard, PerToken
from kvbits.methods.qaq import Qaq
from kvbits.methods.skvq import Skvq
from kvbits.methods.turboquant import TurboQuant
from kvbits.plan.loading import one_sentence

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        PerToken,
        Kivi,
        KVQuant,
        Skvq,
        Qaq,
        Hadamard,
        Oscar,
        TurboQuant,
        KVarN,
        Int8,
        Fp8,
        NvFp4,
        MxFp4,
        QuantoBackend,
        HqqBackend,
        KVTuner,
    )
}
"""Every method, by name."""

__all__ = ["METHODS", "Method", "build_method"]


def build_method(name: str, **settings: Any) -> Method:
    """Make a method by name.

    Args:
        name: A key of ``METHODS``.
        **settings: Fields of its class.

    Raises:
        ValueError: If there is no such method, or a setting is unknown or out of range.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    try:
        return METHODS[name](**settings)
    except ValidationError as error:
        raise ValueError(one_sentence(error)) from None
