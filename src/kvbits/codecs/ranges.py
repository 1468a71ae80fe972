"""Channels brought to one range that was measured beforehand, and levels for that range."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kvbits.codecs.arrays import Array, ArrayField
from kvbits.codecs.base import NO_CONTEXT, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.codebook import FittedTable
from kvbits.codecs.wrappers import Wrapper


class RangeNormalised(Wrapper):
    """States in half ranges from the middle of their channel: ``(x - middle) / half_range``.

    The ranges are those of calibration, so nothing is stored for them and every token is encoded
    alone. A state beyond what the inner codec can hold takes the most that it can.

    Source: KVQuant (arXiv 2401.18079) section 3.1: per-channel keys, calibrated offline.

    Args:
        middle: float32 ``[H, D]``.
        half_range: float32 ``[H, D]``, above zero.

    Raises:
        ValueError: If the shapes differ or a range is not above zero.
    """

    kind: Literal["range_normalised"] = "range_normalised"
    middle: ArrayField
    half_range: ArrayField

    @model_validator(mode="after")
    def _check_ranges(self) -> RangeNormalised:
        for array in (self.middle, self.half_range):
            array.check_dtype(torch.float32)
            array.check_shape(None, None)
        self.half_range.check_shape(*self.middle.shape)
        least = float(self.half_range.tensor.min())
        if least < torch.finfo(torch.float32).tiny:
            raise ValueError(f"{self.half_range.name} must be above zero, got {least}")
        return self

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.middle, self.half_range, *super().arrays)

    def check_arrays(self, num_heads: int, head_dim: int) -> None:
        self.middle.check_shape(num_heads, head_dim)
        super().check_arrays(num_heads, head_dim)

    def largest_magnitude(self, head_dim: int) -> float:
        return torch.finfo(torch.float32).max / 2  # the middle is taken off before the inner codec

    def apply(self, states: Tensor, context: EncodeContext) -> Tensor:
        limit = self.inner.largest_magnitude(states.shape[-1])
        return ((states - self._middle(states)) / self._half(states)).clamp(-limit, limit)

    def undo(self, states: Tensor, context: EncodeContext) -> Tensor:
        return states * self._half(states) + self._middle(states)

    def weighted(self, weights: Tensor) -> Tensor:
        """Weights of states' squared errors as weights of normalised ones."""
        return weights * self._half(weights).square()

    def _middle(self, states: Tensor) -> Tensor:
        return self.middle.on(states.device)[:, None]

    def _half(self, states: Tensor) -> Tensor:
        return self.half_range.on(states.device)[:, None]


class NearestLevel(FittedTable):
    """The nearest level, and nothing beside it: for states that a wrapper brought to [-1, 1].

    Source: KVQuant (arXiv 2401.18079) section 3.3 (nuq).
    """

    kind: Literal["nearest_level"] = "nearest_level"

    @property
    def block_tokens(self) -> int:
        return 1

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return ()

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        return Encoded(self.nearest(states.float()), {})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        return self.decoded_table(encoded.codes.device)[encoded.codes.int()]
