"""Tokens of different widths: of every tile, those of the largest range get more bits."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvbits.codecs.affine import Affine
from kvbits.codecs.base import NO_CONTEXT, Codec, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.codebook import Codebook
from kvbits.codecs.groups import check_whole_bytes
from kvbits.codecs.packing import pack_bits, unpack_bits

MAX_TOKENS = 256  # an index is a byte
PLANE_BITS = (1, 2, 4)

TokenCodec = Annotated[Affine | Codebook, Field(discriminator="kind")]


class Tiered(Codec):
    """Every token by one of a few codecs that differ in width, as many of each in every tile.

    The ``num_wide[i]`` tokens of the largest range of a tile are at least as wide as
    ``codecs[i + 1]``. All codes have the first codec's width where codes lie; what wide ones have
    beyond it lies in a plane per step, and a byte names each wide token. So a tile takes the same
    bytes whatever is in it, and no token pays for the width of another.

    Source: the tiers of QAQ (arXiv 2403.04643).
    Differs from the paper: how many tokens of a tile are wide is fixed; which ones is not.

    Raises:
        ValueError: If widths do not ascend by 1, 2 or 4 bits, codecs store different parameters,
            or ``num_wide`` does not descend.
    """

    kind: Literal["tiered"] = "tiered"
    codecs: Annotated[tuple[TokenCodec, ...], Field(min_length=2)]
    num_wide: tuple[Annotated[int, Field(ge=1)], ...]
    tile_tokens: int = Field(default=64, ge=2, le=MAX_TOKENS)

    @model_validator(mode="after")
    def _check_tiers(self) -> Tiered:
        widths = [codec.bits for codec in self.codecs]
        if any(high - low not in PLANE_BITS for low, high in pairwise(widths)):
            raise ValueError(f"codecs must ascend by 1, 2 or 4 bits, got {widths} bits")
        if any(codec.block_tokens > 1 for codec in self.codecs):
            raise ValueError("codecs must be per token, got per channel")
        if len({codec.parameter_specs(MAX_TOKENS) for codec in self.codecs}) > 1:
            raise ValueError("codecs must store the same parameters, got different ones")
        if len(self.num_wide) != len(self.codecs) - 1:
            raise ValueError(
                f"num_wide must have {len(self.codecs) - 1} entries, one for each codec but the "
                f"first, got {len(self.num_wide)}"
            )
        counts = (self.tile_tokens, *self.num_wide)
        if any(low > high for high, low in pairwise(counts)):
            raise ValueError(
                f"num_wide must not ascend nor exceed tile_tokens={self.tile_tokens}, "
                f"got {self.num_wide}"
            )
        return self

    @property
    def bits(self) -> int:
        """Width of the narrowest codes."""
        return int(self.codecs[0].bits)

    @property
    def block_tokens(self) -> int:
        return self.tile_tokens

    @property
    def plane_bits(self) -> tuple[int, ...]:
        """Bits that every codec but the first has beyond the one before it."""
        return tuple(int(high.bits - low.bits) for low, high in pairwise(self.codecs))

    def largest_magnitude(self, head_dim: int) -> float:
        return min(codec.largest_magnitude(head_dim) for codec in self.codecs)

    def code_bits(self, state_bits: int = 16) -> int:
        return self.bits

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        tile = self.tile_tokens
        planes = (
            ParameterSpec(
                f"plane_{index}", "block", count, head_dim * bits // 8, torch.uint8, tile
            )
            for index, (count, bits) in enumerate(zip(self.num_wide, self.plane_bits, strict=True))
        )
        return (
            *self.codecs[0].parameter_specs(head_dim),
            ParameterSpec("wide_token", "block", self.num_wide[0], 1, torch.uint8, tile),
            *planes,
        )

    def check_head_dim(self, head_dim: int) -> None:
        for codec in self.codecs:
            codec.check_head_dim(head_dim)
        for bits in self.plane_bits:
            check_whole_bytes(head_dim, bits)

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        x = states.float()
        low, high = x.aminmax(dim=-1)
        ranges = (high - low).unflatten(-1, (-1, self.tile_tokens))  # [B, H_kv, N, t]
        order = ranges.sort(dim=-1, descending=True, stable=True).indices
        wide = order[..., : self.num_wide[0]]
        tier = self._tiers(wide)  # [B, H_kv, N, t]
        codes, parameters = self._chosen([codec.encode(x, context) for codec in self.codecs], tier)
        codes = codes.unflatten(-2, (-1, self.tile_tokens))  # [B, H_kv, N, t, D]
        for index in reversed(range(len(self.num_wide))):  # the lowest bits first
            bits, token = self.plane_bits[index], self._rows(wide, index, codes)
            whole = codes.gather(-2, token)
            parameters[f"plane_{index}"] = pack_bits(whole & (2**bits - 1), bits)
            codes = codes.scatter(-2, token, whole >> bits)
        parameters["wide_token"] = wide.to(torch.uint8)[..., None]
        return Encoded(codes.flatten(-3, -2), parameters)

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        wide = encoded.parameters["wide_token"].squeeze(-1).long()
        codes = encoded.codes.unflatten(-2, (-1, self.tile_tokens))
        for index, bits in enumerate(self.plane_bits):
            token = self._rows(wide, index, codes)
            lower = unpack_bits(encoded.parameters[f"plane_{index}"], bits)
            codes = codes.scatter(-2, token, codes.gather(-2, token) << bits | lower)
        codes, tier = codes.flatten(-3, -2), self._tiers(wide).flatten(-2)[..., None]
        decoded = torch.zeros(codes.shape, dtype=torch.float32, device=codes.device)
        for index, codec in enumerate(self.codecs):
            own = torch.where(tier == index, codes, 0)  # no code of another width
            states = codec.decode(Encoded(own, encoded.parameters), context)
            decoded = torch.where(tier == index, states, decoded)
        return decoded

    def _tiers(self, wide: Tensor) -> Tensor:
        """The codec of every token of a tile ``[..., t]``, of the wide ones by falling range."""
        tier = torch.zeros((*wide.shape[:-1], self.tile_tokens), dtype=torch.int64)
        tier = tier.to(wide.device)
        for index, count in enumerate(self.num_wide):
            tier = tier.scatter(-1, wide[..., :count], index + 1)
        return tier

    def _rows(self, wide: Tensor, index: int, codes: Tensor) -> Tensor:
        """The tokens of a plane as indices into ``codes [..., t, D]``."""
        token = wide[..., : self.num_wide[index], None]
        return token.expand(*token.shape[:-1], codes.shape[-1])

    def _chosen(self, encoded: list[Encoded], tier: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes and parameters of every token from the codec of its tier."""
        codes, parameters = encoded[0].codes, dict(encoded[0].parameters)
        tier = tier.flatten(-2)[..., None]  # [B, H_kv, T, 1]
        for index, each in enumerate(encoded[1:], start=1):
            codes = torch.where(tier == index, each.codes, codes)
            for name, values in each.parameters.items():
                parameters[name] = torch.where(tier[..., None] == index, values, parameters[name])
        return codes, parameters
