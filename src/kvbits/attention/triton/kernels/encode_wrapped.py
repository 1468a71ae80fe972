"""Encoding of what is more than a scale and an offset: levels, norms, outliers, wrapped states.

A tile of tokens is one tensor ``[T, N]``: the channels of all fields of a byte, each field padded
to a power of two. Steps follow the codecs from the outermost on, and are left out at compile time
where an ``Encoding`` does not ask for them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.codes import (
    codes_of,
    paired,
    planes_of_3_bits,
    rounded_down,
    scale_and_offset,
    store_plane,
)
from kvbits.attention.triton.kernels.layout import num_fields, padded, row_bytes
from kvbits.attention.triton.kernels.outliers import (
    are_any,
    distance_from_middle,
    extreme_channels,
    lower_median,
    store_outliers,
)
from kvbits.attention.triton.kernels.transforms import hadamard, root_of, turned_back


@triton.constexpr_function
def numbers_before_table(how: Any, head_dim: Any) -> Any:
    """Float32 numbers among the constants before the midpoints: phases, two each, and signs."""
    return 2 * how.rotary_pairs + (head_dim if how.is_rotated else 0)


@triton.constexpr_function
def parameter_bytes(how: Any, head_dim: Any, key_group: Any, groups: Any, page: Any) -> Any:
    """Bytes of the inner codec's parameters of one head and page."""
    if how.is_norm:
        return 2 * page
    return 4 * (page // key_group * head_dim if key_group else groups * page)


@triton.jit
def nearest_level(b_v, p_midpoints, p_levels, COUNT: tl.constexpr):
    """Code of the level nearest to each value, of two as near the lower one, and what the code
    decodes to."""
    b_code = tl.zeros(b_v.shape, tl.int32)
    b_level = tl.zeros(b_v.shape, tl.float32) + tl.load(p_levels)
    for i in tl.static_range(COUNT - 1):
        m_above = b_v > tl.load(p_midpoints + i)
        b_code += m_above.to(tl.int32)
        b_level = tl.where(m_above, tl.load(p_levels + i + 1), b_level)
    return b_code, b_level


@triton.jit
def middle_and_half(b_low, b_high):
    """Stored scale and offset of each group as float32: half its range, and its middle."""
    b_offset = ((b_low + b_high) * 0.5).to(tl.float16).to(tl.float32)
    b_half = tl.maximum(b_high - b_offset, b_offset - b_low)
    return -(rounded_down(-b_half).to(tl.float32)), b_offset


@triton.jit
def encode_groups(
    b_x,
    m_d,
    p_table,
    BITS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_LEVELS: tl.constexpr,
):
    """Codes of ``[T, N]`` and what they decode to, and the pairs of groups: per token
    ``[T, GROUPS]``, per channel ``[1, N]``."""
    T: tl.constexpr = b_x.shape[0]
    N: tl.constexpr = b_x.shape[1]
    AXIS: tl.constexpr = 0 if G > 0 else 2
    m_x = tl.reshape(tl.broadcast_to(m_d[None, :], [T, N]), [T, GROUPS, N // GROUPS])
    b_g = tl.reshape(b_x, [T, GROUPS, N // GROUPS])
    b_low = tl.min(tl.where(m_x, b_g, float("inf")), AXIS, keep_dims=True)
    b_high = tl.max(tl.where(m_x, b_g, float("-inf")), AXIS, keep_dims=True)
    if HAS_LEVELS:
        b_s, b_o = middle_and_half(b_low, b_high)
        b_step = tl.broadcast_to(tl.where(b_s == 0, 1.0, b_s), b_g.shape)
        b_v = tl.div_rn(b_g - b_o, b_step)
        b_c, b_level = nearest_level(b_v, p_table, p_table + (1 << BITS) - 1, 1 << BITS)
    else:
        b_s, b_o, b_i = scale_and_offset(b_low, b_high, BITS)
        b_c = codes_of(b_g, b_o, b_i, BITS)
        b_level = b_c.to(tl.float32)
    b_decoded = b_level * b_s + b_o
    b_p = tl.reshape(paired(b_s, b_o), [1, N] if G > 0 else [T, GROUPS])
    return tl.reshape(b_c, [T, N]), tl.reshape(b_decoded, [T, N]), b_p


@triton.jit
def encode_norm(
    b_x, m_d, p_table, D: tl.constexpr, BITS: tl.constexpr, IS_CORRECTED: tl.constexpr
):
    """Codes of directions ``[T, N]``, and the stored norms ``[T]``."""
    T: tl.constexpr = b_x.shape[0]
    # In float64, so that the order of a sum never shows in what is stored.
    b_d = b_x.to(tl.float64)
    b_norm = tl.sqrt(tl.sum(b_d * b_d, 1))
    b_root = tl.full([T], root_of(D), tl.float64)
    b_one = tl.full([T], 1.0, tl.float64)
    b_direction = b_d * (b_one / tl.where(b_norm == 0, 1.0, b_norm) * b_root)[:, None]
    p_levels = p_table + (1 << BITS) - 1
    b_c, b_level = nearest_level(b_direction.to(tl.float32), p_table, p_levels, 1 << BITS)
    if IS_CORRECTED:
        b_l = tl.where(m_d[None, :], b_level, 0.0).to(tl.float64)
        b_length = tl.sqrt(tl.sum(b_l * b_l, 1))
        b_corrected = b_norm * b_root / tl.where(b_length == 0, 1.0, b_length)
        b_norm = tl.where(b_length == 0, b_norm, b_corrected)
    return b_c, tl.minimum(b_norm.to(tl.float32), 65504.0).to(tl.float16)


@triton.jit
def store_codes(
    b_c,
    p_head,
    slot,
    m_t,
    is_full,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
):
    """Pack codes ``[T, N]``, field after field, and write them."""
    NB: tl.constexpr = row_bytes(BITS, D)
    F: tl.constexpr = num_fields(BITS)
    b_c = tl.reshape(b_c, [b_c.shape[0], F, b_c.shape[1] // F])
    if BITS == 3:
        W: tl.constexpr = D // 8
        b_0, b_2, b_1 = planes_of_3_bits(b_c, 1)
        store_plane(tl.sum(b_0, 1), 0, p_head, slot, m_t, is_full, W, NB, PAGE, IS_KEY)
        store_plane(tl.sum(b_2, 1), W, p_head, slot, m_t, is_full, W, NB, PAGE, IS_KEY)
        store_plane(tl.sum(b_1, 1), 2 * W, p_head, slot, m_t, is_full, W, NB, PAGE, IS_KEY)
    else:
        b_w = tl.sum(b_c << (tl.arange(0, F)[None, :, None] * BITS), 1)
        store_plane(b_w, 0, p_head, slot, m_t, is_full, NB, NB, PAGE, IS_KEY)


@triton.jit
def encode_wrapped(
    p_x,
    m_t,
    is_full,
    position,
    CONSTANTS,
    p_page,
    slot,
    i_hs,
    HS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    IS_KEY: tl.constexpr,
    HOW: tl.constexpr,
):
    """Encode the tokens at ``p_x [T]``, at row positions ``position [T]``, into one page.

    ``CONSTANTS``: ``tables.encoding_constants``, as float32: phases, signs, midpoints, levels.
    """
    T: tl.constexpr = p_x.shape[0]
    F: tl.constexpr = num_fields(BITS)
    W: tl.constexpr = D // F
    WP: tl.constexpr = padded(W, 1)
    NB: tl.constexpr = row_bytes(BITS, D)
    o_n = tl.arange(0, F * WP)
    m_d = o_n % WP < W
    o_d = tl.where(m_d, o_n // WP * W + o_n % WP, -1)
    m_x = m_t[:, None] & m_d[None, :]
    # [T, N]
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    if HOW.rotary_pairs > 0:
        p_phases = CONSTANTS.to(tl.pointer_type(tl.int64))
        b_x = turned_back(b_x, p_x, m_x, position, o_d, p_phases, HOW.rotary_pairs)
    if HOW.is_rotated:
        b_x = hadamard(b_x * tl.load(CONSTANTS + 2 * HOW.rotary_pairs + o_d)[None, :], D)
    b_rest = b_x
    if HOW.slots > 0:
        if HOW.is_by_channel:
            b_score, b_middle = distance_from_middle(b_x)
            b_outlier = extreme_channels(b_score, o_d, HOW.slots // 2)
            b_rest = tl.where(are_any(o_d, b_outlier, HOW.slots), b_middle[None, :], b_x)
        else:
            b_middle = lower_median(b_x, m_d, D)
            b_outlier = extreme_channels(b_x, o_d, HOW.slots // 2)
            b_rest = tl.where(are_any(o_d, b_outlier, HOW.slots), b_middle[:, None], b_x)
    p_table = CONSTANTS + numbers_before_table(HOW, D)
    p_parameters = p_page + HS * PAGE * NB
    o_t = slot + tl.arange(0, T)
    if HOW.is_norm:
        b_c, b_norm = encode_norm(b_rest, m_d, p_table, D, BITS, HOW.is_corrected)
        tl.store(
            p_parameters.to(tl.pointer_type(tl.float16)) + i_hs * PAGE + o_t, b_norm, mask=m_t
        )
    else:
        b_c, b_decoded, b_p = encode_groups(b_rest, m_d, p_table, BITS, G, GROUPS, HOW.has_levels)
        p_pairs = p_parameters.to(tl.pointer_type(tl.int32))
        if G > 0:
            p_pairs += (i_hs * (PAGE // G) + slot // G) * D
            tl.store(p_pairs + o_d[None, :], b_p, mask=m_d[None, :])
        else:
            o_g = tl.arange(0, GROUPS)[None, :]
            p_pairs += i_hs * (GROUPS * PAGE)
            tl.store(p_pairs + o_t[:, None] + o_g * PAGE, b_p, mask=m_t[:, None])
        if HOW.slots > 0:
            p_channel = p_parameters + HS * parameter_bytes(HOW, D, G, GROUPS, PAGE)
            p_value = (p_channel + HS * PAGE * HOW.slots).to(tl.pointer_type(tl.float16))
            o_s = (i_hs * PAGE + o_t) * HOW.slots
            b_missing = b_x - b_decoded
            store_outliers(
                b_missing, o_d, b_outlier, p_channel + o_s, p_value + o_s, m_t, HOW.slots
            )
    store_codes(b_c, p_page + i_hs * (PAGE * NB), slot, m_t, is_full, D, BITS, PAGE, IS_KEY)
