"""Tiles whose rows and columns are brought to one spread before they are encoded."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.base import NO_CONTEXT, EncodeContext, Encoded, ParameterSpec
from kvbits.codecs.wrappers import Wrapper

FP16 = torch.float16
_STD_RANGE = (1e-3, 1e3)
_STEP_RANGE = (0.7, 2.0)  # of one correction, before the logarithm
_LOG_RANGE = (-0.3, 10.0)  # of the whole scale
_ROUNDING = 1e-9  # far above what float64 sums in another order differ by


class VarianceNormalised(Wrapper):
    """Tiles of tokens, divided by a scale per token or per channel that evens their spread out.

    ``scaled="token"`` for inner codecs with scales per channel, which take up the scale of every
    channel; ``"channel"`` for those with scales per token.

    Source: KVarN (arXiv 2606.03458), with the iteration of SINQ (arXiv 2509.22944).
    Differs from the paper: nothing known; the tile that is not full stays exact in the residual.
    """

    kind: Literal["variance_normalised"] = "variance_normalised"
    scaled: Literal["token", "channel"]
    tile_tokens: int = Field(default=128, ge=2)
    rounds: int = Field(default=8, ge=1)

    @property
    def block_tokens(self) -> int:
        return self.tile_tokens

    def largest_magnitude(self, head_dim: int) -> float:
        return self.inner.largest_magnitude(head_dim) / 2  # a scale is exp(-0.3) at the least

    def own_specs(self, head_dim: int) -> tuple[ParameterSpec, ...]:
        if self.scaled == "token":
            return (ParameterSpec("tile_scale", "token", 1, 1, FP16),)
        return (ParameterSpec("tile_scale", "block", head_dim, 1, FP16, self.tile_tokens),)

    def check_head_dim(self, head_dim: int) -> None:
        if self.tile_tokens % self.inner.block_tokens:
            raise ValueError(
                f"tile_tokens must be a multiple of the inner block, {self.inner.block_tokens} "
                f"tokens, got {self.tile_tokens}"
            )
        super().check_head_dim(head_dim)

    def encode(self, states: Tensor, context: EncodeContext = NO_CONTEXT) -> Encoded:
        tiles = states.float().unflatten(-2, (-1, self.tile_tokens))  # [B, H_kv, N, t, D]
        tokens, channels = tile_scales(tiles, self.rounds)
        scale = (tokens if self.scaled == "token" else channels).to(FP16)
        encoded = self.inner.encode((tiles / scale.float()).flatten(-3, -2), context)
        # Per token [B, H_kv, T, 1, 1]; per block [B, H_kv, N, D, 1].
        kept = scale.flatten(2, 3)[..., None] if self.scaled == "token" else scale.mT
        return Encoded(encoded.codes, encoded.parameters | {"tile_scale": kept})

    def decode(self, encoded: Encoded, context: EncodeContext = NO_CONTEXT) -> Tensor:
        scale = encoded.parameters["tile_scale"].float()
        decoded = self.inner.decode(encoded, context)
        if self.scaled == "token":
            return decoded * scale[..., 0]
        tiles = decoded.unflatten(-2, (-1, self.tile_tokens))
        return (tiles * scale.mT).flatten(-3, -2)


def tile_scales(tiles: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Scales of tokens ``[..., t, 1]`` and of channels ``[..., 1, D]`` that even spreads out.

    Every round multiplies the scale of each row and column by its spread over the least of all;
    the round whose spreads differ least counts. In float64, so that the order of a sum never
    shows; rounds often tie: then the first of them counts, and the next one is tried.
    """
    x = tiles.double()
    tokens = x.new_zeros(*x.shape[:-1], 1)
    channels = x.new_zeros(*x.shape[:-2], 1, x.shape[-1])
    by_token, by_channel = _spreads(x)
    target = torch.minimum(by_token.amin(-2, True), by_channel.amin(-1, True))
    best = (tokens, channels)
    least = x.new_full(target.shape, torch.inf)
    is_open = torch.ones_like(least, dtype=torch.bool)
    for _ in range(rounds + 1):
        by_token, by_channel = _spreads(x * (-tokens).exp() * (-channels).exp())
        highest = torch.maximum(by_token.amax(-2, True), by_channel.amax(-1, True))
        lowest = torch.minimum(by_token.amin(-2, True), by_channel.amin(-1, True))
        imbalance = highest / lowest
        is_open &= imbalance <= least * (1 + _ROUNDING)  # a tile stops where it gets worse
        is_better = is_open & (imbalance < least * (1 - _ROUNDING))
        least = torch.where(is_better, imbalance, least)
        best = (
            torch.where(is_better, tokens, best[0]),
            torch.where(is_better, channels, best[1]),
        )
        tokens = (tokens + (by_token / target).clamp(*_STEP_RANGE).log()).clamp(*_LOG_RANGE)
        channels = (channels + (by_channel / target).clamp(*_STEP_RANGE).log()).clamp(*_LOG_RANGE)
    return best[0].exp(), best[1].exp()


def _spreads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of rows and of columns."""
    by_token, by_channel = x.std(-1, keepdim=True), x.std(-2, keepdim=True)
    return by_token.clamp(*_STD_RANGE), by_channel.clamp(*_STD_RANGE)
