"""Rotation of a head's channels, which spreads what a few channels hold over all of them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvbits.codecs.base import NO_CONTEXT, EncodeContext
from kvbits.codecs.wrappers import Wrapper


class Rotated(Wrapper):
    """States times an orthonormal Hadamard matrix, with random signs first if a seed is given.

    Source: QuaRot (arXiv 2404.00456) section 4; signs: TurboQuant (arXiv 2504.19874).
    """

    kind: Literal["rotated"] = "rotated"
    sign_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    def largest_magnitude(self, head_dim: int) -> float:
        return self.largest_norm(head_dim) / math.sqrt(head_dim)

    def largest_norm(self, head_dim: int) -> float:
        # A rotation keeps the norm, and at worst gathers it in one channel. Sums on the way stay
        # within sqrt(D) times it, which float32 must hold too.
        float32 = torch.finfo(torch.float32).max / math.sqrt(head_dim)
        return min(self.inner.largest_norm(head_dim), float32)

    def check_head_dim(self, head_dim: int) -> None:
        if head_dim & (head_dim - 1):
            raise ValueError(
                f"head_dim must be a power of two to be rotated by a Hadamard matrix, "
                f"got {head_dim}"
            )
        super().check_head_dim(head_dim)

    def constants(self, head_dim: int) -> tuple[Tensor, ...]:
        return (self._signs(head_dim).float(), *super().constants(head_dim))

    def apply(self, states: Tensor, context: EncodeContext) -> Tensor:
        return hadamard(self._signed(states))

    def undo(self, states: Tensor, context: EncodeContext) -> Tensor:
        return self._signed(hadamard(states))

    def rotation(self, head_dim: int, device: torch.device) -> Tensor:
        return self.apply(torch.eye(head_dim, device=device), NO_CONTEXT)

    def _signed(self, states: Tensor) -> Tensor:
        if self.sign_seed is None:
            return states
        return states * self._signs(states.shape[-1]).to(states)

    def _signs(self, head_dim: int) -> Tensor:
        if self.sign_seed is None:
            return torch.ones(head_dim)
        generator = torch.Generator().manual_seed(self.sign_seed)
        return 2 * torch.randint(0, 2, (head_dim,), generator=generator) - 1


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis by the orthonormal Hadamard matrix, which is its own inverse.

    By sums and differences of pairs, log2 D times, always in the same order: a matrix product
    would round differently from one batch to the next, and so would codes.
    """
    width = x.shape[-1]
    step = 1
    while step < width:
        low, high = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        step *= 2
    return x * (1 / math.sqrt(width))
