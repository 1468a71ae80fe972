"""Channels in another order, so that those of like range share a group."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kvbits.codecs.arrays import Array, ArrayField
from kvbits.codecs.base import EncodeContext
from kvbits.codecs.wrappers import Wrapper


class Permuted(Wrapper):
    """States whose channels are moved before they are encoded, and back when decoded.

    Channel d of head h is encoded as channel ``order[h, d]`` of all ``H * D``, head after head, so
    that a group may gather channels of several heads; where no channel leaves its head, every row
    of ``order`` keeps to its own D numbers.

    Source: SKVQ (arXiv 2405.06219) section 3.1.

    Args:
        order: int32 ``[H, D]``, a permutation of 0 to H * D - 1.

    Raises:
        ValueError: If ``order`` is no permutation.
    """

    kind: Literal["permuted"] = "permuted"
    order: ArrayField

    @model_validator(mode="after")
    def _check_order(self) -> Permuted:
        self.order.check_dtype(torch.int32)
        self.order.check_shape(None, None)
        flat = self.order.tensor.flatten()
        if not torch.equal(flat.sort().values, torch.arange(len(flat), dtype=torch.int32)):
            raise ValueError(
                f"{self.order.name} must hold every number from 0 to {len(flat) - 1} once, "
                "got another list"
            )
        return self

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.order, *super().arrays)

    def check_arrays(self, num_heads: int, head_dim: int) -> None:
        self.order.check_shape(num_heads, head_dim)
        super().check_arrays(num_heads, head_dim)

    def apply(self, states: Tensor, context: EncodeContext) -> Tensor:
        return _gathered(states, self.order.on(states.device).long())

    def undo(self, states: Tensor, context: EncodeContext) -> Tensor:
        order = self.order.on(states.device).long()
        return _gathered(states, order.flatten().argsort().view_as(order))


def _gathered(states: Tensor, order: Tensor) -> Tensor:
    """Channels ``order`` ``[H, D]`` of all heads of ``[B, H, T, D]``."""
    rows = states.transpose(1, 2).flatten(-2)  # [B, T, H * D]
    return rows[..., order.flatten()].unflatten(-1, order.shape).transpose(1, 2)
