"""Naive implementations to compare with: per-bit packing, float64 attention."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UInt8Array = NDArray[np.uint8]


def _bit_places(head_dim: int, bits: int) -> list[list[tuple[int, int]]]:
    """Where bit i of channel c lies: ``places[c][i]`` is a byte and a bit of that byte."""
    num_bytes = head_dim * bits // 8
    if bits != 3:
        return [
            [(channel % num_bytes, channel // num_bytes * bits + bit) for bit in range(bits)]
            for channel in range(head_dim)
        ]
    width = head_dim // 8  # of each of the three planes P0, P2, P1
    p0, p2, p1 = 0, width, 2 * width
    by_field = [
        [(p0, 0), (p0, 1), (p0, 2)],
        [(p0, 3), (p0, 4), (p0, 5)],
        [(p1, 0), (p1, 1), (p1, 2)],
        [(p1, 3), (p1, 4), (p1, 5)],
        [(p2, 0), (p2, 1), (p2, 2)],
        [(p2, 3), (p2, 4), (p2, 5)],
        [(p0, 6), (p0, 7), (p1, 6)],
        [(p1, 7), (p2, 6), (p2, 7)],
    ]
    return [
        [(plane + channel % width, bit) for plane, bit in by_field[channel // width]]
        for channel in range(head_dim)
    ]


def pack_naively(codes: UInt8Array, bits: int) -> UInt8Array:
    """Pack the codes ``[D]`` of one token bit by bit: ``[D * bits // 8]`` bytes."""
    packed = np.full(len(codes) * bits // 8, 0x80, dtype=np.uint8)  # bit 7 is stored flipped
    for code, places in zip(codes, _bit_places(len(codes), bits), strict=True):
        for index, (byte, bit) in enumerate(places):
            packed[byte] ^= (int(code) >> index & 1) << bit
    return packed


def unpack_naively(packed: UInt8Array, bits: int) -> UInt8Array:
    """Undo ``pack_naively``: ``[D * bits // 8]`` bytes to codes ``[D]``."""
    plain = packed ^ np.uint8(0x80)
    return np.array(
        [
            sum((int(plain[byte]) >> bit & 1) << index for index, (byte, bit) in enumerate(places))
            for places in _bit_places(len(packed) * 8 // bits, bits)
        ],
        dtype=np.uint8,
    )


def value_position(token: int) -> int:
    """Position of a value token inside its page: the inverse of what kernels read."""
    for position in range(token // 32 * 32, token // 32 * 32 + 32):
        if position // 32 * 32 + position % 4 * 8 + position % 32 // 4 == token:
            return position
    raise AssertionError(f"no position holds token {token}")


def attend_naively(
    query: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend with dense states in float64, one softmax over whole rows.

    Args:
        query: ``[B, H_q, Q, D]``, the newest Q tokens.
        key_states: ``[B, H_kv, T, D]``.
        value_states: ``[B, H_kv, T, D_v]``.
        mask: Boolean (True: attend) or additive, ``[B or 1, 1 or H_q, Q, T]``; None: causal.
        scale: Factor on the scores.
        softcap: As in ``attend``.
        sink_logits: ``[H_q]``.

    Returns:
        ``[B, H_q, Q, D_v]`` in float64; zero for queries that may see nothing.
    """
    repeats = query.shape[1] // key_states.shape[1]
    keys = key_states.double().repeat_interleave(repeats, 1)
    values = value_states.double().repeat_interleave(repeats, 1)
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    num_queries, num_tokens = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(num_queries, num_tokens, dtype=torch.bool)
        mask = mask.tril(num_tokens - num_queries)[None, None]
    if mask.dtype != torch.bool:
        allowed = mask > torch.finfo(mask.dtype).min
        scores = scores + mask.double().masked_fill(~allowed, 0)
        mask = allowed
    scores = scores.masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        sinks = sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), -1)
    weights = torch.softmax(scores, -1).nan_to_num(0)  # a row of -inf only
    return weights[..., :num_tokens] @ values
