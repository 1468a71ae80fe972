from __future__ import annotations

import itertools

import numpy as np
import pytest
from tuning_synthetic import make_problem

from kvbits.tuning.problem import Problem
from kvbits.tuning.progress import Silent
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search.corrected import MISFIT, PRIOR_SPREAD, CorrectedProposer, corrected
from kvbits.tuning.search.exact import smallest, solve
from kvbits.tuning.search.smallest import SmallestProposer
from kvbits.tuning.search.trials import run_trials


def record(kl_nats) -> dict[str, list[float]]:
    return {"kl_nats": list(kl_nats)}


def test_nothing_measured_changes_nothing(problem):
    assert corrected(problem, {}) is problem


def test_correction_is_the_gaussian_posterior_written_out():
    """The information form, (S⁻¹ + Xᵀ N⁻¹ X)⁻¹ (S⁻¹ s0 + Xᵀ N⁻¹ y), on the columns in use."""
    problem = make_problem(3, (4, 2), seed=1, domains=1)
    measured = {(1, 2, 4): record([3.0]), (1, 4, 4): record([4.0]), (3, 2, 1): record([0.5])}
    found = corrected(problem, measured).kl_nats[0]
    used = sorted({(layer, pick) for choice in measured for layer, pick in enumerate(choice)})
    prior = np.array([problem.kl_nats[0][cell] for cell in used])
    design = np.array(
        [[choice[layer] == pick for layer, pick in used] for choice in measured], dtype=float
    )
    y = np.array([each["kl_nats"][0] for each in measured.values()])
    precision = np.diag((PRIOR_SPREAD * prior) ** -2.0)
    noise = np.diag((MISFIT * (design @ prior)) ** -2.0)
    expected = np.linalg.solve(
        precision + design.T @ noise @ design, precision @ prior + design.T @ noise @ y
    )
    assert [found[cell] for cell in used] == pytest.approx(np.maximum(expected, 0), rel=1e-6)
    assert found[0, 2] == problem.kl_nats[0, 0, 2]  # not in any plan


def interacting(problem: Problem):
    """Whole plans cost what their layers do, and neighbours at two bits four times that."""
    two = [i for i, c in enumerate(problem.costs.candidates) if c.label == "K2V2"]

    def evaluate(choice):
        pairs = sum(a in two and b in two for a, b in itertools.pairwise(choice))
        return [
            {"kl_nats": kl * 4.0**pairs, "document_kl_nats": [kl], "document_tokens": [1]}
            for kl in problem.predicted_kl(choice).tolist()
        ]

    return evaluate


def test_measured_interactions_lead_to_a_better_plan(tmp_path):
    problem = make_problem(8, (4, 2), seed=0, objective="balanced").at(3.2)
    evaluate = interacting(problem)
    first = solve(problem, problem.costs.budget(3.2))
    proposer = CorrectedProposer(problem, [first], [3.2])
    found = run_trials(
        problem, proposer, evaluate, trials=40, run=RunDir(tmp_path), progress=Silent()
    )
    assert len(found) < 40  # it ends by itself
    assert all(problem.costs.effective_bits(choice) <= 3.2 for choice in found)
    losses = [each["loss"] for each in found.values()]
    assert min(losses) < 0.9 * losses[0]


@pytest.mark.parametrize("seed", range(4))
def test_smallest_plan_is_that_of_brute_force(seed):
    problem = make_problem(4, (4, 2), seed=seed, unequal=True)
    limit = float(np.quantile(problem.kl_nats.sum(axis=1), 0.4))
    sizes = [
        problem.costs.total(choice)
        for choice in itertools.product(range(5), repeat=4)
        if problem.predicted_kl(choice).max() <= limit
    ]
    choice = smallest(problem, limit)
    assert problem.predicted_kl(choice).max() <= limit * (1 + 1e-6)
    assert problem.costs.total(choice) == min(sizes)


def test_a_plan_that_measures_worse_than_predicted_is_not_taken(problem, tmp_path):
    limit = float(problem.kl_nats.sum(axis=1).max(axis=0)[5])

    def evaluate(choice):
        return [
            {"kl_nats": 3 * kl, "document_kl_nats": [kl], "document_tokens": [1]}
            for kl in problem.predicted_kl(choice).tolist()
        ]

    proposer = SmallestProposer(problem, limit)
    found = run_trials(
        problem, proposer, evaluate, trials=20, run=RunDir(tmp_path), progress=Silent()
    )
    *before, last = found.values()
    assert max(last["kl_nats"]) <= limit
    assert all(max(each["kl_nats"]) > limit for each in before)
    assert before
