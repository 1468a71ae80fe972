"""Exact byte accounting: what a cache of given layer plans allocates, before it exists.

Every function is plain arithmetic on the rules of ``codecs/packing.py`` and ``cache/layer.py``;
tests compare them with the bytes a live cache reports.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from kvbits.codecs import Codec
from kvbits.codecs.packing import page_capacity, page_tokens, record_bytes
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import SIDES, HeadGroup, LayerPlan, Side

# Above this no budget is the limit any more; it also bounds the search for models without
# full-attention layers, whose cache stops growing.
MOST_TOKENS = 1 << 30
TABLE_ENTRY_BYTES = 8  # the offset of a page in its pool, int64


def head_dim(layer: LayerGeometry, side: Side) -> int:
    """Channels of one side."""
    return layer.key_head_dim if side == "key" else layer.value_head_dim


def num_group_heads(group: HeadGroup, layer: LayerGeometry) -> int:
    """Heads a group holds; ``heads=None`` means all of the layer."""
    return layer.num_key_value_heads if group.heads is None else len(group.heads)


def page_bytes(
    codec: Codec,
    *,
    num_heads: int,
    head_dim: int,
    state_bits: int = 16,
    tokens: int | None = None,
) -> int:
    """Bytes of one page: codes and parameters of all heads.

    Args:
        codec: How states are stored.
        num_heads: Heads of the store.
        head_dim: Channels of this side.
        state_bits: Width of the states' own dtype.
        tokens: Tokens of a page; ``page_tokens(codec)`` if not given.
    """
    tokens = tokens or page_tokens(codec)
    bits = 8 * tokens * codec.row_bytes(head_dim, state_bits)
    for spec in codec.parameter_specs(head_dim):
        bits += tokens // spec.block_tokens * spec.bits_per_item
    return record_bytes(num_heads * bits // 8)


def store_bytes(
    codec: Codec,
    num_tokens: int,
    *,
    num_heads: int,
    head_dim: int,
    batch: int = 1,
    state_bits: int = 16,
    tokens_per_page: int | None = None,
    reserved_tokens: int = 0,
) -> int:
    """Bytes of a page store with ``num_tokens`` in each of ``batch`` rows, table included.

    ``reserved_tokens``: tokens of a row that room was reserved for.
    """
    tokens_per_page = tokens_per_page or page_tokens(codec)
    pages = -(-num_tokens // tokens_per_page)
    reserved = -(-reserved_tokens // tokens_per_page)
    capacity = reserved if pages <= reserved else page_capacity(pages)
    page = page_bytes(
        codec,
        num_heads=num_heads,
        head_dim=head_dim,
        state_bits=state_bits,
        tokens=tokens_per_page,
    )
    return batch * capacity * (page + TABLE_ENTRY_BYTES)


def exact_bytes(
    layer: LayerGeometry, num_tokens: int, batch: int = 1, state_bits: int = 16
) -> int:
    """Bytes of the stock cache layer after ``num_tokens``; sliding layers keep their window."""
    if not layer.holds_states:
        return 0
    if layer.sliding_window is not None:
        num_tokens = min(num_tokens, layer.sliding_window - 1)
    return batch * num_tokens * layer.values_per_token * state_bits // 8


def layer_bytes(
    plan: LayerPlan,
    layer: LayerGeometry,
    num_tokens: int,
    batch: int = 1,
    state_bits: int = 16,
    max_tokens: int | None = None,
) -> int:
    """Bytes one layer allocates once each of ``batch`` rows holds ``num_tokens`` tokens.

    Args:
        plan: Codecs, sinks and residual of the layer.
        layer: Its geometry.
        num_tokens: Cached tokens T per row.
        batch: Rows B.
        state_bits: Width of the model's own dtype: 16, or 32 for a float32 model.
        max_tokens: Tokens of a row that room was reserved for; exact layers lie in pages then.

    Returns:
        Pages, block tables, sinks and residual, in bytes.
    """
    if not layer.holds_states:
        return 0
    if plan.is_exact and max_tokens is None:
        return exact_bytes(layer, num_tokens, batch, state_bits)
    packed = plan.packed_lengths(np.array([num_tokens, max_tokens or 0]))
    total = 0
    for side, lengths in zip(SIDES, packed, strict=True):
        (length, reserved), width = lengths.tolist(), head_dim(layer, side)
        exact_tokens = plan.sink_tokens + plan.exact_capacity
        exact_values = batch * exact_tokens * layer.num_key_value_heads * width
        total += exact_values * state_bits // 8
        for group in plan.groups:
            total += store_bytes(
                group.codec(side),
                length,
                num_heads=num_group_heads(group, layer),
                head_dim=width,
                batch=batch,
                state_bits=state_bits,
                tokens_per_page=plan.page_tokens,
                reserved_tokens=reserved,
            )
    return total


def layer_effective_bits(plan: LayerPlan, layer: LayerGeometry) -> Fraction:
    """Stored bits per value of a long context, metadata included, pages and residual left out."""
    return stored_bits_per_token(plan, layer) / layer.values_per_token


def stored_bits_per_token(plan: LayerPlan, layer: LayerGeometry) -> Fraction:
    """Bits one token adds to the packed part of a layer, metadata included, over all heads."""
    total = Fraction(0)
    for group in plan.groups:
        heads = num_group_heads(group, layer)
        for side in SIDES:
            width = head_dim(layer, side)
            total += heads * width * group.codec(side).stored_bits(width)
    return total


def largest_fitting(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, 0 if 1 does not, at most ``MOST_TOKENS``.

    Page rounding makes bytes grow in steps, but never shrink, so bisection is exact.
    """
    low, high = 0, 1
    while high < MOST_TOKENS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
