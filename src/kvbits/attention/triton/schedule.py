"""How a shape runs on a GPU: which kernel form, which tiles, how many splits. Plain Python.

A choice is a pure function of the shape, so that nothing is tuned at a user's first call, and
``kvbits inspect`` can print it on a machine without a GPU. The constants come from measurements on
an H200 (``benchmarks/results/kernels-*.jsonl``), where what matters is how many bytes a
multiprocessor has in flight: about 100 KB hide the latency of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from kvbits.codecs import Affine, Codec, Identity
from kvbits.layer_plan import LayerPlan, Side

BITS = (2, 3, 4, 8, 16)
HEAD_DIMS = (64, 96, 128, 256)
KEY_GROUPS = (32, 64, 128)
VALUE_GROUPS = (1, 2, 4)
MAX_GROUP_QUERIES = 16  # query heads per key/value head
INT8_QUERIES = 4  # up to these, the int8 form's two columns per head are free
TILE_TOKENS = 64
EXACT_TILE_TOKENS = 16
MAX_SPLITS = 256
BYTES_IN_FLIGHT = 100_000  # per multiprocessor
DEFAULT_MULTIPROCESSORS = 132

Form = Literal["int8", "fp16"]


class SideShape(NamedTuple):
    """How one side of a head group is stored.

    Attributes:
        bits: Width of a code; 16 for exact states.
        key_group: Tokens that share a channel's scale; 0 where every token has its own.
        groups: Scales of a token.
        head_dim: Channels.
    """

    bits: int
    key_group: int
    groups: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token and head, scales included."""
        pairs = self.head_dim / self.key_group if self.key_group else self.groups
        return round(self.head_dim * self.bits / 8 + (4 * pairs if self.bits < 16 else 0))


class Shape(NamedTuple):
    """What an attention call is about.

    Attributes:
        key: Keys.
        value: Values.
        group_queries: Query heads per key/value head.
        num_queries: Queries per row.
        rows: Batch rows times key/value heads of the store.
        num_tokens: Packed tokens of the longest row that the call should be good for.
        exact_tokens: Room for exact tokens: sinks and residual, or the new chunk.
    """

    key: SideShape
    value: SideShape
    group_queries: int
    num_queries: int
    rows: int
    num_tokens: int
    exact_tokens: int


class Schedule(NamedTuple):
    """How to launch.

    Attributes:
        form: ``int8`` or ``fp16`` tensor cores.
        tile: Packed tokens a program takes at a time.
        columns: Query columns of a program: heads for int8, heads times queries for fp16.
        splits: Programs over the packed tokens of a row.
        exact_splits: Programs over its exact tokens.
        num_warps: Warps of a program.
        num_stages: Depth of the load pipeline.
    """

    form: Form
    tile: int
    columns: int
    splits: int
    exact_splits: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.form}, {self.tile}-token tiles, {self.splits} splits"


def side_shape(codec: Codec, head_dim: int) -> SideShape | None:
    """The shape of a codec's storage, or None where no kernel reads it."""
    if isinstance(codec, Identity):
        return SideShape(16, 0, 1, head_dim)
    if not isinstance(codec, Affine) or codec.symmetric or codec.parameter_dtype != "float16":
        return None
    if codec.granularity == "per_channel":
        return SideShape(codec.bits, codec.block_tokens, 1, head_dim)
    groups = head_dim // codec.group_size if codec.group_size else 1
    return SideShape(codec.bits, 0, groups, head_dim)


