from __future__ import annotations

from kvbits.tuning.progress import Silent
from kvbits.tuning.refine import refine, refinement_candidates
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import baselines
from kvbits.tuning.search.exact import solve


def test_candidates_fit_and_hold_the_programme_s_solution_first(problem):
    candidates = refinement_candidates(problem, 4.0)
    assert candidates[0] == solve(problem, problem.costs.budget(4.0))
    assert len(set(candidates)) == len(candidates) >= 3
    assert all(problem.costs.effective_bits(choice) <= 4.0 for choice in candidates)
    assert baselines.best(problem, baselines.uniform(problem), 4.0)[1].choice in candidates


def test_additive_model_is_followed_where_measurements_agree(problem, tmp_path):
    candidates = refinement_candidates(problem, 4.0)
    chosen = refine(
        problem,
        candidates,
        lambda choice: tuple(problem.predicted_kl(choice)),
        run=RunDir(tmp_path),
        progress=Silent(),
    )
    assert chosen.choice == candidates[0]


def test_measurement_overrules_the_model_and_is_not_repeated(problem, tmp_path):
    """The proposed plan turns out ten times worse than predicted, as recall may at two bits."""
    candidates = refinement_candidates(problem, 4.0)
    calls = []

    def evaluate(choice):
        calls.append(choice)
        factor = 10.0 if choice == candidates[0] else 1.0
        return tuple(factor * problem.predicted_kl(choice))

    run = RunDir(tmp_path)
    first = refine(problem, candidates, evaluate, run=run, progress=Silent())
    again = refine(problem, candidates, evaluate, run=run, progress=Silent())
    assert first == again
    assert first.choice != candidates[0]
    assert len(calls) == len(candidates)
