"""How divergence grows along a document: forward KL by the number of tokens in front of it."""

from __future__ import annotations

from itertools import count, pairwise
from typing import NamedTuple

import torch

from kvbits.evaluation.statistics import clustered_mean

FIRST_EDGE = 16


class PositionBin(NamedTuple):
    """The counted predictions that have ``start`` to ``stop - 1`` tokens in front of them.

    Attributes:
        start: fewest tokens in front.
        stop: one more than the most.
        kl_nats: mean forward KL per token.
        kl_se: its standard error, clustered by document; nan for fewer than two documents.
        num_tokens: predictions in the bin.
    """

    start: int
    stop: int
    kl_nats: float
    kl_se: float
    num_tokens: int


def bin_edges(num_tokens: int) -> list[int]:
    """Return edges from 0 to beyond ``num_tokens``: 16, 24, 32, 48, two in every doubling.

    They do not depend on the documents, so that bins of different sets can be laid side by side.
    """
    edges = [0]
    for step in count():
        edges.append(FIRST_EDGE * 2 ** (step // 2) * (2 + step % 2) // 2)
        if edges[-1] > num_tokens:
            return edges
    raise AssertionError("unreachable")


class PositionSums:
    """Sums of KL by document and bin.

    Args:
        num_documents: of the set.
        num_tokens: of its longest document.
    """

    def __init__(self, num_documents: int, num_tokens: int) -> None:
        self._edges = bin_edges(num_tokens)
        self._inner = torch.tensor(self._edges[1:-1])
        self._sums = torch.zeros(num_documents, len(self._edges) - 1, 2, dtype=torch.float64)

    def add(self, documents: torch.Tensor, positions: torch.Tensor, kl: torch.Tensor) -> None:
        """Add predictions.

        Args:
            documents: ``[M]`` index of each one's document.
            positions: ``[M]`` tokens in front of it.
            kl: ``[M]`` forward KL, nats.
        """
        bins = torch.bucketize(positions, self._inner, right=True)
        values = torch.stack([kl.double(), torch.ones_like(kl, dtype=torch.float64)], dim=1)
        self._sums.index_put_((documents, bins), values, accumulate=True)

    def bins(self) -> tuple[PositionBin, ...]:
        """Return every bin that holds a prediction."""
        found = []
        for (start, stop), sums in zip(pairwise(self._edges), self._sums.unbind(1), strict=True):
            kl, counts = sums[sums[:, 1] > 0].unbind(1)
            if len(counts):
                mean, error = clustered_mean(kl.tolist(), counts.tolist())
                found.append(PositionBin(start, stop, mean, error, int(counts.sum())))
        return tuple(found)
