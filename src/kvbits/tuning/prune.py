"""Intra-layer pruning: keep the pairs of a layer that none beats in both size and error."""

from __future__ import annotations

import numpy as np

from kvbits.tuning.tables import BoolArray, CostTable, FloatArray


def pareto_mask(cost: FloatArray, loss: FloatArray) -> BoolArray:
    """Mark the points that no other point matches or beats in both coordinates.

    Of points equal in both, the first is kept.

    Args:
        cost: ``[P]``, smaller is better.
        loss: ``[P]``, smaller is better.

    Returns:
        ``[P]`` booleans.
    """
    order = np.lexsort((np.arange(len(cost)), loss, cost))
    keep = np.zeros(len(cost), dtype=np.bool_)
    best = np.inf
    for index in order:
        if loss[index] < best:
            keep[index], best = True, loss[index]
    return keep


def pareto_sets(costs: CostTable, sensitivity: FloatArray) -> tuple[tuple[int, ...], ...]:
    """Return, per layer, the candidate indices of the Pareto set on (effective bits, sensitivity).

    Source: KVTuner (arXiv 2502.04420), intra-layer pruning.
    Differs from the paper: size is effective bits with metadata instead of the mean of the two
    nominal widths, and the exact pair is a candidate.

    Args:
        costs: Sizes of the candidates.
        sensitivity: ``[L, P]``, the attention output error e_o by default.
    """
    if sensitivity.shape != costs.units.shape:
        raise ValueError(
            f"sensitivity must have shape {costs.units.shape}, got {sensitivity.shape}"
        )
    masks = [
        pareto_mask(units.astype(np.float64), errors)
        for units, errors in zip(costs.units, sensitivity, strict=True)
    ]
    return tuple(tuple(int(i) for i in np.flatnonzero(mask)) for mask in masks)
