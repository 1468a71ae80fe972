"""How one layer is stored: codecs per head group, sink tokens, residual window and flush rule."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvbits.codecs import AnyCodec, Array, Codec
from kvbits.codecs.packing import BASE_PAGE_TOKENS

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")


IntArray = NDArray[np.int64]


class PackedLengths(NamedTuple):
    """Tokens of each row that are packed, per side; sinks are not counted."""

    key: IntArray
    value: IntArray


class HeadGroup(BaseModel):
    """Key/value heads that share codecs; ``heads=None`` means all heads of the layer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    heads: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    key: AnyCodec
    value: AnyCodec

    def codec(self, side: Side) -> Codec:
        """The codec of one side."""
        return self.key if side == "key" else self.value


class LayerPlan(BaseModel):
    """The storage of one layer: ``[ sink_tokens, exact | packed | residual, exact ]``.

    ``flush="joint"``: both sides leave the residual together, in multiples of ``quantum``, so the
    newest R to R + quantum - 1 tokens stay exact. ``flush="independent"`` is the papers' rule:
    keys leave in whole blocks of R tokens, values one by one as soon as more than R are exact.

    Raises:
        ValueError: If head groups overlap, or R does not fit the key block (independent flush).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    groups: tuple[HeadGroup, ...] = Field(min_length=1)
    sink_tokens: int = Field(default=0, ge=0)
    residual_length: int = Field(default=0, ge=0)
    flush: Literal["joint", "independent"] = "joint"

    @classmethod
    def uniform(
        cls,
        key: AnyCodec,
        value: AnyCodec,
        *,
        sink_tokens: int = 0,
        residual_length: int = 0,
        flush: Literal["joint", "independent"] = "joint",
    ) -> LayerPlan:
        """One codec pair for all heads."""
        return cls(
            groups=(HeadGroup(key=key, value=value),),
            sink_tokens=sink_tokens,
            residual_length=residual_length,
            flush=flush,
        )

    @model_validator(mode="after")
    def _check(self) -> LayerPlan:
        named = [group.heads for group in self.groups]
        if None in named and len(named) > 1:
            raise ValueError(
                "heads must be listed for every group when a layer has several groups"
            )
        heads = [head for group in named if group is not None for head in group]
        if sorted(heads) != list(range(len(heads))):
            raise ValueError(f"heads of all groups must list 0..n-1 once each, got {heads}")
        if self.flush == "independent" and self.residual_length % self.block_tokens("key"):
            raise ValueError(
                f"residual_length must be a multiple of the key block, {self.block_tokens('key')} "
                f"tokens, when flush='independent', got {self.residual_length}"
            )
        return self

    @property
    def is_exact(self) -> bool:
        """Whether every head stores both sides unchanged: the stock layer."""
        return all(group.key.is_exact and group.value.is_exact for group in self.groups)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What the codecs of all groups were fitted with, beside their numbers."""
        return tuple(
            array for group in self.groups for side in SIDES for array in group.codec(side).arrays
        )

    @cached_property
    def quantum(self) -> int:
        """Tokens that leave the residual together under joint flush."""
        return math.lcm(self.block_tokens("key"), self.block_tokens("value"))

    @cached_property
    def page_tokens(self) -> int:
        """Tokens of a page, the same for both sides and all head groups."""
        return math.lcm(BASE_PAGE_TOKENS, *(self.block_tokens(side) for side in SIDES))

    @cached_property
    def exact_capacity(self) -> int:
        """Most tokens beyond the sinks that are exact at once: those of the longest residual, and
        one that is about to join it. 0 where every token is packed at once."""
        if self.flush == "joint":
            most = self.residual_length + self.quantum
        else:
            key_block = self.residual_length or self.block_tokens("key")
            most = max(key_block, self.residual_length + self.block_tokens("value"))
        return most if most > 1 else 0

    @property
    def num_grouped_heads(self) -> int | None:
        """Heads the groups name, or None when one group takes all."""
        if self.groups[0].heads is None:
            return None
        return sum(len(group.heads or ()) for group in self.groups)

    def block_tokens(self, side: Side) -> int:
        """Encoding quantum of one side over all head groups."""
        return math.lcm(*(group.codec(side).block_tokens for group in self.groups))

    def packed_lengths(self, num_tokens: IntArray) -> PackedLengths:
        """Packed tokens per side of rows of ``num_tokens`` tokens that were only appended to."""
        beyond = np.maximum(num_tokens - self.sink_tokens, 0)
        leaving = np.maximum(beyond - self.residual_length, 0)
        if self.flush == "joint":
            packed = leaving - leaving % self.quantum
            return PackedLengths(packed, packed)
        key_block = self.residual_length or self.block_tokens("key")
        return PackedLengths(
            beyond - beyond % key_block, leaving - leaving % self.block_tokens("value")
        )
