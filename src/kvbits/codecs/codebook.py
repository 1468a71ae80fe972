"""Codes that name levels of a table instead of equal steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvbits.codecs.affine import round_up
from kvbits.codecs.base import NO_CONTEXT, Codec, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.groups import Grouped, check_whole_bytes

MAX_LEVELS = 256
FP16 = torch.float16

Level = Annotated[float, Field(ge=-1e3, le=1e3)]
Levels = Annotated[tuple[Level, ...], Field(min_length=4, max_length=MAX_LEVELS)]


class Table(Codec):
    """What codecs over a table of levels share; not one by itself.

    Raises:
        ValueError: If the levels do not ascend, or their number is not 4, 8, 16 or 256.
    """

    levels: Levels

    @model_validator(mode="after")
    def _check_levels(self) -> Table:
        if not all(low < high for low, high in pairwise(self.levels)):
            raise ValueError(f"levels must ascend, got {self.levels}")
        if len(self.levels) not in (4, 8, 16, MAX_LEVELS):
            raise ValueError(f"levels must number 4, 8, 16 or 256, got {len(self.levels)}")
        return self

    @property
    def bits(self) -> int:
        """Width of a code."""
        return round(math.log2(len(self.levels)))

    def code_bits(self, state_bits: int = 16) -> int:
        return self.bits

    def check_head_dim(self, head_dim: int) -> None:
        check_whole_bytes(head_dim, self.bits)

    def nearest(self, x: Tensor) -> Tensor:
        """Code of the level nearest to each value; of two as near, the lower one."""
        return torch.bucketize(x.contiguous(), self.midpoints(x.device)).to(torch.uint8)

    def midpoints(self, device: torch.device) -> Tensor:
        """Where the nearest level changes, float32."""
        table = self.table(device)
        return (table[1:] + table[:-1]) / 2

    def constants(self, head_dim: int) -> tuple[Tensor, ...]:
        """Midpoints, and what codes decode to."""
        cpu = torch.device("cpu")
        return self.midpoints(cpu), self.decoded_table(cpu)

    def table(self, device: torch.device) -> Tensor:
        """The levels, float32."""
        return torch.tensor(self.levels, dtype=torch.float32, device=device)

    def decoded_table(self, device: torch.device) -> Tensor:
        """What codes decode to, before any scale; float32."""
        return self.table(device)


class FittedTable(Table):
    """A table over [-1, 1]; not one by itself.

    ``decoded_levels`` stand for the levels where states are decoded: KVQuant's Q-Norm moves them
    so that decoded states have the mean and spread of exact ones.
    """

    decoded_levels: Levels | None = None

    @model_validator(mode="after")
    def _check_span(self) -> FittedTable:
        if self.levels[0] < -1 or self.levels[-1] > 1:
            raise ValueError(f"levels must lie in [-1, 1], got {self.levels}")
        if self.decoded_levels is not None and len(self.decoded_levels) != len(self.levels):
            raise ValueError(
                f"decoded_levels must number {len(self.levels)}, as levels do, "
                f"got {len(self.decoded_levels)}"
            )
        return self

    def decoded_table(self, device: torch.device) -> Tensor:
        levels = self.decoded_levels or self.levels
        return torch.tensor(levels, dtype=torch.float32, device=device)


class Codebook(FittedTable, Grouped):
    """Levels over the range of a group: ``x ≈ levels[code] * scale + offset``.

    The levels lie in [-1, 1]; ``scale`` is half the range of a group and ``offset`` its middle.

    Source: KVQuant (arXiv 2401.18079) section 3.3 (nuq).
    Differs from the paper: scale and offset are rounded to fp16 first, the scale upwards, so that
    the range stays covered. ``RangeNormalised`` has the ranges of calibration.
    """

    kind: Literal["codebook"] = "codebook"

    def largest_magnitude(self, head_dim: int) -> float:
        return torch.finfo(FP16).max / 2

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return (self._affine_spec(head_dim, 2, FP16),)

    def check_head_dim(self, head_dim: int) -> None:
        Table.check_head_dim(self, head_dim)
        Grouped.check_head_dim(self, head_dim)

    def normalised(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values in [-1, 1] by group ``[B, H_kv, N, rows, values]``, their scale and offset."""
        grouped = self.grouped(states.float())
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        offset = ((low + high) / 2).to(FP16).float()
        scale = round_up(torch.maximum(high - offset, offset - low), FP16)
        return (grouped - offset) / torch.where(scale == 0, 1.0, scale), scale, offset

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        values, scale, offset = self.normalised(states)
        parameters = torch.cat((scale, offset), -1).to(FP16)
        codes = self._ungrouped(self.nearest(values), states.shape[-2])
        return Encoded(codes, {"affine": parameters})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        scale, offset = encoded.parameters["affine"].float().split(1, -1)
        values = self.decoded_table(encoded.codes.device)[self.grouped(encoded.codes).int()]
        return self._ungrouped(values * scale + offset, encoded.codes.shape[-2])


class NormScaled(Table):
    """One norm per token, and levels for its direction: ``x ≈ norm * levels[code] / sqrt(D)``.

    The levels are those of a standard normal, which is what the channels of a rotated direction
    look like, so wrap this in ``Rotated``. ``is_corrected`` stores the norm that makes the decoded
    vector as long as the exact one.

    Source: TurboQuant (arXiv 2504.19874), the variant of least mean squared error.
    Differs from the paper: the norm is corrected, as engines that adopted it do; no sketch of the
    residual.
    """

    kind: Literal["norm_scaled"] = "norm_scaled"
    is_corrected: bool = True

    @property
    def block_tokens(self) -> int:
        return 1

    def largest_magnitude(self, head_dim: int) -> float:
        return self.largest_norm(head_dim) / math.sqrt(head_dim)

    def largest_norm(self, head_dim: int) -> float:
        return torch.finfo(FP16).max / 2  # leaves the correction room

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return (ParameterSpec("norm", "token", 1, 1, FP16),)

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        # In float64, so that the order of a sum never shows in what is stored.
        x = states.double()
        norm = x.square().sum(-1, keepdim=True).sqrt()
        root = math.sqrt(states.shape[-1])
        direction = x * (root / torch.where(norm == 0, 1.0, norm))
        codes = self.nearest(direction.float())
        if self.is_corrected:
            level = self.table(states.device).double()[codes.int()]
            length = level.square().sum(-1, keepdim=True).sqrt()
            corrected = norm * root / torch.where(length == 0, 1.0, length)
            norm = torch.where(length == 0, norm, corrected)
        stored = norm.clamp(max=torch.finfo(FP16).max).to(FP16)[..., None]  # [B, H_kv, T, 1, 1]
        return Encoded(codes, {"norm": stored})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        norm = encoded.parameters["norm"].float().squeeze(-1)
        values = self.table(encoded.codes.device)[encoded.codes.int()]
        return values * (norm / math.sqrt(encoded.codes.shape[-1]))
