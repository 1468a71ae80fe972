from __future__ import annotations

import numpy as np
import pytest
from tuning_synthetic import column, make_costs, make_problem, make_table

from kvbits.tuning.problem import DOMAIN_FLOOR, SHARES, build_problem


def flat_problem(scales: list[float], bits: float):
    """Every layer and side costs 0.1, 1 or 9 nats at 8, 4 and 2 bits, times the domain's scale."""
    kl_nats = np.ones((len(scales), 6, 2, 3)) * [0.1, 1.0, 9.0]
    kl_nats *= np.array(scales)[:, None, None, None]
    return build_problem(make_table((8, 4, 2), kl_nats), make_costs(6, (8, 4, 2)), bits=bits)


@pytest.mark.parametrize(("pair", "bits"), [((2, 2), 2.5), ((4, 4), 4.5), ((8, 8), 8.5)])
def test_uniform_plan_has_loss_one_at_its_own_size(pair, bits):
    problem = flat_problem([1.0, 0.5], bits)
    choice = (column((8, 4, 2), pair),) * 6
    assert problem.allocation(choice).loss == pytest.approx(1.0)
    assert problem.norms[0] == pytest.approx(2 * problem.norms[1])


def test_between_uniform_sizes_the_reference_is_interpolated_in_the_logarithm():
    low, middle, high = (flat_problem([1.0], bits).norms[0] for bits in (3.5, 4.0, 4.5))
    assert middle == pytest.approx(np.sqrt(low * high))


def test_reference_never_rises_with_size_and_is_flat_outside():
    problem = make_problem(6, (8, 4, 2), seed=1)
    norms = np.array([problem.at(bits).norms for bits in np.arange(2.0, 17.0, 0.25)])
    assert (np.diff(norms, axis=0) <= 1e-12).all()
    assert np.allclose(problem.at(10.0).norms, problem.at(8.5).norms)


def test_tiny_domain_counts_as_a_share_of_the_largest():
    problem = flat_problem([1.0, 1e-6], 4.5)
    assert problem.norms[1] == pytest.approx(DOMAIN_FLOOR * problem.norms[0])


def test_domain_that_costs_nothing_has_a_finite_loss():
    problem = flat_problem([1.0, 0.0], 4.5)
    assert np.isfinite(problem.loss).all()


def test_objectives_weigh_domains_as_named():
    problem = flat_problem([1.0, 1.0], 4.5)
    kl_nats = problem.norms * [2.0, 4.0]
    weights = np.array([0.75, 0.25])
    scores = {
        name: problem._replace(objective=name, weights=weights).score(kl_nats) for name in SHARES
    }
    assert scores == pytest.approx({"minimax": 4.0, "sum": 2.5, "balanced": 3.25})


def test_weights_are_normalised():
    table = make_table((4, 2), np.ones((2, 3, 2, 2)))
    problem = build_problem(table, make_costs(3, (4, 2)), bits=4.0, weights=[3.0, 1.0])
    assert problem.weights.tolist() == [0.75, 0.25]
