"""Levels that fit states: the best ones for a histogram, found exactly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbits.errors import CalibrationError

BINS = 1024
NEGLIGIBLE = 1e-11
Floats = NDArray[np.float64]


class Histogram:
    """Weighted values in [-1, 1], by bin: the sums of weights, and of weights times values."""

    def __init__(self) -> None:
        self._weight = np.zeros(BINS)
        self._moment = np.zeros(BINS)
        self._square = np.zeros(BINS)

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Count values with their weights; those outside [-1, 1] go to the outermost bins."""
        values, weights = values.double().flatten(), weights.double().flatten()
        index = ((values + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        for total, each in (
            (self._weight, weights),
            (self._moment, weights * values),
            (self._square, weights * values.square()),
        ):
            sums = torch.zeros(BINS, dtype=torch.float64, device=values.device)
            total += sums.index_add_(0, index, each).cpu().numpy()

    @property
    def total(self) -> float:
        """All weights."""
        return float(self._weight.sum())

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the values."""
        mean = float(self._moment.sum() / self.total)
        return mean, max(0.0, float(self._square.sum() / self.total) - mean**2) ** 0.5

    def levels(self, bits: int) -> tuple[float, ...]:
        """The ``2**bits`` levels of least weighted squared error, ascending.

        Bins are cut into runs by dynamic programming, so that no start has to be guessed; the
        level of a run is its mean.

        Raises:
            CalibrationError: If there are fewer distinct values than levels.
        """
        count = 2**bits
        # Differences of sums lose what is this much lighter than the rest.
        seen = np.flatnonzero(self._weight > NEGLIGIBLE * self.total)
        if len(seen) < count:
            raise CalibrationError(
                f"calibration text must bring {count} distinct states a layer for {bits} bits, "
                f"got {len(seen)}; give more text"
            )
        weight, moment, square = (x[seen] for x in (self._weight, self._moment, self._square))
        cuts = _best_cuts(weight, moment, square, count)
        runs = [slice(low, high) for low, high in pairwise(cuts)]
        means = (float(moment[run].sum() / weight[run].sum()) for run in runs)
        return tuple(min(1.0, max(-1.0, mean)) for mean in means)

    def rounded_moments(self, levels: tuple[float, ...]) -> tuple[float, float]:
        """Mean and standard deviation once every bin takes the level nearest to its mean."""
        held = self._weight > 0
        means = self._moment[held] / self._weight[held]
        table = np.array(levels)
        taken = table[np.abs(means[:, None] - table).argmin(1)]
        share = self._weight[held] / self.total
        mean = float((share * taken).sum())
        return mean, float((share * (taken - mean) ** 2).sum()) ** 0.5


def _best_cuts(weight: Floats, moment: Floats, square: Floats, count: int) -> list[int]:
    """Where to cut ``n`` bins into ``count`` runs: ``count + 1`` ascending indices from 0 to n."""
    w, m, s = (np.concatenate(([0.0], np.cumsum(x))) for x in (weight, moment, square))
    size = len(weight)
    low, high = np.triu_indices(size + 1, 1)
    cost = np.full((size + 1, size + 1), np.inf)  # of a run from bin low up to bin high
    cost[low, high] = (s[high] - s[low]) - (m[high] - m[low]) ** 2 / (w[high] - w[low])
    best = cost[0].copy()  # of all bins up to here in the runs so far
    choices = []
    for _ in range(count - 1):
        total = best[:, None] + cost
        choice = total.argmin(0)
        choices.append(choice)
        best = total[choice, np.arange(size + 1)]
    cuts = [size]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return [0, *reversed(cuts)]
