from __future__ import annotations

import numpy as np

from kvbits.tuning.cluster import cluster_layers


def test_near_layers_with_one_candidate_set_share_a_group():
    errors = np.array([[0.10, 0.5], [0.90, 0.9], [0.12, 0.5], [0.13, 0.5]])
    assert cluster_layers([(0, 1)] * 4, errors) == ((0, 2, 3), (1,))


def test_different_candidate_sets_never_share_a_group():
    errors = np.full((3, 2), 0.1)
    assert cluster_layers([(0,), (0, 1), (0,)], errors) == ((0, 2), (1,))


def test_only_the_kept_pairs_are_compared():
    errors = np.array([[0.1, 0.0], [0.1, 9.0]])
    assert cluster_layers([(0,), (0,)], errors) == ((0, 1),)


def test_every_layer_is_in_exactly_one_group():
    errors = np.random.default_rng(1).random((20, 4))
    groups = cluster_layers([(0, 1, 2, 3)] * 20, errors, eps=0.3)
    assert sorted(layer for group in groups for layer in group) == list(range(20))
    assert list(groups) == sorted(groups)
