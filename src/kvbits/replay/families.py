"""Quantizer families: what stays exact, which settings go together, and how the rest is decoded.

A family has no arithmetic of its own: entries are laid out in groups and go through a codec.

Sources: KIVI (arXiv 2402.02750), SKVQ (arXiv 2405.06219), QAQ (arXiv 2403.04643).
Differs from SKVQ: no reordering, no keys before the rotary embedding, scales not in float8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvbits.codecs.base import Codec
from kvbits.codecs.simulated import Simulated
from kvbits.replay.hooks import EXACT_BITS
from kvbits.replay.layout import group_views, num_grouped_tokens, num_groups, token_major
from kvbits.replay.settings import TensorSettings

LEAST_RANGE = 1e-5  # of a group, so that a step is never zero
SCALE_BITS, OFFSET_BITS = 16, 16


class Decoded(NamedTuple):
    """The quantizable entries ``[H, T, D]`` of one tensor as they come back, float32.

    Attributes:
        states: The entries.
        bits: Bits of an entry in a group, outliers at 16 included, averaged over heads.
        parameter_bits: Bits of all scales and offsets.
    """

    states: Tensor
    bits: float
    parameter_bits: float


class Attention(NamedTuple):
    """What the newest queries say of the quantizable tokens of one tensor.

    Attributes:
        weights: Largest weight a token got, ``[H, T]`` for each key/value head.
        num_tokens: Cached tokens, exact ones included.
        num_newest: How many of the quantizable tokens, from the end, no query has left behind.
    """

    weights: Tensor
    num_tokens: int
    num_newest: int


class Family:
    """``minmax``: groups on either axis, a tail of R exact tokens."""

    name = "minmax"
    unread: ClassVar[dict[str, Any]] = {}  # hooks it does not read, and what stands in for them

    def read(self, settings: TensorSettings) -> TensorSettings:
        """The settings with what this family does not read left out."""
        return settings._replace(**self.unread)

    def tail(self, settings: TensorSettings, num_tokens: int) -> int:
        """Newest tokens that stay exact, of ``num_tokens``."""
        return min(settings.residual_length, num_tokens)

    def quantizable(self, settings: TensorSettings, num_tokens: int) -> tuple[int, int]:
        """First and last (exclusive) token that may be quantized."""
        start = min(settings.sink_tokens, num_tokens)
        return start, max(start, num_tokens - self.tail(settings, num_tokens))

    def num_grouped(self, settings: TensorSettings, num_tokens: int) -> int:
        """Tokens that really are quantized, of ``num_tokens``."""
        start, stop = self.quantizable(settings, num_tokens)
        return num_grouped_tokens(stop - start, settings.choose_axis, settings.group_size)

    def average_bits(self, settings: TensorSettings, num_tokens: int, bits: float) -> float:
        """Bits of an entry of the whole tensor, exact tokens at 16."""
        grouped = self.num_grouped(settings, num_tokens)
        return (grouped * bits + (num_tokens - grouped) * EXACT_BITS) / num_tokens

    def check(self, settings: TensorSettings, head_dim: int) -> None:
        """Refuse settings that do not go together.

        Raises:
            PolicyError: With hook, layer and kind.
        """
        if settings.use_attentions:
            raise settings.refuse("use_attentions", f"be False with the {self.name} family")

    def check_bits(self, settings: TensorSettings, bits: int) -> None:
        """Refuse bits that do not go with the settings."""
        if settings.symmetric and bits == 1:
            raise settings.refuse("symmetric", "be False with 1 bit")

    def quantize(
        self,
        states: Tensor,
        settings: TensorSettings,
        bits: Sequence[int],
        attention: Attention | None = None,
    ) -> Decoded:
        """Quantize ``[H, T, D]``, ``bits`` for each head; equal neighbours share groups."""
        out = states.float().clone()
        total, parameters, head = 0.0, 0.0, 0
        for width, run in groupby(bits):
            heads = len(list(run))
            part = token_major(out[head : head + heads])
            apart = self._quantize_run(part, settings, width)
            out[head : head + heads] = part
            total += heads * (width * (1 - apart) + EXACT_BITS * apart)
            parameters += self._parameter_bits(part, settings, width)
            head += heads
        return Decoded(out, total / len(bits), parameters)

    def _quantize_run(self, states: Tensor, settings: TensorSettings, bits: int) -> float:
        """Quantize in place; return the share of grouped entries that stayed exact."""
        if bits == EXACT_BITS:
            return 0.0
        codec = self.codec(settings, bits)
        num_apart = num_entries = 0
        for groups in group_views(states, settings.choose_axis, settings.group_size):
            num_apart += quantize_rows(groups, codec, settings.outliers_ratio)
            num_entries += groups.numel()
        return num_apart / max(num_entries, 1)

    def _parameter_bits(self, states: Tensor, settings: TensorSettings, bits: int) -> float:
        if bits == EXACT_BITS:
            return 0.0
        heads, tokens, channels = states.shape
        axis, size = settings.choose_axis, settings.group_size
        groups = num_groups(heads, tokens, channels, axis, size)
        return groups * (SCALE_BITS + (0 if settings.symmetric else OFFSET_BITS))

    def codec(self, settings: TensorSettings, bits: int) -> Simulated:
        """The codec of one group, which is a row of it."""
        return Simulated(
            bits=bits,
            fit="symmetric" if settings.symmetric else "range",
            clip_ratio=settings.clip_ratio,
            least_range=LEAST_RANGE,
        )


class Kivi(Family):
    """``kivi``: keys per channel in blocks of R, values per token inside a head."""

    name = "kivi"
    unread: ClassVar = {"clip_ratio": 1.0, "symmetric": False, "outliers_ratio": 0.0}

    def tail(self, settings: TensorSettings, num_tokens: int) -> int:
        residual = settings.residual_length
        if settings.kv_kind == "value" or residual == 0:
            return super().tail(settings, num_tokens)
        return num_tokens % residual

    def check(self, settings: TensorSettings, head_dim: int) -> None:
        super().check(settings, head_dim)
        axis = "channel" if settings.kv_kind == "key" else "token"
        if settings.choose_axis != axis:
            raise settings.refuse("choose_axis", f"be {axis!r} with the kivi family")
        if settings.sink_tokens:
            raise settings.refuse("sink_tokens", "be 0 with the kivi family")
        group = settings.group_size
        if group > 0 and settings.residual_length % group:
            raise settings.refuse(
                "residual_length", f"be a multiple of the group size {group} with the kivi family"
            )
        if axis == "token" and (group <= 0 or head_dim % group):
            raise settings.refuse(
                "group_size", f"divide the head dimension {head_dim} with the kivi family"
            )


class Skvq(Family):
    """``skvq``: clipped groups of a token, across heads, behind sinks and a window."""

    name = "skvq"
    unread: ClassVar = {"symmetric": False, "outliers_ratio": 0.0}

    def check(self, settings: TensorSettings, head_dim: int) -> None:
        super().check(settings, head_dim)
        if settings.choose_axis != "token":
            raise settings.refuse("choose_axis", "be 'token' with the skvq family")


def quantize_rows(rows: Tensor, codec: Codec, outliers_ratio: float = 0.0) -> int:
    """Quantize groups ``[..., values]`` in place; return how many entries stayed exact."""
    if not outliers_ratio:
        rows.copy_(codec.decode(codec.encode(rows)))
        return 0
    is_apart = outliers(rows, outliers_ratio)
    decoded = codec.decode(codec.encode(rows.masked_fill(is_apart, math.nan)))
    rows.copy_(torch.where(is_apart, rows, decoded))
    return int(is_apart.sum())


def outliers(rows: Tensor, ratio: float) -> Tensor:
    """Which entries of ``[..., values]`` are outliers of their row, by QAQ's ranks."""
    count = rows.shape[-1]
    low = min(max(math.ceil(ratio / 2 * count), 1), count)
    high = min(max(math.floor((1 - ratio / 2) * count), 1), count)
    ordered = rows.sort(dim=-1).values
    return (rows <= ordered[..., low - 1, None]) | (rows > ordered[..., high - 1, None])
