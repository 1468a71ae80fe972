"""A few values of every token corrected in 16 bits, so that the others need a smaller range."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.base import NO_CONTEXT, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.wrappers import Wrapper

FP16 = torch.float16
FP16_MAX = torch.finfo(FP16).max
MAX_CHANNELS = 256  # an index is a byte


def slots_for(share: float, head_dim: int) -> int:
    """The even number of slots, at least two, that is nearest to a share of a token's values."""
    return 2 * max(1, round(share * head_dim / 2))


class Outliers(Wrapper):
    """The ``slots`` most extreme values of every token and head, half of them from each end.

    ``by="token"``: the largest and smallest of the token. ``by="channel"``: those furthest from
    the middle of their channel in this block of tokens, in half ranges, so that a channel that
    lies far from zero does not take every slot; for inner codecs with scales per channel.

    A slot is a byte for the channel and, in fp16, what the inner codec decodes too little there:
    ``24 * slots / D`` bits a value. A reader adds it, whatever the code at that place.

    Source: KVQuant (arXiv 2401.18079) section 3.4.
    Differs from the paper: as many slots for every token and head, so that nothing has to be sized
    while decoding; keys are compared within their block, not with calibrated thresholds.
    """

    kind: Literal["outliers"] = "outliers"
    slots: int = Field(ge=2, multiple_of=2)
    by: Literal["token", "channel"] = "token"

    def largest_magnitude(self, head_dim: int) -> float:
        # A difference is up to twice a state, and a little more where steps are rounded upwards.
        return min(self.inner.largest_magnitude(head_dim), FP16_MAX / 4)

    def own_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        return (
            ParameterSpec("outlier_channel", "token", 1, self.slots, torch.uint8),
            ParameterSpec("outlier_value", "token", 1, self.slots, FP16),
        )

    def check_head_dim(self, head_dim: int) -> None:
        if not self.slots < head_dim <= MAX_CHANNELS:
            raise ValueError(
                f"head_dim must be above slots={self.slots} and at most {MAX_CHANNELS}, "
                f"got {head_dim}"
            )
        super().check_head_dim(head_dim)

    def parted(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is left to the inner codec, and channels and values ``[B, H_kv, T, slots]``."""
        x = states.float()
        score, middle = self._score(x)
        half = self.slots // 2
        order = score.sort(dim=-1, stable=True).indices
        channel = torch.cat((order[..., :half], order[..., -half:]), -1).sort(-1).values
        rest = x.scatter(-1, channel, middle.expand_as(x).gather(-1, channel))
        return rest, channel, x.gather(-1, channel)

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        rest, channel, value = self.parted(states)
        encoded = self.inner.encode(rest, context)
        missing = value - self.inner.decode(encoded, context).gather(-1, channel)
        own = {
            "outlier_channel": channel.to(torch.uint8)[..., None, :],
            "outlier_value": missing.clamp(-FP16_MAX, FP16_MAX).to(FP16)[..., None, :],
        }
        return Encoded(encoded.codes, encoded.parameters | own)

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        channel = encoded.parameters["outlier_channel"].squeeze(-2).long()
        missing = encoded.parameters["outlier_value"].squeeze(-2).float()
        return self.inner.decode(encoded, context).scatter_add(-1, channel, missing)

    def _score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How far out every value is, and what stands in for an outlier in its group."""
        if self.by == "token":
            return x, x.median(-1, keepdim=True).values
        blocks = x.unflatten(-2, (-1, self.block_tokens))
        low, high = blocks.aminmax(dim=-2, keepdim=True)
        middle = (low + high) / 2
        half = (high - low) / 2
        score = (blocks - middle) / torch.where(half == 0, 1.0, half)
        return score.flatten(-3, -2), middle.expand_as(blocks).flatten(-3, -2)
