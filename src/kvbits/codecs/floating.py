"""The floating formats engines have: fp8 with one scale, and 4-bit blocks with small scales."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.affine import restored, stored
from kvbits.codecs.base import NO_CONTEXT, Codec, EncodeContext, Encoded, ParameterSpec

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes; bit 3 of a code is the sign
E8M0_BIAS = 127
FLOAT32_MANTISSA_BITS = 23

TensorScale = Annotated[float, Field(ge=2.0**-64, le=2.0**64)]


class Float8(Codec):
    """fp8 e4m3 with one scale for all states: ``x ≈ code * tensor_scale``, saturating at 448.

    Source: OCP 8-bit floating point specification; what vLLM and TensorRT-LLM call fp8 KV cache.
    """

    kind: Literal["float8"] = "float8"
    tensor_scale: TensorScale = 1.0

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 8

    @property
    def block_tokens(self) -> int:
        return 1

    def code_bits(self, state_bits: int = 16) -> int:
        return 8

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return ()

    def check_head_dim(self, head_dim: int) -> None:
        """Any head_dim can be stored."""

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        scaled = _divided(states, self.tensor_scale).clamp(-E4M3_MAX, E4M3_MAX)
        return Encoded(stored(scaled, E4M3), {})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        return restored(encoded.codes, E4M3) * self.tensor_scale


class Float4(Codec):
    """fp4 e2m1 in blocks of channels: ``x ≈ code * scale``, and for nvfp4 ``* tensor_scale``.

    ``nvfp4``: 16 channels share an e4m3 scale, their largest magnitude over 6. ``mxfp4``: 32 share
    a power of two. Rounding is to nearest, ties to even, and saturates.

    Source: NVIDIA NVFP4; OCP microscaling formats (arXiv 2310.10537).
    """

    kind: Literal["float4"] = "float4"
    format: Literal["nvfp4", "mxfp4"]
    tensor_scale: TensorScale = 1.0

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 4

    @property
    def block_tokens(self) -> int:
        return 1

    @property
    def group_size(self) -> int:
        """Channels that share a scale."""
        return 16 if self.format == "nvfp4" else 32

    def code_bits(self, state_bits: int = 16) -> int:
        return 4

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return (ParameterSpec("scale", "token", head_dim // self.group_size, 1, torch.uint8),)

    def check_head_dim(self, head_dim: int) -> None:
        if head_dim % self.group_size:
            raise ValueError(
                f"head_dim must be a multiple of {self.group_size} for {self.format}, "
                f"got {head_dim}"
            )

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        grouped = _divided(states, self.tensor_scale).unflatten(-1, (-1, self.group_size))
        scale = self._stored_scale(grouped.abs().amax(-1, keepdim=True))
        step = self._scale(scale)
        scaled = grouped / torch.where(step == 0, 1.0, step)
        codes = torch.bucketize(scaled.abs(), _edges(states.device)).to(torch.uint8)
        codes |= (scaled < 0).to(torch.uint8) << 3
        return Encoded(codes.flatten(-2), {"scale": scale})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        codes = encoded.codes.unflatten(-1, (-1, self.group_size)).int()
        levels = [*E2M1, *(-x for x in E2M1)]
        magnitudes = torch.tensor(levels, dtype=torch.float32, device=codes.device)
        values = magnitudes[codes] * self._scale(encoded.parameters["scale"])
        return values.flatten(-2) * self.tensor_scale

    def _stored_scale(self, largest: Tensor) -> Tensor:
        """Bytes of the scales of groups whose largest magnitudes are given."""
        if self.format == "nvfp4":
            return stored(_divided(largest, E2M1[-1]).clamp(max=E4M3_MAX), E4M3)
        # 6 = 1.5 * 2**2: the largest magnitude gets the exponent of the largest code.
        exponent = torch.frexp(largest).exponent - 1 - 2
        biased = torch.where(largest == 0, 0, exponent + E8M0_BIAS)
        return biased.clamp(0, 254).to(torch.uint8)

    def _scale(self, scale: Tensor) -> Tensor:
        if self.format == "nvfp4":
            return restored(scale, E4M3)
        # e8m0 is the exponent of a float32; its least, a group of zeros, becomes 0.
        return (scale.int() << FLOAT32_MANTISSA_BITS).view(torch.float32)


def _divided(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor`` in float32: on a GPU, by a number would be a product with its reciprocal."""
    return x.float() / torch.full((1,), divisor, dtype=torch.float32, device=x.device)


def _edges(device: torch.device) -> Tensor:
    """Where one magnitude ends and the next begins; a tie goes to the even one of the two."""
    levels = torch.tensor(E2M1, dtype=torch.float32, device=device)
    middle = (levels[1:] + levels[:-1]) / 2
    is_upper_even = torch.arange(len(middle), device=device) % 2 == 1
    return torch.where(is_upper_even, torch.nextafter(middle, levels[:-1]), middle)
