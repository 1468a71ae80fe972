"""What kernels can read and write of a codec, and why not what they cannot. Plain Python."""

from __future__ import annotations

from typing import NamedTuple

from kvbits.attention.triton.encoding import encoding
from kvbits.attention.triton.tables import has_grid
from kvbits.codecs import (
    Affine,
    Codebook,
    Codec,
    Identity,
    NormScaled,
    Outliers,
    PreRope,
    Rotated,
    VarianceNormalised,
)
from kvbits.layer_plan import SIDES, LayerPlan, Side

BITS = (2, 3, 4, 8, 16)
HEAD_DIMS = (64, 96, 128, 256)
KEY_GROUPS = (32, 64, 128)
VALUE_GROUPS = (1, 2, 4)
MAX_GROUP_QUERIES = 16  # query heads per key/value head
MOST_LEVEL_BITS = 4  # a byte permute takes its table from registers
LEAST_FIELD = 16  # what a step of the matrix unit takes


class SideShape(NamedTuple):
    """How one side of a head group is stored.

    Attributes:
        bits: Width of a code; 16 for exact states.
        key_group: Tokens that share a channel's scale; 0 where every token has its own.
        groups: Scales of a token.
        head_dim: Channels.
        is_rotated: Whether what is stored are states times an orthogonal matrix.
        has_levels: Whether codes name levels of a table.
        has_offset: Whether scales have an offset beside them.
        slots: Outliers of every token that are stored apart.
        rotary_pairs: Pairs of channels that are stored as before the rotary embedding.
        has_token_scale: Whether every token has one scale more, which multiplies its states.
        scale_tile: Tokens that share one scale more of every channel; 0 where there is none.
        has_grid: Whether what scales multiply lies on a grid that bytes number.
    """

    bits: int
    key_group: int
    groups: int
    head_dim: int
    is_rotated: bool = False
    has_levels: bool = False
    has_offset: bool = True
    slots: int = 0
    rotary_pairs: int = 0
    has_token_scale: bool = False
    scale_tile: int = 0
    has_grid: bool = True

    @property
    def token_bytes(self) -> int:
        """Bytes of one token and head, scales included."""
        pairs = self.head_dim / self.key_group if self.key_group else self.groups
        more = self.has_token_scale + (self.head_dim / self.scale_tile if self.scale_tile else 0)
        scales = (4 if self.has_offset else 2) * pairs + 2 * more if self.bits < 16 else 0
        return round(self.head_dim * self.bits / 8 + scales + 3 * self.slots)

    @property
    def is_looked_up(self) -> bool:
        """Whether only the form that looks codes up reads it."""
        return self.has_levels or self.slots > 0 or self.rotary_pairs > 0

    @property
    def field(self) -> int:
        """Channels in a row of bytes that hold one code of every byte (3 bits: of three)."""
        return self.head_dim * self.bits // 8 if self.bits != 3 else self.head_dim // 8


def side_shape(codec: Codec, head_dim: int) -> SideShape | None:
    """The shape of a codec's storage, or None where no kernel knows it.

    Kernels undo wrappers in one order: outliers, the rotary embedding, a rotation.
    """
    is_rotated = isinstance(codec, Rotated)
    if isinstance(codec, Rotated):
        codec = codec.inner
    pairs = slots = 0
    if isinstance(codec, PreRope):
        pairs, codec = len(codec.frequencies), codec.inner
    if isinstance(codec, Outliers):
        slots, codec = codec.slots, codec.inner
    shape = _leaf_shape(codec, head_dim)
    if isinstance(codec, VarianceNormalised) and not (pairs or slots):
        shape = _leaf_shape(codec.inner, head_dim)  # its scales come before any rotation
        if shape and codec.scaled == "token":
            shape = shape._replace(has_token_scale=True)
        elif shape:
            shape = shape._replace(scale_tile=codec.tile_tokens)
    return shape and shape._replace(is_rotated=is_rotated, rotary_pairs=pairs, slots=slots)


def _leaf_shape(codec: Codec, head_dim: int) -> SideShape | None:
    if isinstance(codec, Identity):
        return SideShape(16, 0, 1, head_dim)
    if isinstance(codec, NormScaled):
        return SideShape(
            codec.bits,
            0,
            1,
            head_dim,
            has_levels=True,
            has_offset=False,
            has_grid=has_grid(codec),
        )
    if isinstance(codec, Codebook) or (isinstance(codec, Affine) and codec.is_plain):
        is_channel = codec.granularity == "per_channel"
        size = head_dim if is_channel else codec.group_size or head_dim
        return SideShape(
            int(codec.bits),
            codec.block_tokens if is_channel else 0,
            head_dim // size,
            head_dim,
            has_levels=isinstance(codec, Codebook),
            has_grid=not isinstance(codec, Codebook) or has_grid(codec),
        )
    return None


