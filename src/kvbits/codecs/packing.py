"""The layout of stored bytes, and bit packing; with ``pages.py`` the only code that knows bytes.

Layout ``kvbits-1``. A page holds ``page_tokens`` tokens (a multiple of 64) of one key/value head.

    byte w of a token    channels w, w + NB, w + 2 NB, ...   NB = D * bits // 8
        8 bits           [7..0] c0
        4 bits           [7..4] c1 [3..0] c0
        2 bits           [7..6] c3 [5..4] c2 [3..2] c1 [1..0] c0
        3 bits           three planes of D // 8 bytes each, cj = channel w + j * D // 8:
                         P0 = c0 | c1 << 3 | (c6 & 3) << 6
                         P2 = c4 | c5 << 3 | (c7 >> 1) << 6
                         P1 = c2 | c3 << 3 | (c6 >> 2) << 6 | (c7 & 1) << 7
        1.5 bits         c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4, cj = channel w + j * NB, NB = D / 5
                         rounded up; channels beyond the last count as 0
    bit 7 of every byte is flipped, so that a byte read as int8 is a sum of codes around zero and
    integer tensor cores can take it with one AND.

    keys    token rows           [pages, H_kv, page_tokens, NB]
    values  transposed by page   [pages, H_kv, NB, page_tokens]; within 32 tokens, token t lies at
                                 position (t % 8) * 4 + t // 8: the order a matrix fragment wants
    scale and offset             pairs: [pages, H_kv, rows, page_tokens, 2] per token,
                                 [pages, H_kv, blocks, D, 2] per channel

Every token has bytes of its own, so any token can be appended alone. A page is one record: the
codes of all heads, then their parameters. A kernel finds it by an offset in the pool and computes
the rest.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from kvbits.codecs.base import TERNARY_BITS, Codec, Width

LAYOUT_ID = "kvbits-1"
BASE_PAGE_TOKENS = 64
OFFSET_UNIT = 16  # bytes; page records start at multiples of it, as 16-byte loads ask for
_SIGN = 0x80


def page_tokens(codec: Codec) -> int:
    """Tokens of one page: a multiple of 64 and of the codec's block."""
    return math.lcm(BASE_PAGE_TOKENS, codec.block_tokens)


def record_bytes(plane_bytes: int) -> int:
    """Bytes of a page record whose planes take ``plane_bytes``."""
    return -(-plane_bytes // OFFSET_UNIT) * OFFSET_UNIT


@functools.cache
def page_capacity(num_pages: int) -> int:
    """Pages a row has room for once it has needed ``num_pages``: grows by a sixteenth.

    A pure function of the largest need, so that allocated bytes do not depend on how a cache grew
    (chunk by chunk or at once).
    """
    capacity = 0
    while capacity < num_pages:
        capacity += max(1, capacity // 16)
    return capacity


def pack_bits(codes: Tensor, bits: Width) -> Tensor:
    """Pack codes along the last axis: uint8 ``[..., D]`` to uint8 ``[..., D * bits // 8]``; 1.5
    bits: ``[..., ceil(D / 5)]``."""
    if bits == TERNARY_BITS:
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 5))
        runs = padded.unflatten(-1, (5, -1))
        weights = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=codes.device)
        return (runs * weights[:, None]).sum(-2, dtype=torch.uint8) ^ _SIGN
    bits = int(bits)
    if bits == 8:
        return codes ^ _SIGN
    if bits == 3:
        c = codes.unflatten(-1, (8, -1)).unbind(-2)
        plane_0 = c[0] | c[1] << 3 | (c[6] & 3) << 6
        plane_2 = c[4] | c[5] << 3 | (c[7] >> 1) << 6
        plane_1 = c[2] | c[3] << 3 | (c[6] >> 2) << 6 | (c[7] & 1) << 7
        return torch.cat((plane_0, plane_2, plane_1), -1) ^ _SIGN
    fields = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = fields[0].clone()
    for index, field in enumerate(fields[1:], start=1):
        packed |= field << (bits * index)
    return packed ^ _SIGN


def unpack_bits(packed: Tensor, bits: Width, head_dim: int | None = None) -> Tensor:
    """Undo ``pack_bits``: uint8 ``[..., D * bits // 8]`` to uint8 ``[..., D]``."""
    return torch.cat(unpack_runs(packed, bits), -1)[..., :head_dim]


def unpack_runs(packed: Tensor, bits: Width) -> list[Tensor]:
    """Codes by equal runs of channels, in order: each uint8 ``[..., D / number of runs]``."""
    packed = packed ^ _SIGN
    if bits == TERNARY_BITS:
        return [packed // 3**digit % 3 for digit in range(5)]
    bits = int(bits)
    if bits == 8:
        return [packed]
    if bits == 3:
        plane_0, plane_2, plane_1 = packed.chunk(3, -1)
        c6 = plane_0 >> 6 | (plane_1 >> 4 & 4)
        c7 = plane_1 >> 7 | (plane_2 >> 5 & 6)
        low = (plane_0, plane_1, plane_2)
        return [*(part for plane in low for part in (plane & 7, plane >> 3 & 7)), c6, c7]
    mask = 2**bits - 1
    return [packed >> shift & mask for shift in range(0, 8, bits)]


def value_positions(tokens: int) -> Tensor:
    """Position inside a page of each of its tokens, for values."""
    token = torch.arange(tokens)
    return token // 32 * 32 + token % 8 * 4 + token % 32 // 8


def value_tokens(tokens: int) -> Tensor:
    """The token at each position inside a page of values: undoes ``value_positions``."""
    position = torch.arange(tokens)
    return position // 32 * 32 + position % 4 * 8 + position % 32 // 4
