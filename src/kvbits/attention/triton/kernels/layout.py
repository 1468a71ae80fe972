"""How kernels read and write the bytes of ``codecs/packing.py``: the same layout, in Triton.

A stored byte is a row of *segments*: runs of bits that belong to one channel. The byte of index w
in a token's row holds, with NB = D * bits // 8 and PB = D // 8,

    8 bits   one segment    channel w
    4 bits   two            channels w, w + NB
    2 bits   four           channels w, w + NB, w + 2 NB, w + 3 NB
    3 bits   four           by plane (w // PB): bits 0-2, bits 3-5, bit 6, bit 7

so a dot product with codes is a sum over bytes and segments: the segment's bits as they lie in the
byte, times the query at ``segment_channel``, times ``segment_weight``. Nothing is shifted.

Value bytes are taken in *planes*: the three planes of 3 bits, or as many blocks of rows as it
takes for a plane's segment to lie in one scale group. A *field* is one segment of one plane.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.constexpr_function
def row_bytes(bits: Any, head_dim: Any) -> Any:
    """Bytes of one token's codes."""
    return head_dim * bits // 8


@triton.constexpr_function
def padded(width: Any, least: Any) -> Any:
    """The power of two that holds ``width``, at least ``least``: Triton's ranges need one."""
    return max(least, 1 << (width - 1).bit_length())


@triton.constexpr_function
def length_of(items: Any) -> Any:
    """Number of entries of a constant tuple."""
    return len(items)


@triton.constexpr_function
def num_fields(bits: Any) -> Any:
    """Runs of channels of which every byte index holds one code (3 bits: every three bytes)."""
    return 8 if bits == 3 else 8 // bits


@triton.constexpr_function
def num_segments(bits: Any) -> Any:
    """Segments of a byte."""
    return 4 if bits == 3 else 8 // bits


@triton.constexpr_function
def segment_mask(bits: Any, segment: Any) -> Any:
    """Bits of one segment."""
    if bits == 3:
        return (0x07, 0x38, 0x40, 0x80)[segment]
    return ((1 << bits) - 1) << (segment * bits)


@triton.constexpr_function
def prefix_mask(bits: Any, segment: Any) -> Any:
    """Bits of the segments up to and including this one."""
    if bits == 3:
        return (0x07, 0x3F, 0x7F, 0xFF)[segment]
    return (1 << ((segment + 1) * bits)) - 1


@triton.constexpr_function
def value_planes(bits: Any, groups: Any) -> Any:
    """Planes of a value page."""
    return 3 if bits == 3 else 1 if bits == 16 else max(1, groups * bits // 8)


@triton.constexpr_function
def value_fields(bits: Any, groups: Any) -> Any:
    """(plane, segment) of every field, in the order of accumulators.

    Bits 6 and 7 of the first two 3-bit planes belong to one channel: one field, named 3.
    """
    if bits == 16:
        return ((0, 0),)
    if bits == 3:
        return ((0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3))
    planes = max(1, groups * bits // 8)
    return tuple((plane, k) for plane in range(planes) for k in range(8 // bits))


@triton.constexpr_function
def field_mask(bits: Any, field: Any) -> Any:
    """Bits of one field."""
    plane, segment = field
    if bits == 3:
        return 0xC0 if plane < 2 and segment == 3 else (0x07, 0x38, 0x40, 0x80)[segment]
    return ((1 << bits) - 1) << (segment * bits)


@triton.constexpr_function
def field_weight(bits: Any, field: Any) -> Any:
    """What a field, in place, must be multiplied by to count in codes."""
    plane, segment = field
    if bits == 3:
        last = (1 / 64, 2 / 64, 1 / 128)[plane]
        return (1, 1 / 8, 4 / 64, last)[segment]
    return 1 / (1 << (segment * bits))


@triton.constexpr_function
def field_channel(bits: Any, head_dim: Any, groups: Any, field: Any) -> Any:
    """Channel of the first row of a field."""
    plane, segment = field
    if bits == 3:
        columns = ((0, 4, 2), (1, 5, 3), (6, 7, 6), (6, 7, 7))
        return columns[segment][plane] * head_dim // 8
    row = head_dim * bits // 8
    return segment * row + plane * row // max(1, groups * bits // 8)


@triton.constexpr_function
def field_group(bits: Any, groups: Any, field: Any) -> Any:
    """Scale group of a field; only the ratio of channel to head_dim matters, so take 64."""
    return field_channel(bits, 64, groups, field) * groups // 64


@triton.constexpr_function
def has_top_bit(bits: Any, groups: Any, group: Any) -> Any:
    """Whether a scale group has a field with bit 7, which is stored flipped."""
    fields = value_fields(bits, groups)
    return any(
        field_mask(bits, f) >= 128 and field_group(bits, groups, f) == group for f in fields
    )


@triton.constexpr_function
def is_third_plane(bits: Any, field: Any) -> Any:
    """Whether a field is the one bit of a 3-bit channel whose others lie in another field."""
    return bits == 3 and field[0] == 2 and field[1] >= 2


@triton.jit
def segment_channel(o_w, SEGMENT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Channel of a segment in the bytes ``o_w`` of a row."""
    if BITS != 3:
        return o_w + SEGMENT * row_bytes(BITS, D)
    plane = o_w // (D // 8)
    if SEGMENT == 0:  # c0, c4, c2 in the planes P0, P2, P1
        column = tl.where(plane == 0, 0, tl.where(plane == 1, 4, 2))
    elif SEGMENT == 1:
        column = tl.where(plane == 0, 1, tl.where(plane == 1, 5, 3))
    elif SEGMENT == 2:
        column = tl.where(plane == 1, 7, 6)
    else:
        column = tl.where(plane == 0, 6, 7)
    return o_w % (D // 8) + column * (D // 8)


@triton.jit
def segment_weight(o_w, SEGMENT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """What the segment of bytes ``o_w``, in place, must be multiplied by to count in codes."""
    if BITS != 3:
        return tl.full(o_w.shape, 1.0 / (1 << (SEGMENT * BITS)), tl.float32)
    plane = o_w // (D // 8)
    if SEGMENT == 0:
        return tl.full(o_w.shape, 1.0, tl.float32)
    elif SEGMENT == 1:
        return tl.full(o_w.shape, 1.0 / 8, tl.float32)
    elif SEGMENT == 2:  # bit 0 of c6, bit 1 of c7, bit 2 of c6
        return tl.where(plane == 0, 1.0 / 64, tl.where(plane == 1, 2.0 / 64, 4.0 / 64))
    else:  # bit 1 of c6, bit 2 of c7, bit 0 of c7
        return tl.where(plane == 0, 2.0 / 128, tl.where(plane == 1, 4.0 / 128, 1.0 / 128))


@triton.jit
def low16(pair):
    """Scale of (scale, offset) pairs read as int32, as it is stored."""
    return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def high16(pair):
    """Offset of (scale, offset) pairs read as int32, as it is stored."""
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def low_half(pair):
    """Scale of (scale, offset) pairs, float32."""
    return low16(pair).to(tl.float32)


@triton.jit
def high_half(pair):
    """Offset of (scale, offset) pairs, float32."""
    return high16(pair).to(tl.float32)
