"""Attention over packed pages, sinks and residual in one pass, on a GPU.

Two launches: splits of every row, then their merge by log-sum-exp; for the int8 form a small one
before them, which turns the query into coefficients. Nothing is read back to the host, lengths
come from the device, and extra memory is the partial outputs: splits times queries, whatever the
context.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvbits.attention.states import KernelStates, StoreGroup
from kvbits.attention.triton import schedule as schedules
from kvbits.attention.triton.kernels.common import LOG2E
from kvbits.attention.triton.kernels.fp16_form import attend_fp16
from kvbits.attention.triton.kernels.int8_form import attend_int8
from kvbits.attention.triton.kernels.int8_query import key_width, prepare_queries
from kvbits.attention.triton.kernels.layout import num_segments
from kvbits.attention.triton.kernels.level_form import attend_levels
from kvbits.attention.triton.kernels.merge import merge_splits, rotate_queries
from kvbits.attention.triton.kernels.outlier_attention import spread_queries
from kvbits.attention.triton.kernels.table_form import attend_table
from kvbits.attention.triton.launch import device_of, is_interpreted, launch_options
from kvbits.attention.triton.schedule import Schedule, Shape
from kvbits.attention.triton.support import supported_shape
from kvbits.attention.triton.tables import count, grid_bytes, level_bytes, phases, rotation
from kvbits.codecs import Codec
from kvbits.codecs.pages import PageStore

ROTATED_CHANNELS = 32  # of an output, that a program turns back
_LOG2E = float(LOG2E.value)


class _Partials(NamedTuple):
    """Outputs ``[B, H_kv, splits, Q * n, D_v]`` and log-sum-exps of splits, float32."""

    output: Tensor
    log_sum: Tensor


def attend(
    query: Tensor,
    states: KernelStates,
    scale: float,
    *,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
    schedule: Schedule | None = None,
) -> Tensor:
    """Compute softmax(scale · query · keysᵀ) · values, causal, over one layer's states.

    Args:
        query: ``[B, H_q, Q, D]``, bfloat16 or float16; the newest Q tokens of every row.
        states: Keys and values.
        scale: Factor on the scores.
        softcap: If given, scores become ``softcap * tanh(scores / softcap)``.
        window: If given, a query sees this many newest tokens, its own included.
        sink_logits: ``[H_q]`` extra logits that take part in the softmax and have no value.
        schedule: How to launch, for measurements; by default chosen from the shape.

    Returns:
        ``[B, Q, H_q, D_v]`` in the dtype of ``query``.
    """
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads = states.num_heads
    group_queries = num_heads // num_kv_heads
    if query.stride(-1) != 1:
        query = query.contiguous()
    shapes = [
        shape_of(group, states, group_queries, num_queries, window) for group in states.groups
    ]
    if schedule:
        plans = [schedule] * len(shapes)
    else:
        plans = schedules.choose_together(shapes, device_of(query))
    num_splits = plans[0].splits + plans[0].exact_splits
    columns = num_queries * group_queries
    value_dim = states.tails[1].shape[-1]
    partials = _Partials(
        query.new_empty(
            (batch, num_kv_heads, num_splits, columns, value_dim), dtype=torch.float32
        ),
        query.new_empty((batch, num_kv_heads, num_splits, columns), dtype=torch.float32),
    )
    options: dict[str, object] = {
        "scale": scale * _LOG2E,
        "cap": 0.0 if softcap is None else softcap * _LOG2E,
        "WINDOW": window or 0,
        "SOFTCAP": softcap is not None,
        "COMPILED": not is_interpreted(),
    }
    with torch.cuda.device_of(query):
        if any(shape.key.is_rotated for shape in shapes):
            query = dense(query)
        for group, shape, plan in zip(states.groups, shapes, plans, strict=True):
            launch = _LAUNCHES[plan.form]
            rotated = _rotated(query, group.key) if shape.key.is_rotated else query
            launch(query, rotated, states, group, shape, plan, partials, options)
        return _merge(query, states, partials, plans[0].splits, sink_logits)


def shape_of(
    group: StoreGroup,
    states: KernelStates,
    group_queries: int,
    num_queries: int,
    window: int | None = None,
) -> Shape:
    """What a call is about, for ``schedule.choose``."""
    seen = [min(packed, window or packed) for packed in states.packed]
    return Shape(
        key=supported_shape(group.key.codec, group.key.head_dim),
        value=supported_shape(group.value.codec, group.value.head_dim),
        group_queries=group_queries,
        num_queries=num_queries,
        rows=group.key.num_heads * states.tails[0].shape[0],
        num_tokens=max(seen, default=0),
        exact_tokens=states.most_exact,
        is_ring=states.is_ring,
        mean_tokens=-(-sum(seen) // max(1, len(seen))),
    )


def dense(query: Tensor) -> Tensor:
    """The query without gaps in memory, so that another of its strides can be made."""
    return query if torch.empty_like(query).stride() == query.stride() else query.contiguous()


def _rotated(query: Tensor, store: PageStore) -> Tensor:
    """A dense query in the basis of the keys in a store: float32, of the same strides."""
    batch, num_heads, num_queries, head_dim = query.shape
    rotated = torch.empty_like(query, dtype=torch.float32)
    rows = batch * num_heads * num_queries
    per_program = 1 if rows % 4 else 4
    rotate_queries[(rows // per_program, head_dim // ROTATED_CHANNELS)](
        query,
        rotation(store.codec, head_dim, query.device),
        rotated,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        H=num_heads,
        NQ=num_queries,
        R=per_program,
        D=head_dim,
        DB=ROTATED_CHANNELS,
        num_warps=4,
        **launch_options(),
    )
    return rotated


def _launch_int8(
    query: Tensor,
    rotated: Tensor,
    states: KernelStates,
    group: StoreGroup,
    shape: Shape,
    plan: Schedule,
    partials: _Partials,
    options: dict[str, object],
) -> None:
    coefficients = constants = rotated  # per-channel keys make theirs from every group's scales
    if not shape.key.key_group:
        coefficients, constants = _prepare(rotated, states, shape, plan, options)
    attend_int8[_grid(plan, query.shape[0] * group.key.num_heads)](
        query,
        rotated,
        coefficients,
        constants,
        *states.arguments(group),
        *partials,
        *_numbers(query, group, shape, plan, options),
        **_constants(states, group, shape, plan, options),
        GP=plan.columns,
        KT=shape.key.has_token_scale,
        VT=shape.value.scale_tile,
        **launch_options(),
        **_launch(plan),
    )


def _prepare(
    query: Tensor,
    states: KernelStates,
    shape: Shape,
    plan: Schedule,
    options: dict[str, object],
) -> tuple[Tensor, Tensor]:
    """Queries as int8 coefficients, and four constants of every head."""
    bits, head_dim, columns = shape.key.bits, shape.key.head_dim, plan.columns
    rows = query.shape[0] * states.num_heads
    operand_bytes = num_segments(bits) * 2 * columns * key_width(bits, head_dim)
    coefficients = query.new_empty(rows * operand_bytes, dtype=torch.int8)
    constants = query.new_empty(rows * 4 * columns, dtype=torch.float32)
    prepare_queries[(rows,)](
        query,
        coefficients,
        constants,
        options["scale"],
        query.stride(0),
        query.stride(1),
        H=states.num_heads,
        D=head_dim,
        KB=bits,
        GQ=shape.group_queries,
        GP=columns,
        num_warps=1,
        **launch_options(),
    )
    return coefficients, constants


def _launch_fp16(
    query: Tensor,
    rotated: Tensor,
    states: KernelStates,
    group: StoreGroup,
    shape: Shape,
    plan: Schedule,
    partials: _Partials,
    options: dict[str, object],
) -> None:
    attend_fp16[_grid_of_columns(query, group, shape, plan)](
        query,
        rotated,
        *states.arguments(group),
        *partials,
        *_numbers(query, group, shape, plan, options),
        query.stride(2),
        states.tails[0].shape[2],
        **_constants(states, group, shape, plan, options),
        NQ=shape.num_queries,
        HP=plan.columns,
        KT=shape.key.has_token_scale,
        VT=shape.value.scale_tile,
        **launch_options(),
        **_launch(plan),
    )


def _launch_table(
    query: Tensor,
    rotated: Tensor,
    states: KernelStates,
    group: StoreGroup,
    shape: Shape,
    plan: Schedule,
    partials: _Partials,
    options: dict[str, object],
) -> None:
    attend_table[_grid_of_columns(query, group, shape, plan)](
        query,
        rotated,
        *states.arguments(group),
        *partials,
        *_tables(level_bytes, group, query.device),
        *_numbers(query, group, shape, plan, options),
        query.stride(2),
        states.tails[0].shape[2],
        **_constants(states, group, shape, plan, options),
        NQ=shape.num_queries,
        HP=plan.columns,
        **_looked_up(shape),
        **launch_options(),
        **_launch(plan),
    )


def _launch_levels(
    query: Tensor,
    rotated: Tensor,
    states: KernelStates,
    group: StoreGroup,
    shape: Shape,
    plan: Schedule,
    partials: _Partials,
    options: dict[str, object],
) -> None:
    attend_levels[_grid(plan, query.shape[0] * group.key.num_heads)](
        query,
        rotated,
        _spread(rotated, states, shape, plan) if shape.key.slots else rotated,
        *states.arguments(group),
        *partials,
        *_tables(grid_bytes, group, query.device),
        *_numbers(query, group, shape, plan, options),
        **_constants(states, group, shape, plan, options),
        GP=plan.columns,
        **_looked_up(shape),
        **launch_options(),
        **_launch(plan),
    )


def _spread(query: Tensor, states: KernelStates, shape: Shape, plan: Schedule) -> Tensor:
    """Queries by channel, each beside the channel that the rotary embedding pairs it with."""
    rows, head_dim = query.shape[0] * states.num_heads, shape.key.head_dim
    spread = query.new_empty(rows, head_dim, plan.columns, 2, dtype=torch.float16)
    spread_queries[(rows,)](
        query,
        spread,
        query.stride(0),
        query.stride(1),
        H=states.num_heads,
        D=head_dim,
        GQ=shape.group_queries,
        GP=plan.columns,
        num_warps=1,
        **launch_options(),
    )
    return spread


def _tables(
    make: Callable[[Codec, int, torch.device], Tensor], group: StoreGroup, device: torch.device
) -> tuple[Tensor, ...]:
    """Levels of keys and of values, the phases of keys that are turned, and the numbers from 0."""
    key, value = (make(store.codec, store.head_dim, device) for store in (group.key, group.value))
    turning = phases(group.key.codec, device)
    return key, value, key if turning is None else turning, count(device)


def _looked_up(shape: Shape) -> dict[str, object]:
    """Constants of the forms that look codes up."""
    return {
        "K_OFFSET": shape.key.has_offset,
        "V_OFFSET": shape.value.has_offset,
        "K_SLOTS": shape.key.slots,
        "V_SLOTS": shape.value.slots,
        "IS_TURNED": shape.key.rotary_pairs > 0,
    }


_LAUNCHES = {
    "int8": _launch_int8,
    "fp16": _launch_fp16,
    "levels": _launch_levels,
    "table": _launch_table,
}


def _grid_of_columns(
    query: Tensor, group: StoreGroup, shape: Shape, plan: Schedule
) -> tuple[int, int, int]:
    column_tiles = -(-shape.num_queries * shape.group_queries // plan.columns)
    return (*_grid(plan, query.shape[0] * group.key.num_heads), column_tiles)


def _numbers(
    query: Tensor,
    group: StoreGroup,
    shape: Shape,
    plan: Schedule,
    options: dict[str, object],
) -> tuple[object, ...]:
    """Arguments that are numbers, of all forms."""
    return (
        options["scale"],
        options["cap"],
        plan.splits,
        plan.exact_splits,
        _per_split(shape, plan),
        group.key.table.stride(0),
        group.value.table.stride(0),
        query.stride(0),
        query.stride(1),
    )


def _constants(
    states: KernelStates,
    group: StoreGroup,
    shape: Shape,
    plan: Schedule,
    options: dict[str, object],
) -> dict[str, object]:
    """Compile-time constants of both forms."""
    return {
        "H": states.num_heads,
        "HS": group.key.num_heads,
        "HAS_HEADS": group.heads is not None,
        "DK": shape.key.head_dim,
        "DV": shape.value.head_dim,
        "KB": shape.key.bits,
        "VB": shape.value.bits,
        "G": shape.key.key_group,
        "VG": shape.value.groups,
        "PAGE": group.key.page_tokens,
        "GQ": shape.group_queries,
        "BN": plan.tile,
        "S": states.sinks[0].shape[2],
        "R": states.residual_length,
        "QUANTUM": states.quantum,
        "HELD": states.is_held,
        "CAP": states.tails[0].shape[2] if states.is_ring else 0,
        "WINDOW": options["WINDOW"],
        "SOFTCAP": options["SOFTCAP"],
        "COMPILED": options["COMPILED"],
    }


def _grid(plan: Schedule, rows: int) -> tuple[int, int]:
    return rows, plan.splits + plan.exact_splits


def _per_split(shape: Shape, plan: Schedule) -> int:
    """Tiles a split takes at least, so that short rows of a ragged batch use fewer splits."""
    tiles = -(-shape.num_tokens // plan.tile)
    return max(1, -(-tiles // plan.splits))


def _merge(
    query: Tensor,
    states: KernelStates,
    partials: _Partials,
    num_packed: int,
    sink_logits: Tensor | None,
) -> Tensor:
    batch, num_heads, num_queries, _ = query.shape
    num_splits, value_dim = partials.log_sum.shape[2], partials.output.shape[-1]
    outputs = batch * num_heads * num_queries
    padded_splits = triton.next_power_of_2(num_splits)
    value = states.groups[0].value
    matrix = rotation(value.codec, value.head_dim, query.device)
    # Enough programs to fill the machine, and tiles that stay in registers.
    channels = triton.next_power_of_2(value_dim)
    if matrix is not None:
        channels = min(channels, ROTATED_CHANNELS)
    while channels > 16 and (
        outputs * (value_dim // channels) < 128 or padded_splits * channels > 8192
    ):
        channels //= 2
    output = query.new_empty(batch, num_queries, num_heads, value_dim)
    merge_splits[(outputs, -(-value_dim // channels))](
        *partials,
        output if sink_logits is None else sink_logits,
        output if matrix is None else matrix,
        output,
        num_splits,
        num_packed,
        H=states.num_heads,
        GQ=num_heads // states.num_heads,
        NQ=num_queries,
        D=value_dim,
        DB=channels,
        NSP=padded_splits,
        HAS_SINK=sink_logits is not None,
        IS_ROTATED=matrix is not None,
        num_warps=4 if padded_splits * channels >= 2048 else 2,
        **launch_options(),
    )
    return output


def _launch(plan: Schedule) -> dict[str, int]:
    return {"num_warps": plan.num_warps, "num_stages": plan.num_stages}


def scratch_bytes(batch: int, num_heads: int, num_queries: int, plan: Schedule, dim: int) -> int:
    """Bytes of partial outputs of one call: attention's extra memory, whatever the context."""
    splits = plan.splits + plan.exact_splits
    return math.prod((batch, num_heads, num_queries, splits, dim + 1)) * 4
