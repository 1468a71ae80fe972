"""Rotations that follow the directions in which errors of keys and values matter."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.codecs.rotation import hadamard


class Covariance:
    """A sum of ``xᵀ x`` over weighted rows, float64 ``[D, D]``."""

    def __init__(self) -> None:
        self._sum = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Count rows ``[..., T, D]``, with weights ``[..., T]`` if they are not all alike."""
        exact = rows.double()
        weighted = exact if weights is None else exact * weights.double()[..., None]
        self._sum = self._sum + (weighted.mT @ exact).flatten(0, -3).sum(0).cpu()

    def rotation(self) -> Tensor:
        """The orthogonal matrix that spreads what counts over all channels, float32 ``[D, D]``.

        ``R H P``: eigenvectors by falling eigenvalue, a Hadamard matrix, and the order of channels
        whose numbers are read backwards in binary.

        Source: OSCAR (arXiv 2605.17757).
        """
        values, vectors = torch.linalg.eigh(self._sum)
        # A solver may return either sign of a vector; its largest entry is made positive.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = (vectors * largest.sign()).flip(-1)
        return hadamard(vectors)[:, reversed_bits(len(values))].float()


def value_weights(keys: Tensor, queries: Tensor) -> Tensor:
    """How much the values of tokens count, ``[H_kv, T]`` with a mean of 1 for every head.

    The squared scores of all queries with the key of a token: ``k Qᵀ Q kᵀ``.

    Args:
        keys: ``[H_kv, T, D]``.
        queries: ``[H_q, Q, D]``, of which H_q / H_kv meet each head of keys.
    """
    grouped = queries.double().unflatten(0, (len(keys), -1)).flatten(1, 2)  # [H_kv, r * Q, D]
    scores = (keys.double() @ (grouped.mT @ grouped) * keys.double()).sum(-1)
    mean = scores.mean(-1, keepdim=True)
    return scores / torch.where(mean == 0, 1.0, mean)


def reversed_bits(count: int) -> Tensor:
    """Numbers below ``count``, a power of two, with their binary digits backwards."""
    numbers, digits = torch.arange(count), count.bit_length() - 1
    return sum(
        (((numbers >> digit) & 1) << (digits - 1 - digit) for digit in range(digits)),
        start=torch.zeros_like(numbers),
    )
