from __future__ import annotations

import numpy as np
import pytest
from tuning_synthetic import candidate_pairs, make_costs

from kvbits.tuning.prune import pareto_mask, pareto_sets


def test_pareto_mask_agrees_with_the_definition():
    generator = np.random.default_rng(0)
    cost, loss = generator.integers(0, 6, size=(2, 30)).astype(float)
    points = list(zip(cost, loss, strict=True))
    dominated = [any(c <= a and d <= b and (c, d) != (a, b) for c, d in points) for a, b in points]
    kept = [point for point, keep in zip(points, pareto_mask(cost, loss), strict=True) if keep]
    assert sorted(kept) == sorted({p for p, bad in zip(points, dominated, strict=True) if not bad})


def test_of_equal_points_the_first_is_kept():
    assert pareto_mask(np.array([1.0, 1.0]), np.array([2.0, 2.0])).tolist() == [True, False]


def test_the_paper_s_standard_set_is_recovered_from_its_table_3():
    """e_o of Llama-3.1-8B per token (arXiv 2502.04420, table 3) keeps KV8 K8V4 KV4 K4V2 KV2."""
    costs = make_costs(1, (8, 4, 2))
    errors = {
        (16, 16): 0.0, (8, 8): 0.014, (8, 4): 0.100, (8, 2): 0.401, (4, 8): 0.168,
        (4, 4): 0.207, (4, 2): 0.453, (2, 8): 0.882, (2, 4): 0.892, (2, 2): 0.962,
    }  # fmt: skip
    kept = pareto_sets(costs, np.array([[errors[p] for p in candidate_pairs((8, 4, 2))]]))[0]
    assert tuple(costs.candidates[i].label for i in kept[1:]) == (
        "K8V8",
        "K8V4",
        "K4V4",
        "K4V2",
        "K2V2",
    )


def test_shape_mismatch_is_refused():
    with pytest.raises(ValueError, match=r"sensitivity must have shape \(2, 5\), got \(3, 5\)"):
        pareto_sets(make_costs(2, (4, 2)), np.zeros((3, 5)))