def supported_shape(codec: Codec, head_dim: int) -> SideShape:
    """The shape of a storage that ``unsupported`` has nothing against."""
    shape = side_shape(codec, head_dim)
    assert shape is not None
    return shape


def unsupported_side(codec: Codec, side: Side, head_dim: int) -> str | None:
    """Why no kernel reads or writes this side, or None if one does."""
    shape = side_shape(codec, head_dim)
    if shape is None:
        return f"{side} codec must be one that kernels know, got {codec.summary}"
    reason = _unsupported_scale(shape, side)
    if reason:
        return reason
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


def _unsupported_scale(shape: SideShape, side: Side) -> str | None:
    """Why no kernel applies the scales that normalise a side, or None if one does."""
    if side == "key" and shape.scale_tile:
        return "variance_normalised keys must be scaled per token, got 'channel'"
    if side == "value" and shape.has_token_scale:
        return "variance_normalised values must be scaled per channel, got 'token'"
    if shape.scale_tile and (shape.scale_tile & (shape.scale_tile - 1) or shape.scale_tile < 32):
        return f"tile_tokens must be a power of two of at least 32, got {shape.scale_tile}"
    return None


def unsupported(plan: LayerPlan, key_head_dim: int, value_head_dim: int) -> str | None:
    """Why a layer cannot run on kernels: ``<name> must <rule>, got <value>``; or None."""
    if plan.flush != "joint":
        return f"flush must be 'joint', got {plan.flush!r}"
    if plan.quantum & (plan.quantum - 1):
        return f"key and value blocks must fit in a power of two of tokens, got {plan.quantum}"
    for group in plan.groups:
        reason = _unsupported_lookup(
            side_shape(group.key, key_head_dim), side_shape(group.value, value_head_dim)
        )
        if reason:
            return reason
    if len({_rotation(group.value) for group in plan.groups}) > 1:
        return "head groups must share the rotation of values, got several"  # merged together
    for group in plan.groups:
        for side, head_dim in zip(SIDES, (key_head_dim, value_head_dim), strict=True):
            reason = unsupported_side(group.codec(side), side, head_dim)
            if reason:
                return reason
    return None


def _unsupported_lookup(key: SideShape | None, value: SideShape | None) -> str | None:
    """Why the form that looks codes up cannot run, if a side needs it; or None."""
    if key is None or value is None or not (key.is_looked_up or value.is_looked_up):
        return None
    for name, shape in (("key", key), ("value", value)):
        if shape.has_token_scale or shape.scale_tile:
            return f"{name} tiles must not be normalised beside levels, got variance_normalised"
        if shape.bits > MOST_LEVEL_BITS:
            return f"{name} codes must have 2, 3 or 4 bits beside levels, got {shape.bits}"
        if shape.field < LEAST_FIELD:
            return (
                f"{name} codes of one place in a byte must be at least {LEAST_FIELD} channels, "
                f"got {shape.field}"
            )
        if shape.groups * shape.field > shape.head_dim:
            return (
                f"scales of a {name} must be at most {shape.head_dim // shape.field} beside "
                f"levels, got {shape.groups}"
            )
    if key.rotary_pairs and 2 * key.rotary_pairs != key.head_dim:
        return (
            f"the rotary embedding must turn all {key.head_dim} channels, "
            f"got {2 * key.rotary_pairs}"
        )
    return None


def is_writable(plan: LayerPlan) -> bool:
    """Whether kernels encode the states of a layer that they can read."""
    return all(encoding(group.codec(side)) for group in plan.groups for side in SIDES)


def _rotation(codec: Codec) -> Codec | None:
    """What is rotated alike has the same of these."""
    return codec.model_copy(update={"inner": None}) if isinstance(codec, Rotated) else None


def unsupported_heads(group_queries: int) -> str | None:
    """Why this many query heads per key/value head cannot run, or None."""
    if group_queries <= MAX_GROUP_QUERIES:
        return None
    return (
        f"query heads per key/value head must be at most {MAX_GROUP_QUERIES}, got {group_queries}"
    )
