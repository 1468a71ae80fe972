"""Exact quantiles of every channel near its ends, from states that come document by document."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class ChannelQuantiles:
    """The value below which a share of a channel's states lies, and above which as many do.

    Only as many of the largest and smallest states are kept as the quantiles can reach, so memory
    is that share of all states.

    Args:
        num_tokens: States of a channel that will be counted.
        share: Below 0.5; 0 for the least and the largest.
    """

    def __init__(self, num_tokens: int, share: float) -> None:
        self._place = share * (num_tokens - 1)  # among the states in order, from 0
        self._count = math.floor(self._place) + 2
        self._left = num_tokens
        self._low = self._high = torch.empty(0)

    def add(self, states: Tensor) -> None:
        """Count states ``[1, H_kv, T, D]``."""
        values = states[0].float().mT.cpu()  # [H_kv, D, T]
        self._left -= values.shape[-1]
        self._low = self._extremes(self._low, values, is_largest=False)
        self._high = self._extremes(self._high, values, is_largest=True)

    def _extremes(self, kept: Tensor, values: Tensor, *, is_largest: bool) -> Tensor:
        together = torch.cat((kept, values), -1) if kept.numel() else values
        count = min(self._count, together.shape[-1])
        return together.topk(count, largest=is_largest).values  # the outermost comes first

    @property
    def is_complete(self) -> bool:
        """Whether all states were counted, and there were any."""
        return self._left == 0 and self._low.numel() > 0

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper quantile ``[H_kv, D]``, between two states in proportion."""
        assert self.is_complete, "states are missing"
        return self._at_place(self._low), self._at_place(self._high)

    def _at_place(self, extremes: Tensor) -> Tensor:
        below = math.floor(self._place)
        above = min(below + 1, extremes.shape[-1] - 1)
        return extremes[..., below].lerp(extremes[..., above], self._place - below)
