"""Keys as they were before the rotary embedding, where their channels keep their place."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.base import EncodeContext
from kvbits.codecs.wrappers import Wrapper

Frequency = Annotated[float, Field(ge=0, le=math.pi)]


class PreRope(Wrapper):
    """Keys turned back by their position before they are encoded, and forth when decoded.

    The first ``2 * len(frequencies)`` channels rotate, in pairs of channel i and channel
    i + len(frequencies); the others are left alone. Positions count a row's real tokens: under
    left padding a row is turned by one angle too few, both times.

    Source: KVQuant (arXiv 2401.18079) section 3.2.

    Args:
        frequencies: Radians per token of every pair, scaling of the context included.
    """

    kind: Literal["pre_rope"] = "pre_rope"
    frequencies: Annotated[tuple[Frequency, ...], Field(min_length=1)]

    @property
    def needs_positions(self) -> bool:
        return True

    def largest_magnitude(self, head_dim: int) -> float:
        # A pair can turn into one of its channels.
        return self.inner.largest_magnitude(head_dim) / math.sqrt(2)

    def largest_norm(self, head_dim: int) -> float:
        return self.inner.largest_norm(head_dim)

    def check_head_dim(self, head_dim: int) -> None:
        if head_dim < 2 * len(self.frequencies):
            raise ValueError(
                f"head_dim must be at least {2 * len(self.frequencies)}, two channels for every "
                f"frequency, got {head_dim}"
            )
        super().check_head_dim(head_dim)

    @property
    def phases(self) -> Tensor:
        """Turns of a token in units of 2**-64, int64 ``[pairs]``; products with positions wrap."""
        turns = [round(frequency / (2 * math.pi) * 2**64) for frequency in self.frequencies]
        return torch.tensor([turn - 2**64 if turn >= 2**63 else turn for turn in turns])

    def constants(self, head_dim: int) -> tuple[Tensor, ...]:
        return (self.phases, *super().constants(head_dim))

    def apply(self, states: Tensor, context: EncodeContext) -> Tensor:
        return self._turn(states, context, -1)

    def undo(self, states: Tensor, context: EncodeContext) -> Tensor:
        return self._turn(states, context, 1)

    def _turn(self, states: Tensor, context: EncodeContext, sign: int) -> Tensor:
        assert context.positions is not None, "keys cannot be turned without their positions"
        # Angles of a million tokens need more than float32's 24 bits.
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=states.device)
        angle = context.positions[:, None, :, None] * frequencies  # [B or 1, 1, T, pairs]
        cos, sin = angle.cos().float(), (sign * angle.sin()).float()
        pairs = len(self.frequencies)
        low, high, rest = states.split([pairs, pairs, states.shape[-1] - 2 * pairs], -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1)
