"""Integer codes with a scale and an offset, shared per token or per channel.

Statistics are float32. The offset is rounded *down* and the scale *up* to the dtype they are
stored in before any code is computed, so the stored range always covers the group and the error is
at most half a stored step. Offsets are real numbers, not integer zero points: a zero point of
``min / scale`` loses whole steps when a channel sits far from zero.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from kvbits.codecs.base import (
    NO_CONTEXT,
    TERNARY_BITS,
    EncodeContext,
    Encoded,
    ParameterSpec,
    Width,
)
from kvbits.codecs.groups import Grouped, check_whole_bytes

PARAMETER_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float8": torch.float8_e4m3fn,
}
WIDTHS = (TERNARY_BITS, 2, 3, 4, 8)
ParameterDtype = Literal["float16", "float32", "float8"]


def _known_width(bits: object) -> Width:
    if bits == TERNARY_BITS:
        return TERNARY_BITS
    if isinstance(bits, int) and not isinstance(bits, bool) and bits in WIDTHS:
        return bits
    raise PydanticCustomError("width", "Input should be 1.5, 2, 3, 4 or 8")


AffineWidth = Annotated[Width, PlainValidator(_known_width)]
"""1.5, 2, 3, 4 or 8."""


class Affine(Grouped):
    """Uniform quantization ``x ≈ codes * scale + offset``.

    ``granularity="per_token"`` shares a scale along ``head_dim`` in groups of ``group_size``
    channels (default: all of them); ``"per_channel"`` shares it along ``group_size`` tokens, as
    KIVI does for keys. ``symmetric=True`` drops the offset: ``x ≈ (codes - 2**(bits-1)) * scale``.
    ``bits=1.5`` has three levels, stored five codes to a byte. ``clip_ratio`` shrinks the range of
    every group by a factor before anything else: values beyond it take its ends.

    Source: KIVI (arXiv 2402.02750) section 3; KVTuner (arXiv 2502.04420) eq. 2; clipping and
    float8 (e4m3) scales: SKVQ (arXiv 2405.06219).
    Differs from the paper: scale and offset are rounded outwards to their stored dtype first.

    Raises:
        ValueError: If ``group_size`` is missing for per-channel codes or is not positive, or a
            setting is out of range.
    """

    kind: Literal["affine"] = "affine"
    bits: AffineWidth
    symmetric: bool = False
    parameter_dtype: ParameterDtype = "float16"
    clip_ratio: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _check_symmetry(self) -> Affine:
        if self.bits == TERNARY_BITS and self.symmetric:
            raise ValueError("symmetric must be False when bits=1.5, got True")
        return self

    def largest_magnitude(self, head_dim: int) -> float:
        # The range of a group is at most twice this; a float32 range must not overflow either.
        dtype = PARAMETER_DTYPES[self.parameter_dtype]
        return torch.finfo(dtype).max / (2 if dtype == torch.float32 else 1)

    @property
    def is_plain(self) -> bool:
        """Whether codes are stored as kernels know them: an fp16 scale and offset, whole bits."""
        is_known = self.parameter_dtype == "float16" and self.bits != TERNARY_BITS
        return is_known and not self.symmetric and self.clip_ratio == 1

    def code_bits(self, state_bits: int = 16) -> Width:
        return self.bits

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        dtype = storage_dtype(PARAMETER_DTYPES[self.parameter_dtype])
        return (self._affine_spec(head_dim, 1 if self.symmetric else 2, dtype),)

    def check_head_dim(self, head_dim: int) -> None:
        if self.bits != TERNARY_BITS:  # which pads its last byte
            check_whole_bytes(head_dim, int(self.bits))
        super().check_head_dim(head_dim)

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        grouped = self.grouped(states.float())
        scale, offset = self._fit(grouped)
        # A constant group has code 0, and the offset restores it.
        step = torch.where(scale == 0, 1.0, scale)
        if self.parameter_dtype == "float16":
            # The rounding of kernels, so that stored bytes do not depend on who encodes. The
            # reciprocal of a float32 scale may overflow; that of an fp16 scale does not.
            steps = (grouped - offset) * (1.0 / step)
        else:
            steps = (grouped - offset) / step
        codes = steps.round_().clamp_(0, self._top_code).to(self._code_dtype)
        parts = (scale,) if self.symmetric else (scale, offset)
        parameters = stored(torch.cat(parts, -1), PARAMETER_DTYPES[self.parameter_dtype])
        return Encoded(self._ungrouped(codes, states.shape[-2]), {"affine": parameters})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        dtype = PARAMETER_DTYPES[self.parameter_dtype]
        # [B, H_kv, N, rows, components]
        parameters = restored(encoded.parameters["affine"], dtype)
        codes = self.grouped(encoded.codes).float()
        scale = parameters[..., :1]
        offset = parameters[..., 1:]
        if self.symmetric:
            offset = scale * -(2.0 ** (self.bits - 1))
        return self._ungrouped(torch.addcmul(offset, codes, scale), encoded.codes.shape[-2])

    @property
    def _top_code(self) -> int:
        return 2 if self.bits == TERNARY_BITS else 2 ** int(self.bits) - 1

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.uint8

    def _fit(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Stored scale and offset of each group ``[..., values of the group]``, as float32."""
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        if self.clip_ratio != 1:
            low, high = low * self.clip_ratio, high * self.clip_ratio
        return self._scale_and_offset(low, high)

    def _scale_and_offset(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Stored scale and offset of each group, as float32."""
        dtype = PARAMETER_DTYPES[self.parameter_dtype]
        if self.symmetric:
            top = 2 ** (int(self.bits) - 1)
            scale = round_up(torch.maximum(high / (top - 1), -low / top).clamp_(min=0), dtype)
            return scale, scale * -top
        offset = round_down(low, dtype)
        # On a GPU, division by a number is a product with its reciprocal; by a tensor it is not.
        steps = torch.full_like(high, self._top_code)
        return round_up((high - offset) / steps, dtype), offset


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that values of ``dtype`` are stored in: bytes for 8-bit floats."""
    return torch.uint8 if dtype.itemsize == 1 else dtype


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 as ``dtype`` in its storage dtype."""
    return x.to(dtype).view(torch.uint8) if dtype.itemsize == 1 else x.to(dtype)


def restored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo ``stored``: float32."""
    return x.contiguous().view(dtype).float() if dtype.itemsize == 1 else x.float()


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to the largest value of ``dtype`` that is not above it; result in float32."""
    rounded = x.to(dtype)
    if dtype == torch.float32:
        return rounded
    bits = rounded.view(torch.int16 if dtype.itemsize == 2 else torch.int8)
    # The next value down, sign and magnitude in mind; what rounds up to zero rounds to -0.
    below = (bits - bits.sign()).view(dtype)
    return torch.where(rounded.float() > x, below, rounded).float()


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to the smallest value of ``dtype`` that is not below it; result in float32."""
    return -round_down(-x, dtype)
