"""The two modes of the search: what a pair of widths means for one layer.

``per_token``: keys and values share a scale per token and head, nothing is kept exact.
``kivi``: keys share a scale per channel and 32 tokens, values per token and 32 channels, and the
newest tokens stay exact until a whole block of keys can be encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from kvbits.codecs import Affine, AnyCodec, Identity
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import HeadGroup, LayerPlan

Mode = Literal["per_token", "kivi"]
MODES: tuple[Mode, ...] = ("per_token", "kivi")
WIDTHS = (2, 3, 4, 8, 16)
EXACT_BITS = 16
KIVI_GROUP_SIZE = 32

Pair = tuple[int, int]


class Settings(TypedDict, total=False):
    """What may be changed about a mode; every key is optional.

    Keys:
        group_size: Values per scale: tokens for per-channel keys, channels for per-token codes.
            Default: all channels of a head for ``per_token``, 32 for ``kivi``.
        value_group_size: The same for values alone. Default: ``group_size``; for ``kivi``, where
            that does not divide the head dimension, one scale for the whole head.
        residual_length: Newest tokens kept exact; default 0 for ``per_token``, the key group
            for ``kivi``.
        sink_tokens: First tokens kept exact; default 0.
        flush: ``joint`` (default) or ``independent``.
        symmetric: Store no offset; default False.
        parameter_dtype: ``float16`` (default) or ``float32``.
    """

    group_size: int
    value_group_size: int
    residual_length: int
    sink_tokens: int
    flush: Literal["joint", "independent"]
    symmetric: bool
    parameter_dtype: Literal["float16", "float32"]


def exact_layer() -> LayerPlan:
    """The stock layer: both sides unchanged."""
    return LayerPlan.uniform(Identity(), Identity())


def check_mode(mode: str) -> None:
    """Raise ``ValueError`` unless ``mode`` is known."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")


def check_settings(settings: Settings) -> None:
    """Raise ``TypeError`` for a setting that does not exist."""
    unknown = sorted(set(settings) - set(Settings.__annotations__))
    if unknown:
        raise TypeError(
            f"settings must be among {', '.join(Settings.__annotations__)}, got {unknown[0]!r}"
        )


def as_pair(pair: Sequence[int]) -> Pair:
    """Check the shape of one pair.

    Raises:
        ValueError: If it is not two numbers.
    """
    if len(pair) != 2:
        raise ValueError(f"pairs must be (key_bits, value_bits), got {pair!r}")
    return pair[0], pair[1]


def layer_plan(
    layer: LayerGeometry, pairs: Sequence[Pair], mode: Mode, settings: Settings
) -> LayerPlan:
    """Build the plan of one layer; a layer of (16, 16) throughout is the stock layer.

    Args:
        layer: Geometry of the layer.
        pairs: One pair for all heads, or one per key/value head; heads with equal pairs share a
            head group.
        mode: ``per_token`` or ``kivi``.
        settings: What to change about the mode.

    Raises:
        ValueError: If a width is not 2, 3, 4, 8 or 16, or a setting does not fit.
    """
    heads_of: dict[Pair, list[int]] = {}
    for head, pair in enumerate(pairs):
        heads_of.setdefault(pair, []).append(head)
    if set(heads_of) == {(EXACT_BITS, EXACT_BITS)}:
        return exact_layer()
    groups = []
    for pair, heads in heads_of.items():
        key, value = codecs(layer, *pair, mode, settings)
        named = tuple(heads) if len(heads_of) > 1 else None
        groups.append(HeadGroup(heads=named, key=key, value=value))
    return LayerPlan(
        groups=tuple(groups),
        sink_tokens=settings.get("sink_tokens", 0),
        residual_length=residual_length(mode, settings),
        flush=settings.get("flush", "joint"),
    )


def residual_length(mode: Mode, settings: Settings) -> int:
    """Newest tokens a layer of this mode keeps exact."""
    default = settings.get("group_size", KIVI_GROUP_SIZE) if mode == "kivi" else 0
    return settings.get("residual_length", default)


def codecs(
    layer: LayerGeometry, key_bits: int, value_bits: int, mode: Mode, settings: Settings
) -> tuple[AnyCodec, AnyCodec]:
    """The key and the value codec of a pair of widths."""
    for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
        if isinstance(bits, bool) or bits not in WIDTHS:
            raise ValueError(f"{name} must be one of {', '.join(map(str, WIDTHS))}, got {bits!r}")
    default = KIVI_GROUP_SIZE if mode == "kivi" else None
    group = settings.get("group_size", default)
    value_group = settings.get("value_group_size", group)
    if "value_group_size" not in settings and mode == "kivi":
        value_group = _dividing(value_group, layer.value_head_dim)
    granularity: Literal["per_token", "per_channel"]
    granularity = "per_channel" if mode == "kivi" else "per_token"
    return (
        _affine(key_bits, granularity, group, settings),
        _affine(value_bits, "per_token", value_group, settings),
    )


def _dividing(group: int | None, head_dim: int) -> int | None:
    """``group`` where it splits a head evenly, else None: one scale for the whole head."""
    return group if group and head_dim % group == 0 else None


def _affine(
    bits: int,
    granularity: Literal["per_token", "per_channel"],
    group_size: int | None,
    settings: Settings,
) -> AnyCodec:
    if bits == EXACT_BITS:
        return Identity()
    return Affine.model_validate(
        {
            "bits": bits,
            "granularity": granularity,
            "group_size": group_size,
            "symmetric": settings.get("symmetric", False),
            "parameter_dtype": settings.get("parameter_dtype", "float16"),
        }
    )