def unsupported_side(codec: Codec, side: Side, head_dim: int) -> str | None:
    """Why no kernel reads or writes this side, or None if one does."""
    shape = side_shape(codec, head_dim)
    if shape is None:
        return f"{side} codec must be affine with float16 scale and offset, or exact, got {codec!r}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, got {head_dim}"
    if shape.key_group:
        if side == "value":
            return "values must share scales per token, got per_channel"
        if shape.key_group not in KEY_GROUPS:
            return f"group_size of keys must be one of {KEY_GROUPS}, got {shape.key_group}"
    if side == "key" and shape.groups > 1:
        return f"keys must have one scale per token, got {shape.groups}"
    if shape.groups not in VALUE_GROUPS:
        return f"values must have one of {VALUE_GROUPS} scales per token, got {shape.groups}"
    # A plane of values is one scale group's rows: a power of two, and a whole matrix tile.
    if shape.groups > 1 and (head_dim & (head_dim - 1) or head_dim // shape.groups < 16):
        return f"scale groups must be a power of two of at least 16 channels, got {codec!r}"
    return None


def unsupported(plan: LayerPlan, key_head_dim: int, value_head_dim: int) -> str | None:
    """Why a layer cannot run on kernels, as ``<name> must <rule>, got <value>``; None if it can."""
    if plan.flush != "joint":
        return f"flush must be 'joint', got {plan.flush!r}"
    if plan.quantum & (plan.quantum - 1):
        return f"key and value blocks must fit in a power of two of tokens, got {plan.quantum}"
    for group in plan.groups:
        for side, head_dim in (("key", key_head_dim), ("value", value_head_dim)):
            reason = unsupported_side(group.codec(side), side, head_dim)  # type: ignore[arg-type]
            if reason:
                return reason
    return None


def unsupported_heads(group_queries: int) -> str | None:
    """Why this many query heads per key/value head cannot run, or None."""
    if group_queries <= MAX_GROUP_QUERIES:
        return None
    return (
        f"query heads per key/value head must be at most {MAX_GROUP_QUERIES}, got {group_queries}"
    )


def choose(shape: Shape, multiprocessors: int = DEFAULT_MULTIPROCESSORS) -> Schedule:
    """Choose how a shape runs."""
    form = _form(shape)
    tile = _tile(shape)
    if shape.num_queries > 1:
        columns = min(64, _power_of_two(shape.num_queries * shape.group_queries, least=16))
        warps, stages, per_multiprocessor = 4, 2, 4
    elif form == "int8":
        columns = _power_of_two(shape.group_queries, least=4)
        warps, stages, per_multiprocessor = 1, *_depth(shape, tile)
    elif min(shape.key.bits, shape.value.bits) == 16:
        columns = _power_of_two(shape.group_queries, least=8)
        warps, stages, per_multiprocessor = 4, 4, 2
    else:
        columns = _power_of_two(shape.group_queries, least=8)
        stages, least = _depth(shape, tile)
        warps, per_multiprocessor = 1, max(least, 8)  # arithmetic needs more warps than latency does
    tiles = max(1, -(-shape.num_tokens // tile))
    column_tiles = -(-shape.num_queries * shape.group_queries // columns)
    programs = multiprocessors * per_multiprocessor / (shape.rows * column_tiles)
    splits = min(tiles, MAX_SPLITS, max(1, int(programs + 0.4)))
    exact = -(-shape.exact_tokens // EXACT_TILE_TOKENS)
    exact_splits = max(1, min(8, exact if shape.num_queries == 1 else -(-exact // 4)))
    return Schedule(form, tile, columns, splits, exact_splits, warps, stages)


def tiles_per_split(tiles: Sequence[int], splits: int) -> int:
    """Tiles a split takes at least, so that short rows of a ragged batch use fewer splits."""
    total = sum(tiles)
    return max(1, total // max(1, splits * len(tiles)))


def _form(shape: Shape) -> Form:
    is_packed = max(shape.key.bits, shape.value.bits) < 16
    few = shape.num_queries == 1 and shape.group_queries <= INT8_QUERIES
    # Per-channel scales multiply the query; in fp16 that takes a trip through shared memory.
    per_channel = shape.num_queries == 1 and shape.key.key_group > 0 and shape.group_queries <= 8
    return "int8" if is_packed and (few or per_channel) else "fp16"


def _tile(shape: Shape) -> int:
    group = shape.key.key_group
    if group == 128 and shape.num_queries == 1:
        return 128  # a group's scales are applied to the query once
    return min(TILE_TOKENS, group) if group else TILE_TOKENS


def _depth(shape: Shape, tile: int) -> tuple[int, int]:
    """Stages of the load pipeline, and programs per multiprocessor."""
    tile_bytes = tile * (shape.key.token_bytes + shape.value.token_bytes)
    stages = 3 if tile_bytes > 12_000 else 4
    per_multiprocessor = round(BYTES_IN_FLIGHT / ((stages - 1) * tile_bytes))
    return stages, max(2, min(16, per_multiprocessor))


def _power_of_two(number: int, *, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())
