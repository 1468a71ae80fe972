"""Inter-layer clustering: layers with the same candidates and similar errors decide together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvbits.tuning.tables import FloatArray


def cluster_layers(
    candidates: Sequence[tuple[int, ...]],
    sensitivity: FloatArray,
    *,
    eps: float = 0.05,
    min_samples: int = 2,
) -> tuple[tuple[int, ...], ...]:
    """Group layers by identical candidate set, then by DBSCAN on the errors of the kept pairs.

    Source: KVTuner (arXiv 2502.04420), inter-layer clustering; eps and min_samples as there.
    Differs from the paper: noise points become groups of their own, which the paper's tables
    show but its text does not say.

    Args:
        candidates: Per layer, the kept candidate indices.
        sensitivity: ``[L, P]`` errors; the columns of the kept pairs are compared.
        eps: Largest Euclidean distance between neighbours, in units of the error.
        min_samples: Layers that make a dense point, itself included.

    Returns:
        Groups of layer indices, ordered by their first layer; every layer is in exactly one.
    """
    by_set: dict[tuple[int, ...], list[int]] = {}
    for layer, kept in enumerate(candidates):
        by_set.setdefault(kept, []).append(layer)
    groups = [
        group
        for kept, layers in by_set.items()
        for group in _dense_groups(layers, sensitivity[np.ix_(layers, kept)], eps, min_samples)
    ]
    return tuple(sorted(groups))


def _dense_groups(
    layers: list[int], points: FloatArray, eps: float, min_samples: int
) -> list[tuple[int, ...]]:
    from sklearn.cluster import DBSCAN

    labels = DBSCAN(eps=eps, min_samples=min_samples).fit_predict(points)
    groups: dict[int, list[int]] = {}
    for position, (layer, label) in enumerate(zip(layers, labels, strict=True)):
        key = int(label) if label >= 0 else -1 - position  # noise: one group each
        groups.setdefault(key, []).append(layer)
    return [tuple(group) for group in groups.values()]
