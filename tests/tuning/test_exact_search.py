from __future__ import annotations

import itertools

import numpy as np
import pytest
from tuning_synthetic import column, make_costs, make_problem, make_table

from kvbits.tuning.problem import Problem, build_problem
from kvbits.tuning.search import baselines
from kvbits.tuning.search.exact import budget_grid, solve, solve_front


def brute_force(problem: Problem, budget: int) -> float | None:
    layers, pairs = problem.costs.units.shape
    losses = [
        problem.allocation(choice).loss
        for choice in itertools.product(range(pairs), repeat=layers)
        if problem.costs.total(choice) <= budget
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("objective", ["balanced", "minimax", "sum"])
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_solution_equals_brute_force(seed, unequal, objective):
    problem = make_problem(4, (4, 2), seed, unequal=unequal, objective=objective)
    for bits in (2.5, 2.75, 3.1, 3.5, 4.0, 6.0, 9.3):
        budget = problem.costs.budget(bits)
        choice = solve(problem, budget)
        assert choice is not None
        assert problem.costs.total(choice) <= budget
        best = brute_force(problem, budget)
        assert problem.allocation(choice).loss == pytest.approx(best, rel=1e-5)


def test_solution_is_exact_where_losses_are_tiny():
    """The solver's absolute tolerances (1e-6) must not decide at 8 bits, where KLs are 1e-6."""
    problem = make_problem(4, (8, 4), seed=3)
    budget = problem.costs.budget(8.3)
    found = problem.allocation(solve(problem, budget)).loss
    assert found == pytest.approx(brute_force(problem, budget), rel=1e-5)


def test_nothing_fits_below_the_smallest_plan(problem):
    assert solve(problem, problem.costs.budget(2.4)) is None


def test_solution_never_exceeds_the_budget_and_repeats(problem):
    for bits in np.arange(2.5, 9.0, 0.37):
        budget = problem.costs.budget(float(bits))
        first = solve(problem, budget)
        assert problem.costs.total(first) <= budget
        assert first == solve(problem, budget)


def test_minimax_breaks_ties_by_the_mean_of_all_domains():
    """The second domain does not bind; among plans equal in the first, it must still be served."""
    kl_nats = np.zeros((2, 2, 2, 2))
    kl_nats[0, 0, 0] = [1.0, 100.0]  # domain 0 needs the keys of layer 0 only
    kl_nats[1, 1, 1] = [0.01, 0.1]  # domain 1 wants the values of layer 1
    table = make_table((4, 2), kl_nats)
    costs = make_costs(2, (4, 2))
    problem = build_problem(table, costs, bits=4.5, objective="minimax")._replace(norms=np.ones(2))
    choice = solve(problem, costs.total((column((4, 2), (4, 2)), column((4, 2), (2, 4)))))
    assert costs.labels(choice) == ("K4V2", "K2V4")


def test_layers_that_cost_nothing_give_a_finite_problem():
    table = make_table((4, 2), np.zeros((1, 3, 2, 2)))
    problem = build_problem(table, make_costs(3, (4, 2)), bits=4.0)
    assert problem.allocation(solve(problem, problem.costs.budget(3.0))).loss == 0.0


def test_sum_objective_follows_the_weights():
    problem = make_problem(4, (4, 2), seed=0, domains=2, objective="sum")
    budget = problem.costs.budget(3.4)
    one, other = (
        problem._replace(weights=np.array(weights)) for weights in ([1.0, 0.0], [0.0, 1.0])
    )
    assert one.predicted_kl(solve(one, budget))[0] <= one.predicted_kl(solve(other, budget))[0]
    assert solve(one, budget) != solve(other, budget)


def test_front_is_sorted_and_no_plan_is_matched_by_a_smaller_one(problem):
    front = solve_front(problem, budget_grid(problem.costs, 4.0))
    sizes = [point.effective_bits for point in front]
    assert sizes == sorted(sizes)
    assert len(front) > 10
    for index, point in enumerate(front):
        for smaller in front[:index]:
            kls = zip(smaller.predicted_kl, point.predicted_kl, strict=True)
            assert any(a > b for a, b in kls)


def test_search_is_at_least_as_good_as_the_uniform_plan_of_the_same_size(problem):
    for _, plan in baselines.uniform(problem)[:-1]:
        here = problem.at(plan.effective_bits)
        choice = solve(here, here.costs.budget(plan.effective_bits))
        assert here.allocation(choice).loss <= here.score(plan.predicted_kl) * (1 + 1e-6)


def test_grid_holds_the_budget_and_every_uniform_size(problem):
    grid = budget_grid(problem.costs, 4.1)
    assert {2.5, 3.5, 4.1, 4.5, 5.5, 6.5, 8.5} <= set(grid)
    assert max(grid) == 8.5
