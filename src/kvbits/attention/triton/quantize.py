"""Encoding on a GPU: statistics, codes and bytes in one pass, written where the pages are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from kvbits.attention.states import KernelStates, StoreGroup
from kvbits.attention.triton.encoding import Encoding, supported_encoding
from kvbits.attention.triton.kernels.encode import (
    append_step,
    encode_prompt,
    tokens_at_a_time,
)
from kvbits.attention.triton.launch import launch_options
from kvbits.attention.triton.support import SideShape, supported_shape
from kvbits.attention.triton.tables import encoding_constants
from kvbits.codecs.pages import PageStore
from kvbits.layer_plan import Side

PROMPT_TILE = 64  # tokens of a program, where keys are not per channel


def append_prompt(
    store: PageStore,
    side: Side,
    states: Tensor,
    heads: Tensor | None,
    *,
    columns: Sequence[int],
    counts: Sequence[int],
) -> None:
    """Encode and append ``counts[b]`` tokens of every row b, from column ``columns[b]`` on.

    Args:
        store: Where they go. Counts must be multiples of the codec's block.
        side: Side of the store.
        states: ``[B, H_kv, T, D]``.
        heads: Heads of the states that the store holds; None: all, in order.
        columns: First column of every row.
        counts: Tokens of every row; 0 leaves a row as it is.
    """
    if not any(counts):
        return
    rows = [row for row, count in enumerate(counts) if count]
    store.make_room(rows, [counts[row] for row in rows])
    shape = supported_shape(store.codec, store.head_dim)
    how = supported_encoding(store.codec)
    tile = tokens_at_a_time(how, shape.key_group, PROMPT_TILE)
    tiles = max(
        -(-(start + count) // tile) - start // tile
        for start, count in zip(store.lengths, counts, strict=True)
    )
    if states.stride(-1) != 1:
        states = states.contiguous()
    numbers = torch.tensor([list(columns), store.lengths, list(counts)], dtype=torch.int32)
    column, start, count = numbers.to(states.device, non_blocking=True)
    with torch.cuda.device_of(states):
        encode_prompt[(tiles, len(counts) * store.num_heads)](
            states,
            column if heads is None else heads,
            column,
            start,
            count,
            _constants(store),
            store.pool.view(torch.int8),
            store.table,
            states.stride(0),
            states.stride(1),
            states.stride(2),
            store.table.stride(0),
            HS=store.num_heads,
            HAS_HEADS=heads is not None,
            D=store.head_dim,
            BITS=shape.bits,
            G=shape.key_group,
            GROUPS=shape.groups,
            PAGE=store.page_tokens,
            T=tile,
            IS_KEY=side == "key",
            HOW=how,
            FIRST=store.first_position if how.rotary_pairs else 0,
            num_warps=_prompt_warps(shape, how, tile),
            enable_fp_fusion=False,
        )
    store.lengths = [length + count for length, count in zip(store.lengths, counts, strict=True)]


def _constants(store: PageStore) -> Tensor:
    return encoding_constants(store.codec, store.head_dim, store.device)


def _prompt_warps(shape: SideShape, how: Encoding, tile: int) -> int:
    """Warps of a prompt's tile: a per-channel block is reduced over its tokens, and should stay
    within few warps as long as it fits in their registers."""
    if not how.is_plain:
        return _wrapped_warps(shape, tile)
    if not shape.key_group:
        return 4
    values = tile * shape.head_dim
    return max(1, min(2, values // 4096), values // 8192)


def _wrapped_warps(shape: SideShape, tile: int, most: int = 16) -> int:
    """Warps that leave a thread 32 values: several tensors of them live at a time."""
    return max(1, min(most, tile * triton.next_power_of_2(shape.head_dim) // 1024))


def _append_warps(shape: SideShape, how: Encoding, quantum: int) -> int:
    """Few warps: most steps pack nothing."""
    if how.is_plain:
        return 1 if quantum <= 64 else 2
    return _wrapped_warps(shape, tokens_at_a_time(how, shape.key_group, quantum), most=8)


def append_token(
    states: KernelStates,
    group: StoreGroup,
    key_states: Tensor,
    value_states: Tensor,
    flags: Tensor,
    limits: tuple[float, float],
) -> None:
    """Keep one new token of every row and pack what it pushes out of the residual.

    One launch, no host synchronisation, no allocation. The clock of ``states`` must count the new
    token already, and every row must have pages for what is packed.

    Args:
        states: The layer.
        group: The head group to write.
        key_states: ``[B, H_kv, 1, D]``.
        value_states: Like ``key_states``.
        flags: int32 ``[2]``; set to 1 for a side that brings a state which is not finite.
        limits: Largest magnitude that keys and values may have.
    """
    key, value = (
        supported_shape(store.codec, store.head_dim) for store in (group.key, group.value)
    )
    key_how, value_how = (supported_encoding(store.codec) for store in (group.key, group.value))
    batch, num_heads = key_states.shape[:2]
    if key_states.stride(-1) != 1 or value_states.stride(-1) != 1:
        key_states, value_states = key_states.contiguous(), value_states.contiguous()
    with torch.cuda.device_of(key_states):
        append_step[(batch * group.key.num_heads, 2)](
            key_states,
            value_states,
            *states.arguments(group),
            flags,
            _constants(group.key),
            _constants(group.value),
            key_states.stride(0),
            key_states.stride(1),
            value_states.stride(0),
            value_states.stride(1),
            group.key.table.stride(0),
            group.value.table.stride(0),
            H=num_heads,
            HS=group.key.num_heads,
            HAS_HEADS=group.heads is not None,
            DK=key.head_dim,
            DV=value.head_dim,
            KB=key.bits,
            VB=value.bits,
            G=key.key_group,
            KG=key.groups,
            VG=value.groups,
            PAGE=group.key.page_tokens,
            S=states.sinks[0].shape[2],
            R=states.residual_length,
            QUANTUM=states.quantum,
            CAP=states.tails[0].shape[2],
            K_LIMIT=limits[0],
            V_LIMIT=limits[1],
            K_HOW=key_how,
            V_HOW=value_how,
            num_warps=max(
                _append_warps(key, key_how, states.quantum),
                _append_warps(value, value_how, states.quantum),
            ),
            enable_fp_fusion=False,
            **launch_options(),
        )
