"""Rotation of a head's channels by matrices that were fitted to a model."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kvbits.codecs.arrays import Array, ArrayField
from kvbits.codecs.base import EncodeContext
from kvbits.codecs.wrappers import Wrapper


class MatrixRotated(Wrapper):
    """States times an orthogonal matrix, and times its transpose when decoded.

    Source: SpinQuant (arXiv 2405.16406) R3, OSCAR (arXiv 2605.17757): rotations from a file.

    Args:
        matrix: float32 ``[H, D, D]``, or ``[1, D, D]`` for all heads: ``x -> x @ matrix``.

    Raises:
        ValueError: If a matrix is not orthogonal within what float32 rounds away.
    """

    kind: Literal["matrix_rotated"] = "matrix_rotated"
    matrix: ArrayField

    @model_validator(mode="after")
    def _check_matrix(self) -> MatrixRotated:
        self.matrix.check_dtype(torch.float32)
        width = self.matrix.shape[-1] if self.matrix.shape else 0
        self.matrix.check_shape(None, width, width)
        found = deviation(self.matrix.tensor)
        most = tolerance(width)
        if found > most:
            raise ValueError(
                f"{self.matrix.name} must be orthogonal, within {most:.2g} of the identity when "
                f"multiplied by its transpose, got {found:.2g}"
            )
        return self

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (self.matrix, *super().arrays)

    def check_arrays(self, num_heads: int, head_dim: int) -> None:
        heads = 1 if self.matrix.shape[0] == 1 else num_heads
        self.matrix.check_shape(heads, head_dim, head_dim)
        super().check_arrays(num_heads, head_dim)

    def largest_magnitude(self, head_dim: int) -> float:
        return self.largest_norm(head_dim) / math.sqrt(head_dim)

    def largest_norm(self, head_dim: int) -> float:
        # A rotation keeps the norm, but for what its matrix was rounded by.
        float32 = torch.finfo(torch.float32).max
        return min(self.inner.largest_norm(head_dim), float32) / (1 + tolerance(head_dim))

    def apply(self, states: Tensor, context: EncodeContext) -> Tensor:
        return self._times(states, is_transposed=False)

    def undo(self, states: Tensor, context: EncodeContext) -> Tensor:
        return self._times(states, is_transposed=True)

    def _times(self, states: Tensor, *, is_transposed: bool) -> Tensor:
        # In float64, so that the order of a sum does not show in what is stored.
        matrix = self.matrix.on(states.device).double()
        return (states.double() @ (matrix.mT if is_transposed else matrix)).float()


def deviation(matrices: Tensor) -> float:
    """Largest entry of ``M Mᵀ - I`` over matrices ``[H, D, D]``, in absolute value."""
    exact = matrices.double()
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
    return float((exact @ exact.mT - identity).abs().max())


def tolerance(width: int) -> float:
    """What the deviation of an orthogonal matrix computed in float32 may be.

    Rounding every entry to float32 moves an entry of ``M Mᵀ`` by at most 2 * 2**-24 (Cauchy and
    Schwarz: rows have norm 1). A float32 eigensolver or a product of D terms adds errors that grow
    with sqrt(D) where they are independent; 16 of those is the room given.
    """
    return 16 * math.sqrt(width) * 2.0**-24
