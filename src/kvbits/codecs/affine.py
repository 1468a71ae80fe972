"""Integer codes with a scale and an offset, shared per token or per channel.

Statistics are float32. The offset is rounded *down* and the scale *up* to the dtype they are
stored in before any code is computed, so the stored range always covers the group and the error is
at most half a stored step. Offsets are real numbers, not integer zero points: a zero point of
``min / scale`` loses whole steps when a channel sits far from zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kvbits.codecs.base import Codec, Encoded, ParameterSpec

PARAMETER_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Affine(Codec):
    """Uniform quantization ``x ≈ codes * scale + offset``.

    ``granularity="per_token"`` shares a scale along ``head_dim`` in groups of ``group_size``
    channels (default: all of them); ``"per_channel"`` shares it along ``group_size`` tokens, as
    KIVI does for keys. ``symmetric=True`` drops the offset: ``x ≈ (codes - 2**(bits-1)) * scale``.

    Source: KIVI (arXiv 2402.02750) section 3; KVTuner (arXiv 2502.04420) eq. 2.
    Differs from the paper: scale and offset are rounded outwards to their stored dtype first.

    Raises:
        ValueError: If ``group_size`` is missing for per-channel codes or is not positive.
    """

    kind: Literal["affine"] = "affine"
    bits: Literal[2, 3, 4, 8]
    granularity: Literal["per_token", "per_channel"] = "per_token"
    group_size: int | None = None
    symmetric: bool = False
    parameter_dtype: Literal["float16", "float32"] = "float16"

    @model_validator(mode="after")
    def _check_group_size(self) -> Affine:
        if self.group_size is None:
            if self.granularity == "per_channel":
                raise ValueError(
                    "group_size must be given when granularity='per_channel', got None"
                )
        elif self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        return self

    @property
    def block_tokens(self) -> int:
        return self.group_size or 1 if self.granularity == "per_channel" else 1

    @property
    def largest_magnitude(self) -> float:
        # The range of a group is at most twice this; a float32 range must not overflow either.
        dtype = PARAMETER_DTYPES[self.parameter_dtype]
        return torch.finfo(dtype).max / (2 if dtype == torch.float32 else 1)

    def code_bits(self, state_bits: int = 16) -> int:
        return self.bits

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        dtype = PARAMETER_DTYPES[self.parameter_dtype]
        components = 1 if self.symmetric else 2
        if self.granularity == "per_channel":
            return (ParameterSpec("affine", "block", head_dim, components, dtype),)
        rows = head_dim // self._channels_per_group(head_dim)
        return (ParameterSpec("affine", "token", rows, components, dtype),)

    def check_head_dim(self, head_dim: int) -> None:
        # Byte w of a row holds channels w, w + NB, w + 2 NB, ...: a row must fill whole bytes.
        multiple = 8 if self.bits == 3 else 8 // self.bits
        if head_dim % multiple:
            raise ValueError(
                f"head_dim must be a multiple of {multiple} for bits={self.bits}, got {head_dim}"
            )
        group = self._channels_per_group(head_dim)
        if self.granularity == "per_token" and head_dim % group:
            raise ValueError(
                f"group_size must divide head_dim={head_dim}, got {self.group_size}; "
                "use None for one group per token and head"
            )

    def encode(self, states: Tensor) -> Encoded:
        grouped = self._grouped(states.float())
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        scale, offset = self._scale_and_offset(low, high)
        # A constant group has code 0, and the offset restores it.
        step = torch.where(scale == 0, 1.0, scale)
        if self.parameter_dtype == "float16":
            # The rounding of kernels, so that stored bytes do not depend on who encodes. The
            # reciprocal of a float32 scale may overflow; that of an fp16 scale does not.
            steps = (grouped - offset) * (1.0 / step)
        else:
            steps = (grouped - offset) / step
        codes = steps.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)
        parts = (scale,) if self.symmetric else (scale, offset)
        parameters = torch.cat(parts, -1).to(PARAMETER_DTYPES[self.parameter_dtype])
        return Encoded(self._ungrouped(codes, states.shape[-2]), {"affine": parameters})

    def decode(self, encoded: Encoded) -> Tensor:
        parameters = encoded.parameters["affine"].float()  # [B, H_kv, N, rows, components]
        codes = self._grouped(encoded.codes).float()
        scale = parameters[..., :1]
        offset = scale * -(2 ** (self.bits - 1)) if self.symmetric else parameters[..., 1:]
        return self._ungrouped(torch.addcmul(offset, codes, scale), encoded.codes.shape[-2])

    def _channels_per_group(self, head_dim: int) -> int:
        return self.group_size or head_dim

    def _grouped(self, x: Tensor) -> Tensor:
        """Bring each group to the last axis: ``[B, H_kv, N, rows, values of the group]``."""
        if self.granularity == "per_token":
            return x.unflatten(-1, (-1, self._channels_per_group(x.shape[-1])))
        return x.unflatten(-2, (-1, self.block_tokens)).transpose(-1, -2)

    def _ungrouped(self, grouped: Tensor, num_tokens: int) -> Tensor:
        if self.granularity == "per_token":
            return grouped.flatten(-2)
        return grouped.transpose(-1, -2).flatten(-3, -2)

    def _scale_and_offset(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Stored scale and offset of each group, as float32."""
        dtype = PARAMETER_DTYPES[self.parameter_dtype]
        if self.symmetric:
            top = 2 ** (self.bits - 1)
            scale = round_up(torch.maximum(high / (top - 1), -low / top).clamp_(min=0), dtype)
            return scale, scale * -top
        offset = round_down(low, dtype)
        # On a GPU, division by a number is a product with its reciprocal; by a tensor it is not.
        steps = torch.full_like(high, 2**self.bits - 1)
        return round_up((high - offset) / steps, dtype), offset


def round_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to the largest value of ``dtype`` that is not above it; result in float32."""
    rounded = x.to(dtype)
    if dtype == torch.float32:
        return rounded
    bits = rounded.view(torch.int16)
    # The next value down, sign and magnitude in mind; what rounds up to zero rounds to -0.
    below = (bits - bits.sign()).view(dtype)
    return torch.where(rounded.float() > x, below, rounded).float()


def round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to the smallest value of ``dtype`` that is not below it; result in float32."""
    return -round_down(-x, dtype)
