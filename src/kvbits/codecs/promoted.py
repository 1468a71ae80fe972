"""Two bits for most channels of a key, four for those that are largest."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.affine import round_down, round_up
from kvbits.codecs.base import NO_CONTEXT, Codec, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.groups import check_whole_bytes
from kvbits.codecs.packing import pack_bits, unpack_bits

FP16 = torch.float16
NARROW, WIDE = 2, 4
MAX_CHANNELS = 256  # an index is a byte


class Promoted(Codec):
    """2-bit codes per channel, and two more bits for the channels of largest mean magnitude.

    Which channels those are is chosen anew for every block of tokens. The upper bits of their
    codes lie among the others', the lower ones apart: ``2 * num_promoted / D`` bits a value, and a
    byte a channel and block.

    Source: Kitty (arXiv 2511.18643).
    Differs from the paper: nothing known.
    """

    kind: Literal["promoted"] = "promoted"
    group_size: int = Field(ge=1)
    num_promoted: int = Field(ge=4, multiple_of=4)

    @property
    def bits(self) -> int:
        """Width of most codes."""
        return NARROW

    @property
    def block_tokens(self) -> int:
        return self.group_size

    def largest_magnitude(self, head_dim: int) -> float:
        return torch.finfo(FP16).max

    def code_bits(self, state_bits: int = 16) -> int:
        return NARROW

    def parameter_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        block = self.group_size
        return (
            ParameterSpec("affine", "block", head_dim, 2, FP16, block),
            ParameterSpec("channel", "block", self.num_promoted, 1, torch.uint8, block),
            ParameterSpec("lower", "token", 1, self.num_promoted // 4, torch.uint8),
        )

    def check_head_dim(self, head_dim: int) -> None:
        check_whole_bytes(head_dim, NARROW)
        if not self.num_promoted < head_dim <= MAX_CHANNELS:
            raise ValueError(
                f"head_dim must be above num_promoted={self.num_promoted} and at most "
                f"{MAX_CHANNELS}, got {head_dim}"
            )

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        blocks = states.float().unflatten(-2, (-1, self.group_size))  # [B, H_kv, N, G, D]
        # In float64, so that the order of a sum never shows in which channels are chosen.
        size = blocks.abs().double().sum(-2)
        order = size.sort(dim=-1, descending=True, stable=True).indices
        channel = order[..., : self.num_promoted].sort(-1).values  # [B, H_kv, N, P]
        is_wide = torch.zeros_like(size, dtype=torch.bool).scatter(-1, channel, True)
        top = torch.where(is_wide, 2**WIDE - 1, 2**NARROW - 1).float()[..., None, :]
        low, high = blocks.aminmax(dim=-2, keepdim=True)
        offset = round_down(low, FP16)
        scale = round_up((high - offset) / top, FP16)
        steps = (blocks - offset) / torch.where(scale == 0, 1.0, scale)
        codes = torch.minimum(steps.round().clamp(min=0), top).to(torch.uint8)
        wide = codes.gather(-1, self._of_tokens(channel))
        main = torch.where(is_wide[..., None, :], codes >> (WIDE - NARROW), codes)
        lower = pack_bits((wide & 3).flatten(-3, -2), NARROW)
        return Encoded(
            main.flatten(-3, -2),
            {
                "affine": torch.stack((scale, offset), -1).squeeze(-3).to(FP16),
                "channel": channel.to(torch.uint8)[..., None],
                "lower": lower[..., None, :],
            },
        )

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        channel = self._of_tokens(encoded.parameters["channel"].squeeze(-1).long())
        lower = unpack_bits(encoded.parameters["lower"].squeeze(-2), NARROW)
        main = encoded.codes.unflatten(-2, (-1, self.group_size))
        wide = (main.gather(-1, channel) << (WIDE - NARROW)) | lower.unflatten(
            -2, (-1, self.group_size)
        )
        codes = main.scatter(-1, channel, wide).float()
        scale, offset = encoded.parameters["affine"].float().unsqueeze(-3).unbind(-1)
        return (codes * scale + offset).flatten(-3, -2)

    def _of_tokens(self, channel: Tensor) -> Tensor:
        """Channels ``[B, H_kv, N, P]`` of every token of their block: ``[B, H_kv, N, G, P]``."""
        return channel[..., None, :].expand(*channel.shape[:-1], self.group_size, -1)
