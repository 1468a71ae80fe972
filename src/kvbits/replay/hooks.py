"""What every hook may return, and how what it returned is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from kvbits.errors import PolicyError

EXACT_BITS = 16
KINDS = ("key", "value")
CALIBRATION_MODES = ("online", "prefill", "workload")
MAX_RESIDUAL, MAX_SINKS, MAX_OUTLIERS = 4096, 64, 0.1


class Hook(NamedTuple):
    """One hook: what it may return, in words and as a check of a plain Python value."""

    name: str
    rule: str
    is_legal: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(name: str, rule: str, is_legal: Callable[[int], bool]) -> Hook:
    return Hook(name, f"an int, {rule}", lambda value: _is_int(value) and is_legal(value))


def _number(name: str, rule: str, is_legal: Callable[[float], bool]) -> Hook:
    def check(value: Any) -> bool:
        is_number = _is_int(value) or isinstance(value, float)
        return is_number and math.isfinite(value) and is_legal(value)

    return Hook(name, f"a number {rule}", check)


def _word(name: str, *words: str) -> Hook:
    rule = "one of " + ", ".join(map(repr, words))
    return Hook(name, rule, lambda value: isinstance(value, str) and value in words)


def _flag(name: str) -> Hook:
    return Hook(name, "a bool", lambda value: isinstance(value, bool))


def _is_bit_range(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_int, value))
    return is_pair and 0 <= value[0] <= value[1] <= EXACT_BITS


CORE_HOOKS = {
    hook.name: hook
    for hook in (
        _integer("choose_bits", "1 to 8, or 16", lambda b: 1 <= b <= 8 or b == EXACT_BITS),
        _word("choose_axis", "channel", "token"),
        _integer("residual_length", f"0 to {MAX_RESIDUAL}", lambda r: 0 <= r <= MAX_RESIDUAL),
        _word("calibration_mode", *CALIBRATION_MODES),
    )
}
OPTIONAL_HOOKS = {
    hook.name: hook
    for hook in (
        _word("quantizer_family", "minmax", "kivi", "skvq", "qaq"),
        _integer("group_size", "0 or less for the whole axis", lambda size: True),
        _integer("sink_tokens", f"0 to {MAX_SINKS}", lambda s: 0 <= s <= MAX_SINKS),
        _number("clip_ratio", "above 0 and at most 1", lambda a: 0 < a <= 1),
        _word("quantization_level", "token", "layer", "head"),
        _word("quantization_method", "uniform", "normal"),
        _flag("symmetric"),
        _number("outliers_ratio", f"0 to {MAX_OUTLIERS}", lambda p: 0 <= p <= MAX_OUTLIERS),
        _flag("use_attentions"),
        Hook("bit_range", "two ints, 0 <= low <= high <= 16", _is_bit_range),
        _integer("last_n_attentions", "at least 1", lambda n: n >= 1),
        _number("target_quantization_error", "above 0", lambda e: e > 0),
        _number("q_norm", "above 0", lambda q: q > 0),
    )
}
HOOKS = CORE_HOOKS | OPTIONAL_HOOKS


def place(hook: str, layer_id: int | None = None, kv_kind: str | None = None) -> str:
    """A hook call in a message: hook, layer and kind."""
    layer = "all" if layer_id is None else layer_id
    return f"{hook} (layer {layer}, kind {kv_kind or 'both'})"


def checked(hook: str, value: Any, layer_id: int | None = None, kv_kind: str | None = None) -> Any:
    """Return what a hook returned, if it may.

    Raises:
        PolicyError: Otherwise; it names hook, layer and kind.
    """
    if not HOOKS[hook].is_legal(value):
        raise PolicyError(
            f"{place(hook, layer_id, kv_kind)} must return {HOOKS[hook].rule}, got {value!r}"
        )
    return value
