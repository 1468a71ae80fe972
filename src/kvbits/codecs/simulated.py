"""Codes that are counted and never stored: what the replay of policies measures.

Not in ``AnyCodec``: no plan file can name them, and they have no layout in bytes. The arithmetic
is that of ``Affine``; what is new is other widths, other ways to lay the range, and values that
are kept apart, which arrive as NaN: they take no part in a range, and what is decoded in their
place means nothing.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.affine import Affine, ParameterDtype
from kvbits.codecs.base import NO_CONTEXT, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.groups import Grouped

Bits = Annotated[int, Field(ge=1, le=15)]
Fit = Literal["range", "symmetric", "mean", "zero"]


class Simulated(Affine):
    """Affine codes of any width, with the ranges that published policies use.

    ``fit`` says where the codes of a group lie:

    - ``range``: from its least to its largest value, each times ``clip_ratio``;
    - ``symmetric``: to both sides of zero, as far as ``clip_ratio`` times its largest magnitude,
      with as many codes on either side;
    - ``mean``: a step is the range over ``2**bits``, and the upper of the two middle codes lies on
      the mean, so that skewed groups are clipped;
    - ``zero``: the same around zero, the range being twice the largest magnitude.

    Source: ``mean`` and ``zero``: QAQ (arXiv 2403.04643).

    Args:
        least_range: A smaller range counts as this for the first two; for the others a group of
            a smaller range is its mean throughout.
    """

    kind: Literal["simulated"] = "simulated"  # type: ignore[assignment]
    bits: Bits
    parameter_dtype: ParameterDtype = "float32"
    fit: Fit = "range"
    least_range: float = Field(default=0.0, ge=0)

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int32

    @property
    def _top_code(self) -> int:
        return 2**self.bits - (2 if self.fit == "symmetric" else 1)

    def _fit(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        low, high = _known_range(grouped)
        if self.fit in ("mean", "zero"):
            return self._around_middle(grouped, low, high)
        low, high = low * self.clip_ratio, high * self.clip_ratio
        if self.fit == "symmetric":
            reach = torch.maximum(high, -low).clamp_min(self.least_range)
            scale = reach / torch.full_like(reach, self._top_code // 2)
            return scale, scale * -(self._top_code // 2)
        width = (high - low).clamp_min(self.least_range)
        return width / torch.full_like(width, self._top_code), low

    def _around_middle(self, grouped: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.fit == "mean":
            middle, width = grouped.nanmean(-1, keepdim=True), high - low
        else:
            middle, width = torch.zeros_like(low), 2 * torch.maximum(high, -low)
        scale = torch.where(width < self.least_range, 0.0, width / 2**self.bits)
        return scale, middle - scale * 2 ** (self.bits - 1)


class NormalQuantiles(Grouped):
    """Levels at the quantiles of a normal with the mean and spread of the group.

    Code i stands for quantile ``(i + 1/2) / 2**bits``; bounds between codes are the quantiles
    ``(i + 1) / 2**bits``, which are not half way between levels. A group whose spread is below
    ``least_spread`` is its mean throughout. ``symmetric=True`` takes zero for the mean of levels.

    Source: QAQ (arXiv 2403.04643), the "normal" quantizer of its code.
    """

    kind: Literal["normal_quantiles"] = "normal_quantiles"
    bits: Annotated[int, Field(ge=1, le=8)]
    symmetric: bool = False
    least_spread: float = Field(default=0.0, ge=0)

    def code_bits(self, state_bits: int = 16) -> int:
        return self.bits

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return (self._affine_spec(head_dim, 2, torch.float32),)

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        grouped = self.grouped(states.float())
        mean = grouped.nanmean(-1, keepdim=True)
        count = (~grouped.isnan()).sum(-1, keepdim=True)
        squares = (grouped - mean).square().nansum(-1, keepdim=True)
        spread = (squares / (count - 1).clamp_min(1)).sqrt()
        spread = torch.where(spread < self.least_spread, 0.0, spread)
        mean = torch.zeros_like(mean) if self.symmetric else mean
        z = (grouped - mean) / torch.where(spread == 0, 1.0, spread)
        bounds = self._quantiles([i + 1 for i in range(2**self.bits - 1)], states.device)
        codes = torch.bucketize(z.contiguous(), bounds).to(torch.uint8)
        parameters = torch.cat((spread, mean), -1)
        return Encoded(self._ungrouped(codes, states.shape[-2]), {"affine": parameters})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        spread, mean = encoded.parameters["affine"].split(1, -1)
        levels = self._quantiles([i + 0.5 for i in range(2**self.bits)], encoded.codes.device)
        values = levels[self.grouped(encoded.codes).int()]
        return self._ungrouped(values * spread + mean, encoded.codes.shape[-2])

    def _quantiles(self, places: list[float], device: torch.device) -> Tensor:
        normal = NormalDist()
        found = [normal.inv_cdf(place / 2**self.bits) for place in places]
        return torch.tensor(found, dtype=torch.float32, device=device)


def _known_range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of each group, NaN left out; zero where nothing is left."""
    is_apart = grouped.isnan()
    low = grouped.masked_fill(is_apart, math.inf).amin(-1, keepdim=True)
    high = grouped.masked_fill(is_apart, -math.inf).amax(-1, keepdim=True)
    return low.nan_to_num(posinf=0.0), high.nan_to_num(neginf=0.0)
