"""How a shape runs on a GPU: which kernel form, which tiles, how many splits. Plain Python.

A choice is a pure function of the shape, so that nothing is tuned at a user's first call, and
``kvbits inspect`` can print it on a machine without a GPU. The constants come from trials on an
H200. What decides is that every one of a multiprocessor's four schedulers gets as many programs as
the others: arithmetic, not memory, is the limit of narrow codes, and the last to finish counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from kvbits.attention.triton.support import (
    LEAST_FIELD,
    SideShape,
    supported_shape,
    unsupported,
    unsupported_heads,
)
from kvbits.geometry import LayerGeometry
from kvbits.layer_plan import LayerPlan

INT8_QUERIES = 4  # up to these, the int8 form's two columns per head are free
INT8_FIELD = 32  # channels that a step of the int8 matrix unit takes
TILE_TOKENS = 64
LARGE_TILE_TOKENS = 128
EXACT_TILE_TOKENS = 16
MAX_SPLITS = 256
RAGGED = 1.25  # the longest row over the mean, from which on a batch counts as ragged
MOST_RAGGED = 4
DEPTH = 2
SCHEDULERS = 4  # of a multiprocessor
SHORT_SPLIT_TILES = 8  # a split of fewer tiles is mostly start and end
SHORT_TOKENS = 34_000  # a tile of 64 for every scheduler
SMALL_TILE_BYTES = 5_000  # 2-bit keys and values
PROGRAM_BYTES = 3_500  # of shared memory, beside the tiles it loads ahead
WELL_FILLED = 0.9
MOST_WAVES = 3
LEAST_TILES = 6  # of a program, where there are more of them than run at a time

Form = Literal["int8", "fp16", "levels", "table"]


class Device(NamedTuple):
    """What a choice depends on; by default an H200.

    Attributes:
        multiprocessors: Of the device.
        shared_bytes: Shared memory of each.
    """

    multiprocessors: int = 132
    shared_bytes: int = 233_472


DEFAULT_DEVICE = Device()


class Shape(NamedTuple):
    """What an attention call is about.

    Attributes:
        key: Keys.
        value: Values.
        group_queries: Query heads per key/value head.
        num_queries: Queries per row.
        rows: Batch rows times key/value heads of the store.
        num_tokens: Packed tokens of the longest row that the call should be good for; at most
            those of a sliding window.
        exact_tokens: Room for exact tokens: sinks and residual, or the new chunk.
        is_ring: Whether exact tokens lie in a ring; the int8 form reads no others.
        mean_tokens: Like ``num_tokens``, of all rows; None: they are all as long.
    """

    key: SideShape
    value: SideShape
    group_queries: int
    num_queries: int
    rows: int
    num_tokens: int
    exact_tokens: int
    is_ring: bool = True
    mean_tokens: int | None = None

    @property
    def is_looked_up(self) -> bool:
        """Whether a side needs the form that looks codes up."""
        return self.key.is_looked_up or self.value.is_looked_up


class Schedule(NamedTuple):
    """How to launch. Programs are numbered row after row within a split: those over exact tokens,
    which are short, come last, so that the long ones are dealt evenly.

    Attributes:
        form: ``int8`` or ``fp16`` tensor cores; what looks codes up as bytes (``levels``) or as
            fp16 (``table``).
        tile: Packed tokens a program takes at a time.
        columns: Query columns of a program: heads for ``int8`` and ``levels``, else heads times
            queries.
        splits: Programs over the packed tokens of a row.
        exact_splits: Programs over its exact tokens.
        num_warps: Warps of a program.
        depth: Tiles a program loads ahead of the one it works on.
    """

    form: Form
    tile: int
    columns: int
    splits: int
    exact_splits: int
    num_warps: int
    depth: int

    @property
    def num_stages(self) -> int:
        """Stages of Triton's pipeline: a page's offset travels as far ahead of its codes as these
        travel ahead of their use."""
        return 2 * self.depth + 1

    def __str__(self) -> str:
        return f"{self.form}, {self.tile}-token tiles, {self.splits} splits"


def choose(shape: Shape, device: Device = DEFAULT_DEVICE) -> Schedule:
    """Choose how a shape runs."""
    form, tile = _form(shape), _tile(shape)
    columns = _columns(shape, form)
    warps = _warps(shape)
    mean = shape.num_tokens if shape.mean_tokens is None else shape.mean_tokens
    tiles = max(1, -(-mean // tile))
    rows = shape.rows * -(-shape.num_queries * shape.group_queries // columns)
    splits = max(1, min(tiles, _splits(shape, form, tile, columns, tiles, rows, device)))
    splits = _splits_of_longest(splits, tiles, max(1, -(-shape.num_tokens // tile)))
    exact = -(-shape.exact_tokens // EXACT_TILE_TOKENS)
    exact_splits, depth = _exact_splits(exact, tiles, splits), _depth(shape, form, tile)
    return Schedule(form, tile, columns, splits, exact_splits, warps, depth)


def choose_together(shapes: Sequence[Shape], device: Device = DEFAULT_DEVICE) -> list[Schedule]:
    """Choose for the head groups of a layer, whose outputs one kernel merges: as many splits."""
    plans = [choose(shape, device) for shape in shapes]
    most = max(plan.splits for plan in plans)
    exact = max(plan.exact_splits for plan in plans)
    return [plan._replace(splits=most, exact_splits=exact) for plan in plans]


def describe(plan: LayerPlan, layer: LayerGeometry, num_query_heads: int, tokens: int) -> str:
    """How one row's decode step over a layer of ``tokens`` runs on a GPU, and if not, why."""
    reason = unsupported(plan, layer.key_head_dim, layer.value_head_dim)
    reason = reason or unsupported_heads(num_query_heads // layer.num_key_value_heads)
    if reason:
        return f"reference: {reason}"
    shapes = decode_shapes(plan, layer, num_query_heads, tokens)
    choices = map(str, choose_together(shapes))
    return "; ".join(dict.fromkeys(choices))


def decode_shapes(
    plan: LayerPlan, layer: LayerGeometry, num_query_heads: int, tokens: int, batch: int = 1
) -> list[Shape]:
    """The shapes of a decode step, by head group, once every row holds ``tokens``."""
    shapes = []
    packed = int(plan.packed_lengths(np.array([tokens])).key[0])
    for group in plan.groups:
        heads = layer.num_key_value_heads if group.heads is None else len(group.heads)
        shapes.append(
            Shape(
                key=supported_shape(group.key, layer.key_head_dim),
                value=supported_shape(group.value, layer.value_head_dim),
                group_queries=num_query_heads // layer.num_key_value_heads,
                num_queries=1,
                rows=batch * heads,
                num_tokens=packed,
                exact_tokens=plan.sink_tokens + plan.exact_capacity,
                mean_tokens=packed,
            )
        )
    return shapes


def _form(shape: Shape) -> Form:
    if shape.is_looked_up:
        return "levels" if _is_byte_shape(shape) else "table"
    is_packed = max(shape.key.bits, shape.value.bits) < 16
    # Per-channel scales multiply the query, and 3 bits are three planes: in fp16 the first take a
    # trip through shared memory, and the second more instructions.
    is_costly = shape.key.key_group > 0 or _has_planes(shape)
    most = 2 * INT8_QUERIES if is_costly else INT8_QUERIES
    is_few = shape.num_queries == 1 and shape.group_queries <= most
    return "int8" if is_packed and shape.is_ring and is_few else "fp16"


def _is_byte_shape(shape: Shape) -> bool:
    """Whether codes that are looked up can be looked up as bytes."""
    key, value = shape.key, shape.value
    is_one = shape.num_queries == 1 and shape.group_queries <= INT8_QUERIES and shape.is_ring
    least = LEAST_FIELD if key.rotary_pairs else INT8_FIELD
    is_wide = key.field >= least and value.field >= LEAST_FIELD
    return is_one and is_wide and key.has_grid and value.has_grid


def _tile(shape: Shape) -> int:
    group = shape.key.key_group
    shared = min(t for t in (group, shape.value.scale_tile, LARGE_TILE_TOKENS) if t)
    if shape.is_looked_up:
        is_one_warp = not _is_short(shape) and not _has_planes(shape)
        is_small = is_one_warp and (not _is_byte_shape(shape) or _is_full(shape))
        return min(TILE_TOKENS // 2 if is_small else TILE_TOKENS, shared)
    if group == shared == LARGE_TILE_TOKENS and shape.num_queries == 1:
        return LARGE_TILE_TOKENS  # a group's scales are applied to the query once
    return min(TILE_TOKENS, shared)


def _depth(shape: Shape, form: Form, tile: int) -> int:
    """Tiles ahead: what is fetched for outliers takes the room of a second large tile."""
    has_slots = max(shape.key.slots, shape.value.slots) > 0
    return 1 if form == "levels" and has_slots and tile == TILE_TOKENS else DEPTH


def _has_planes(shape: Shape) -> bool:
    """Whether codes of 3 bits lie in three planes."""
    return 3 in (shape.key.bits, shape.value.bits)


def _is_full(shape: Shape) -> bool:
    """Whether turned keys and outliers together leave registers for half a tile only."""
    return shape.key.rotary_pairs > 0 and max(shape.key.slots, shape.value.slots) > 0


def _is_short(shape: Shape) -> bool:
    """Whether one warp a tile would leave schedulers without any."""
    return shape.rows * shape.num_tokens < SHORT_TOKENS


def _columns(shape: Shape, form: Form) -> int:
    if form in ("int8", "levels"):
        return _power_of_two(shape.group_queries, least=4)
    columns = shape.num_queries * shape.group_queries
    return min(64, _power_of_two(columns, least=8 if shape.num_queries == 1 else 16))


def _warps(shape: Shape) -> int:
    if shape.is_looked_up:
        if _is_short(shape):
            return min(4, shape.value.field // LEAST_FIELD)
        return 2 if _is_byte_shape(shape) and _is_full(shape) and _has_planes(shape) else 1
    if shape.num_queries > 1:
        return 4
    return 2 if min(shape.key.bits, shape.value.bits) == 16 else 1


def _splits(
    shape: Shape, form: Form, tile: int, columns: int, tiles: int, rows: int, device: Device
) -> int:
    """Programs for the packed tokens of a row."""
    tile_bytes = tile * (shape.key.token_bytes + shape.value.token_bytes)
    fit = max(1, device.shared_bytes // (DEPTH * tile_bytes + PROGRAM_BYTES))
    resident = min(fit, _register_programs(shape, form, tile, columns))
    filling = _filling_splits(resident * device.multiprocessors, rows, tiles)
    if shape.num_queries > 1:
        return filling
    if min(shape.key.bits, shape.value.bits) == 16:
        few = 2 * device.multiprocessors // rows
        return few if few > resident else filling
    if tiles * rows < 2 * SCHEDULERS * SHORT_SPLIT_TILES * device.multiprocessors:
        is_heavy = tile_bytes <= SMALL_TILE_BYTES or 0 < shape.key.key_group < 128
        programs = SCHEDULERS * (2 if is_heavy else 1)
        if tile == LARGE_TILE_TOKENS and shape.value.groups == 1:
            programs -= 1  # of few tiles each: one that starts late costs more than a place
        splits = programs * device.multiprocessors // rows
        return splits - 1 if splits >= SHORT_SPLIT_TILES else splits
    return _even_splits(resident, rows, device.multiprocessors) or filling


def _register_programs(shape: Shape, form: Form, tile: int, columns: int) -> int:
    """Programs whose registers a multiprocessor has at a time, as compiled for an H200."""
    if shape.num_queries > 1:
        return 3 if columns <= 16 else 2
    if form in ("levels", "table"):
        return 2 * SCHEDULERS // _warps(shape)
    is_wide = form == "fp16" or columns > INT8_QUERIES
    is_narrow = form == "fp16" and max(shape.key.bits, shape.value.bits) == 2
    is_padded = shape.key.head_dim & (shape.key.head_dim - 1) > 0
    if is_padded and min(shape.key.bits, shape.value.bits) >= 4:
        return SCHEDULERS  # a tile is loaded into the room of the next power of two
    is_large = tile == LARGE_TILE_TOKENS or shape.key.head_dim > 128 or (is_wide and not is_narrow)
    return SCHEDULERS * (2 if is_large else 3)


def _even_splits(resident: int, rows: int, multiprocessors: int) -> int | None:
    """One or two long programs for every scheduler; None where they would not come out even.

    They do not where many are missing, nor where the short ones are too many to be one more for
    every multiprocessor.
    """
    programs = 2 * SCHEDULERS if resident >= 2 * SCHEDULERS else SCHEDULERS
    room = programs * multiprocessors
    splits = room // rows
    is_even = splits * rows >= WELL_FILLED * room
    return splits if is_even and (splits + 1) * rows <= room + multiprocessors else None


def _filling_splits(room: int, rows: int, tiles: int) -> int:
    """As many programs as run at a time, or two or three times that if those leave gaps."""
    more = [waves * room // rows for waves in range(2, MOST_WAVES + 1)]
    choices = [room // rows, *(splits for splits in more if splits * LEAST_TILES <= tiles)]
    good = [splits for splits in choices if _filled(splits * rows, room) >= WELL_FILLED]
    return good[0] if good else max(choices, key=lambda splits: _filled(splits * rows, room))


def _filled(programs: int, room: int) -> float:
    """Share of the places that are taken until the last program ends."""
    return programs / (room * max(1, -(-programs // room)))


def _splits_of_longest(splits: int, tiles: int, most: int) -> int:
    """Splits of the longest row, if ``splits`` suit the mean: all take as many tiles.

    Rows of different length end at different times, which smaller programs even out. Splits that a
    short row has no use for cost their empty outputs, which limits them.
    """
    if most > RAGGED * tiles:
        splits = min(tiles, splits * 3 // 2)
    per_split = -(-tiles // splits)
    return min(-(-most // per_split), MOST_RAGGED * splits, MAX_SPLITS)


def _exact_splits(exact: int, tiles: int, splits: int) -> int:
    """One program takes all exact tokens of a row while others are busy for longer than it.

    Programs are dealt to multiprocessors by number, whatever they have to do: many short ones
    among the long ones leave some multiprocessors with nothing but short ones.
    """
    is_short = tiles <= 2 * splits
    return max(1, min(5, exact)) if is_short else 1


def _power_of_two(number: int, *, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())
