from __future__ import annotations

import pytest
from tuning_synthetic import column

from kvbits.tuning import rivals
from kvbits.tuning.search.exact import budget_grid, solve_front


@pytest.fixture
def front(problem):
    return solve_front(problem, budget_grid(problem.costs, 4.0))


@pytest.fixture
def entries(problem, front):
    chosen = rivals.choose(problem, front, 4.0)
    return rivals.list_entries(
        problem, front, origin="exact", bits=4.0, chosen=chosen, random_seeds=[0, 1, 2]
    )


def test_chosen_plan_is_the_least_loss_within_the_budget(problem, front):
    chosen = rivals.choose(problem, front, 4.0)
    fitting = [plan for plan in front if plan.effective_bits <= 4.0]
    assert problem.score(chosen.predicted_kl) == min(
        problem.score(p.predicted_kl) for p in fitting
    )
    assert rivals.choose(problem, front, 1.0) is None


def test_uniform_sizes_near_the_budget_have_a_searched_plan_of_their_size(entries):
    searched = [e.allocation.effective_bits for e in entries if e.origin == "exact"]
    for entry in entries:
        size = entry.allocation.effective_bits
        if entry.origin == "uniform" and abs(size - 4.0) <= rivals.NEAR_BITS:
            assert any(size - 0.34 < bits <= size for bits in searched), entry.name


def test_uniform_plans_that_another_beats_are_left_out(problem, entries):
    names = [entry.name for entry in entries if entry.origin == "uniform"]
    assert {"K8V8", "K2V2", "K4V4"} <= set(names)
    assert "K16V16" not in names
    assert not {"K4V2", "K2V4"} <= set(names)


def test_names_are_unique_and_plans_of_one_origin_differ(entries):
    assert len({(entry.origin, entry.name) for entry in entries}) == len(entries)
    for origin in ("exact", "uniform", "ladder"):
        choices = [e.allocation.choice for e in entries if e.origin == origin]
        assert len(set(choices)) == len(choices)


def test_tasks_are_measured_on_one_plan_of_every_kind(entries):
    measured = [entry.origin for entry in entries if entry.measures_tasks]
    assert sorted(measured) == ["exact", "full", "ladder", "random", "uniform"]
    assert all(e.fits(4.0) for e in entries if e.measures_tasks and e.origin != "full")


def test_chosen_plan_is_verified_even_when_it_is_not_on_the_front(problem, front):
    chosen = problem.allocation((column((8, 4, 2), (2, 4)),) * 6)
    entries = rivals.list_entries(
        problem, front, origin="exact", bits=4.0, chosen=chosen, random_seeds=[]
    )
    found = [e for e in entries if e.allocation.choice == chosen.choice and e.origin == "exact"]
    assert [entry.measures_tasks for entry in found] == [True]
