"""An order of channels in which those of like range lie together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_RESTARTS = 10


class ChannelRanges:
    """The least and the largest state of every channel, over documents; ``[H_kv, D]`` each."""

    def __init__(self) -> None:
        self._low, self._high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def add(self, states: Tensor) -> None:
        """Count states ``[1, H_kv, T, D]``, T of 1 or more."""
        low, high = states[0].float().aminmax(dim=-2)
        self._low = torch.minimum(self._low, low.cpu())
        self._high = torch.maximum(self._high, high.cpu())

    def order(self, group_size: int, *, within_heads: bool) -> Tensor:
        """Channels ``[H_kv, D]`` of all heads, so that groups of ``group_size`` are alike.

        ``within_heads``: every channel stays in its head.
        """
        points = torch.stack((self._low, self._high), -1).double().numpy()  # [H_kv, D, 2]
        num_heads, width = points.shape[:2]
        if within_heads:
            orders = [
                head * width + clustered_order(points[head], group_size)
                for head in range(num_heads)
            ]
            return torch.from_numpy(np.stack(orders)).int()
        flat = clustered_order(points.reshape(-1, 2), group_size)
        return torch.from_numpy(flat).int().view(num_heads, width)


def clustered_order(points: np.ndarray, group_size: int) -> np.ndarray:
    """Indices of points ``[C, 2]`` by cluster, to be cut into groups of ``group_size``.

    K-means, as many clusters as there are groups. Clusters are not of one size and groups are, so
    clusters stand in the order of their width, and points of a cluster too: a group that takes in
    the end of one cluster and the start of the next still holds neighbours.

    Source: SKVQ (arXiv 2405.06219) section 3.1, on the least and the largest of every channel.
    """
    from sklearn.cluster import KMeans

    width = points[:, 1] - points[:, 0]
    num_clusters = min(len(points) // group_size, len(np.unique(points, axis=0)))
    if num_clusters < 2:
        return np.arange(len(points))
    found = KMeans(n_clusters=num_clusters, n_init=_RESTARTS, random_state=0).fit(points)
    centre_width = found.cluster_centers_[:, 1] - found.cluster_centers_[:, 0]
    # The label tells clusters of one width apart; the sort is stable, so ties keep their order.
    return np.lexsort((width, found.labels_, centre_width[found.labels_]))
