from __future__ import annotations

import itertools

import pytest
from tuning_synthetic import make_problem

from kvbits.tuning.search import baselines
from kvbits.tuning.search.exact import solve


def best_uniform(problem, bits):
    return baselines.best(problem, baselines.uniform(problem), bits)


def test_uniform_plans_come_smallest_first_with_honest_sizes(problem):
    plans = baselines.uniform(problem)
    sizes = [plan.effective_bits for _, plan in plans]
    assert dict(plans).keys() >= {"K4V4", "K4V2", "K16V16"}
    assert sizes == sorted(sizes)
    assert dict(plans)["K4V2"].effective_bits == 3.5


def test_best_uniform_fits_and_is_the_least_loss(problem):
    name, plan = best_uniform(problem, 4.0)
    fitting = [p.loss for _, p in baselines.uniform(problem) if p.effective_bits <= 4.0]
    assert plan.loss == min(fitting)
    assert plan.effective_bits == 3.5, name


def test_ladder_is_high_at_the_ends_and_low_between(problem):
    name, plan = baselines.best_ladder(problem, 4.0)
    inner = plan.choice[1:-1]
    assert plan.effective_bits <= 4.0
    assert len(set(plan.choice)) == 2, name
    changes = sum(a != b for a, b in zip(plan.choice, plan.choice[1:], strict=False))
    assert changes <= 2
    assert inner


@pytest.mark.parametrize("seed", range(5))
def test_random_plan_fills_the_budget(problem, seed):
    plan = baselines.random_plan(problem, 4.0, seed=seed)
    smallest_step = 0.5 / 6 * 2  # one side of one of six layers, 2 to 4 bits
    assert 4.0 - smallest_step - 1e-9 < plan.effective_bits <= 4.0
    assert plan == baselines.random_plan(problem, 4.0, seed=seed)


def test_random_plans_differ_by_seed(problem):
    assert len({baselines.random_plan(problem, 4.0, seed=s).choice for s in range(5)}) > 3


def test_no_baseline_beats_the_integer_programme(problem):
    best = problem.allocation(solve(problem, problem.costs.budget(4.0))).loss
    rivals = [
        best_uniform(problem, 4.0)[1],
        baselines.best_ladder(problem, 4.0)[1],
        *(baselines.random_plan(problem, 4.0, seed=s) for s in range(20)),
    ]
    assert all(best <= rival.loss * (1 + 1e-6) for rival in rivals)


def test_budgets_below_every_plan_give_none(problem):
    assert best_uniform(problem, 2.0) is None
    assert baselines.best_ladder(problem, 2.0) is None
    assert baselines.random_plan(problem, 2.0, seed=0) is None


def every_ladder(problem):
    """All ladders written out, for comparison."""
    units = problem.costs.units
    layers, columns = units.shape
    for high, low in itertools.permutations(range(columns), 2):
        for first, last in itertools.product(range(layers), repeat=2):
            if units[:, low].sum() < units[:, high].sum() and 0 < first + last < layers:
                inner = (low,) * (layers - first - last)
                yield problem.allocation((high,) * first + inner + (high,) * last)


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("bits", [2.8, 4.0, 6.1])
def test_best_ladder_is_the_best_of_all_written_out(bits, unequal):
    problem = make_problem(5, (8, 4, 2), seed=2, unequal=unequal, objective="balanced")
    here = problem.at(bits)
    losses = [
        here.score(p.predicted_kl) for p in every_ladder(problem) if p.effective_bits <= bits
    ]
    found = baselines.best_ladder(problem, bits)[1]
    assert here.score(found.predicted_kl) == pytest.approx(min(losses), rel=1e-9)
    assert found.effective_bits <= bits


def test_one_layer_has_no_ladder():
    assert baselines.best_ladder(make_problem(1, (4, 2), seed=0), 4.0) is None
